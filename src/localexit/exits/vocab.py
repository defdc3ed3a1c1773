"""The exit with its unembedding spread over ranks by rows: vocabulary parallel.

A rank holds V/size rows of W, and of whatever a rule has a row of for each token. Hidden states and targets are the
same on all ranks. Logits, error and dW stay where the rows are: what ranks tell each other is a few numbers a token
for the loss, and for the feedback the sums of their parts, [n, R] for codes, [n, M] for anchors, [n, D] for rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from localexit.exits.chunked import PLAIN, ExitCall, ExitResult, Stages, call_rule, run_exit
from localexit.exits.loss import LossOptions, RowResult, row_dot
from localexit.exits.ranks import VocabParallel
from localexit.feedback.base import Error, Feedback, Tokens
from localexit.feedback.groups import draw


def local_weight(weight: Any, vocab_parallel: VocabParallel | None) -> tuple[Tensor, VocabParallel | None]:
    """This rank's rows of an unembedding that is a `DTensor`, and the ranks that share it; any other as it is.

    Raises:
        ValueError: it is spread over ranks in another way than by rows.
    """
    if not hasattr(weight, "placements"):
        return weight, vocab_parallel
    if all(placement.is_replicate() for placement in weight.placements):
        return weight.to_local(), vocab_parallel
    if weight.device_mesh.ndim != 1 or not weight.placements[0].is_shard(0) or vocab_parallel is not None:
        raise ValueError(
            f"linear_weight is a DTensor with placements {list(weight.placements)}: an exit takes one that is sharded "
            f"by rows over a mesh of one dimension, [Shard(dim=0)], with vocab_parallel left out; redistribute it with "
            f"weight.redistribute(mesh, [Shard(0)]), or pass weight.full_tensor()"
        )
    return weight.to_local(), VocabParallel(vocab_size=weight.shape[0], group=weight.device_mesh.get_group())


def local_part(name: str, tensor: Any, is_sharded: bool) -> Any:
    """This rank's part of what has a row for each token, for an unembedding that is a sharded `DTensor` or not.

    Raises:
        ValueError: it is a `DTensor` that is not sharded by rows.
    """
    if not hasattr(tensor, "placements"):
        return tensor
    if is_sharded and not all(placement.is_shard(0) for placement in tensor.placements):
        raise ValueError(
            f"{name} is a DTensor with placements {list(tensor.placements)}, but linear_weight is sharded by rows; "
            f"distribute it with [Shard(0)] too"
        )
    return tensor.to_local()


def refuse_unsupported(call: ExitCall, reduction: str) -> None:
    """Refuse what is not there for shards.

    Raises:
        ValueError: so it is.
    """
    vocab = call.vocab
    assert vocab is not None, "called for shards only"
    num_rows = vocab.rows.stop - vocab.rows.start
    if call.weight.shape[0] != num_rows:
        raise ValueError(
            f"linear_weight has {call.weight.shape[0]} rows, expected the {num_rows} of this rank: rows "
            f"{vocab.rows.start}..{vocab.rows.stop - 1} of V={vocab.vocab_size}; pass weight[vocab_parallel.rows]"
        )
    for name, value, allowed in (
        ("reduction", reduction, ("mean", "sum")),
        ("preset", call.preset, ("fast",)),
        ("backend", call.backend, ("torch",)),
        ("weight_grad", "filtered" if call.is_filtered else "exact", ("exact",)),
    ):
        if value not in allowed:
            raise ValueError(
                f"vocab_parallel goes with {name}={' or '.join(map(repr, allowed))}, got {value!r}; pass that"
            )


def sharded_stages(vocab: VocabParallel) -> Stages:
    """The plain steps, for a rank's rows."""
    return replace(
        PLAIN,
        loss_and_error=partial(_loss_and_error, vocab),
        view=partial(_view, vocab),
        feedback=partial(_call_rule, vocab),
    )


def sharded_loss(call: ExitCall) -> tuple[Tensor, ExitResult]:
    """The summed loss with its graph, and all that came of the run."""
    results: list[ExitResult] = []
    loss: Tensor = _ShardedLoss.apply(call.hidden, call.weight, call.bias, call, results)
    return loss, results[0]


class _ShardedLoss(torch.autograd.Function):
    """A sum whose gradients were finished in the forward: no operator can carry a process group."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: ExitCall,
        results: list[ExitResult],
    ) -> Tensor:
        assert call.vocab is not None, "called for shards only"
        with torch.autocast(hidden.device.type, enabled=False):
            result = run_exit(call, stages=sharded_stages(call.vocab))
        results.append(result)
        ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
        ctx.grads = result.feedback, result.weight_grad, result.bias_grad
        return result.weighted_loss.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            None if grad is None else (upstream * grad).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None)


@dataclass(frozen=True, kw_only=True)
class ShardedError(Error):
    """View of an error whose columns are spread over ranks: token ids in and out are those of all V.

    Attributes:
        vocab: the ranks.
    """

    vocab: VocabParallel

    @property
    def vocab_size(self) -> int:
        """V, of all ranks together."""
        return self.vocab.vocab_size

    def matmul(self, codes: Tensor) -> Tensor:
        """As `Error.matmul`, for this rank's rows of the codes: [n, R] is summed over ranks."""
        return self.vocab.total(super().matmul(codes))

    def gather(self, ids: Tensor) -> Tensor:
        """As `Error.gather`."""
        local, is_here = self.vocab.local(ids)
        return self.vocab.total(super().gather(local) * is_here)

    def topk(self, k: int, exclude: Tensor) -> Tensor:
        """As `Error.topk`: the largest of the ranks' largest."""
        found = self._without(exclude[:, None], -1.0).topk(min(k, self.values.shape[1]))
        return _largest_of(self.vocab, k, found.values, found.indices)[1]

    def sample(self, uniforms: Tensor, exclude: Tensor) -> tuple[Tensor, Tensor]:
        """As `Error.sample`: the running sum over the vocabulary goes on from rank to rank."""
        magnitudes, uniforms = self._without(exclude, 0.0), uniforms.to(self.scale.dtype)
        masses = self.vocab.gather(magnitudes.sum(1, dtype=uniforms.dtype))  # [size, n]
        rank = dist.get_rank(self.vocab.group)
        total, before, own = masses.sum(0)[:, None], masses[:rank].sum(0)[:, None], masses[rank][:, None]
        place = (uniforms * total - before) / own.clamp_min(torch.finfo(uniforms.dtype).tiny)
        is_here = (place >= 0) & (place < 1)
        ids, is_drawn, _ = draw(magnitudes, torch.where(is_here, place, 0), exclude[:, :0])
        signs = self.values.gather(1, ids).sign().to(self.scale.dtype) * (is_here & is_drawn)
        weights = self.vocab.total(signs) * total / uniforms.shape[1]
        return self.vocab.total(torch.where(is_here, ids + self.vocab.rows.start, 0)), self._scaled(weights)

    def weighted_rows(self, ids: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        """As `Error.weighted_rows`, for this rank's rows: [n, D] is summed over ranks."""
        local, is_here = self.vocab.local(ids)
        return self.vocab.total(super().weighted_rows(local, weights * is_here, rows))

    def weighted_codes(self, ids: Tensor, weights: Tensor, codes: Tensor) -> Tensor:
        """As `Error.weighted_codes`, likewise."""
        local, is_here = self.vocab.local(ids)
        return self.vocab.total(super().weighted_codes(local, weights * is_here, codes))

    def _without(self, ids: Tensor, fill: float) -> Tensor:
        """Magnitudes of this rank's entries, `fill` in place of some tokens."""
        local, is_here = self.vocab.local(ids)
        magnitudes = self.values.abs()
        kept = torch.where(is_here, fill, magnitudes.gather(1, local))
        # A token that is elsewhere stands for row 0: what is written last there must not be its old value.
        is_zero_here = ((local == 0) & is_here).any(1, keepdim=True)
        kept = torch.where((local == 0) & is_zero_here, fill, kept)
        return magnitudes.scatter_(1, local, kept)


@dataclass(frozen=True, kw_only=True)
class ShardedTokens(Tokens):
    """Tokens whose logits are spread over ranks.

    Attributes:
        vocab: the ranks.
    """

    vocab: VocabParallel

    @property
    def vocab_size(self) -> int:
        """V, of all ranks together."""
        return self.vocab.vocab_size

    def top_logits(self, k: int) -> tuple[Tensor, Tensor]:
        """As `Tokens.top_logits`."""
        assert self.logits is not None, "the rule does not declare needs_logits"
        k = min(k, self.vocab.vocab_size)
        found = self.logits.topk(min(k, self.logits.shape[1]))
        return _largest_of(self.vocab, k, found.values, found.indices)


def _largest_of(vocab: VocabParallel, k: int, values: Tensor, local_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest of what the ranks found, [n, ≤ k] each: values and token ids [n, k]."""
    missing = min(k, vocab.largest_shard) - values.shape[1]
    values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    ids = torch.nn.functional.pad(local_ids + vocab.rows.start, (0, missing))
    all_values, all_ids = (vocab.gather(part).movedim(0, 1).flatten(1) for part in (values, ids))
    found = all_values.topk(k)
    return found.values, all_ids.gather(1, found.indices)


def _view(vocab: VocabParallel, values: Tensor, scale: Tensor, result: RowResult) -> Error:
    return ShardedError(values=values, scale=scale, logit_product=result.logit_product, vocab=vocab)


def _call_rule(
    vocab: VocabParallel, rule: Feedback, error: Error, tokens: Tokens, prepared: tuple[Tensor, ...]
) -> Tensor:
    known = {field.name: getattr(tokens, field.name) for field in fields(Tokens)}
    return call_rule(rule, error, ShardedTokens(**known, vocab=vocab), prepared)


def _loss_and_error(
    vocab: VocabParallel,
    logits: Tensor,
    target: Tensor,
    options: LossOptions,
    *,
    need_error: bool,
    need_logits: bool,
    need_groups: bool,
    need_stats: bool,
    bias: Tensor | None = None,
    scratch: Tensor | None = None,
) -> RowResult:
    """As `exits.loss.loss_and_error`, for this rank's columns [n, V/size] of the logits."""
    del need_groups, scratch
    raw = logits.clone() if need_error and (need_logits or options.softcap is not None) else None
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)
    local, is_here = vocab.local(target)
    highest = vocab.gather(logits.amax(1))  # [size, n]
    largest = highest.amax(0)
    argmax = _argmax(vocab, logits, highest) if need_stats else target.new_empty(0)
    gold_logit = logits.gather(1, local[:, None])[:, 0] * is_here
    logit_sum = logits.sum(1)
    probs = logits.sub_(largest[:, None]).exp_()
    gold_logit, logit_sum, exp_sum = vocab.total(torch.stack([gold_logit, logit_sum, probs.sum(1)]))
    probs.div_(exp_sum[:, None])
    log_sum = exp_sum.log()
    lse, log_prob = largest + log_sum, (gold_logit - largest) - log_sum
    smooth = options.label_smoothing
    loss = -(1 - smooth) * log_prob + smooth * (lse - logit_sum / vocab.vocab_size) + options.z_loss * lse.square()
    entropy = loss.new_empty(0)
    if need_stats:
        entropy = vocab.total(-(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(1))
    product = None
    if need_error:
        probs.mul_((1 + 2 * options.z_loss * lse)[:, None]).sub_(smooth / vocab.vocab_size)
        probs.scatter_add_(1, local[:, None], ((smooth - 1) * is_here.to(probs.dtype))[:, None])
        if options.softcap is not None:
            assert raw is not None, "kept above"
            probs.mul_(1 - (raw / options.softcap).tanh_().square_())
        if need_logits:
            assert raw is not None, "kept above"
            product = vocab.total(row_dot(probs, raw if bias is None else raw - bias))
    return RowResult(
        loss=loss,
        gold_logit=gold_logit,
        log_prob=log_prob,
        argmax=argmax,
        entropy=entropy,
        raw=raw,
        logit_product=product,
    )


def _argmax(vocab: VocabParallel, logits: Tensor, highest: Tensor) -> Tensor:
    """The most likely token, from the ranks' highest logits [size, n]."""
    is_here = highest.argmax(0) == dist.get_rank(vocab.group)
    return vocab.total(torch.where(is_here, logits.argmax(1) + vocab.rows.start, 0))
