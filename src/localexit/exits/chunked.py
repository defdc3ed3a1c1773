"""The one loop over token chunks: logits, loss and error in their place, dW, feedback. No [N, V] tensor exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from localexit import _checks
from localexit.exits.loss import LossOptions, RowResult, loss_and_error, tile_error
from localexit.exits.ranks import VocabParallel
from localexit.feedback.base import Anchors, Error, Feedback, Tokens, accumulate_dtype, joined, product
from localexit.feedback.groups import GROUP, reduce_groups

# weight_grad="filtered" leaves out errors below this, for a row weight of one: what bf16 does not see next to 1.
FILTER_THRESHOLD = 2.0**-12

# Chunks and tiles begin where products like their operands to begin.
ALIGNMENT = 128

# Bytes of a chunk in the memory preset: fewer, and the products read the weight more often than they compute; with
# more, chunk and hidden states would take more than 256 MiB.
_MEMORY_PRESET_CHUNK_BYTES = 96 * 2**20


@dataclass(frozen=True, kw_only=True)
class LossCall:
    """The loss of one exit, flattened and checked.

    Attributes:
        hidden: [N, D].
        weight: [V, D], may be of another dtype than hidden (master weights).
        bias: [V], contiguous, or None.
        target: integer [N], contiguous.
        row_weight: fp32 or fp64 [N], what each row's loss is multiplied by.
        compute_dtype: dtype of the products.
        options: options of the loss.
        vocab: the ranks that share the unembedding, of which weight and bias are this one's rows, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    row_weight: Tensor
    compute_dtype: torch.dtype
    options: LossOptions
    vocab: VocabParallel | None = None

    @property
    def vocab_size(self) -> int:
        """V, of all ranks together where several share the unembedding."""
        return self.weight.shape[0] if self.vocab is None else self.vocab.vocab_size


@dataclass(frozen=True, kw_only=True)
class ExitCall(LossCall):
    """One exit: what the loop works on.

    Attributes:
        rule: the feedback rule.
        uniforms: fp32 [N, m], the rule's draws, or None.
        anchor_rows: int64 [M], the rule's anchors among these tokens, or None.
        anchor_hidden, anchor_is_counted: [M, D] and bool [M], anchors that are not all of these tokens, or None.
        num_measured: 0-dim, how many anchors a rule had that were measured before the call, or None.
        chunk_bytes: size of the chunk buffer in bytes.
        need_hidden, need_weight, need_bias: what to compute besides the loss.
        need_stats: also arg-max and entropy.
        is_filtered: whether dW leaves out groups of entries of the error below `FILTER_THRESHOLD`.
        backend: name of the backend that was chosen.
        preset: "fast" or "memory".
        spare_bytes: what the memory preset's second pass will take for dW: until then the chunk may have it.
    """

    rule: Feedback
    uniforms: Tensor | None = None
    anchor_rows: Tensor | None = None
    anchor_hidden: Tensor | None = None
    anchor_is_counted: Tensor | None = None
    num_measured: Tensor | None = None
    chunk_bytes: int | None = None
    need_hidden: bool
    need_weight: bool
    need_bias: bool
    need_stats: bool
    is_filtered: bool
    backend: str = "torch"
    preset: str = "fast"
    spare_bytes: int = 0

    @property
    def need_error(self) -> bool:
        """Whether anything beyond the loss is asked for."""
        return self.need_hidden or self.need_weight or self.need_bias


@dataclass(frozen=True, kw_only=True)
class ExitResult:
    """Outcome of one exit.

    Attributes:
        loss: [N] unweighted loss of each token: 0 on ignored ones, NaN where the target is out of range.
        weighted_loss: [N] the same times the row weight.
        gold_logit, log_prob, argmax, entropy: [N], see `RowResult`; zero on ignored tokens.
        is_bad: bool [N], target outside 0..V-1 and not ignored.
        feedback: [N, D] in hidden's dtype (fp32 for fp16, which cannot hold errors of 1/count), or None.
        weight_grad: fp32 or fp64 [V, D], or None.
        bias_grad: fp32 or fp64 [V], or None.
    """

    loss: Tensor
    weighted_loss: Tensor
    gold_logit: Tensor
    log_prob: Tensor
    argmax: Tensor
    entropy: Tensor
    is_bad: Tensor
    feedback: Tensor | None
    weight_grad: Tensor | None
    bias_grad: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The steps of a chunk, so that kernels and audits can replace one without touching the loop.

    Attributes:
        name: the backend's name.
        logits: fills a buffer [n, V] with the logits of a chunk.
        loss_and_error: turns the buffer into the values of the error, see `exits.loss.loss_and_error`.
        fused_product: what does `logits` and `loss_and_error` at once, as `kernels.launch.product_pass`: it is told
            which rows count and their weights, makes the others' hidden states zero in `clean`, and may leave
            `RowResult.weighted_scale`; None where nothing does.
        tile_error: as `loss_and_error` for a tile of columns, when the gold token's logit and log-probability are
            known, see `exits.loss.tile_error`.
        fused_tile: the same for `logits` and `tile_error`, from a tile of the weight.
        add_weight_grad: adds the product with the hidden states to dW, or starts it.
        add_filtered_weight_grad: the same from the groups of entries that matter.
        view: makes the rule's view of the error from values, scale and what the rows yielded.
        feedback: calls the rule.
        scaled: a finished gradient times a 0-dim factor, in a dtype.
        has_bias: whether `logits` adds the bias; else `loss_and_error` does.
        buffer_dtype: dtype of the buffer, for a call.
        value_dtype: dtype of the values in the products with the error, for a call.
        chunk_bytes: default size of the buffer, by device type.
    """

    name: str
    logits: Callable[[Tensor, Tensor, Tensor | None, Tensor], None]
    loss_and_error: Callable[..., RowResult]
    fused_product: Callable[[ExitCall, Tensor], Callable[..., RowResult] | None]
    fused_tile: Callable[[LossCall, Tensor], Callable[..., None] | None]
    tile_error: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, LossOptions, int, Tensor | None, int], None]
    add_weight_grad: Callable[[Tensor | None, Tensor, Tensor], Tensor]
    add_filtered_weight_grad: Callable[[Tensor | None, Tensor, Tensor, Tensor, RowResult], Tensor]
    view: Callable[[Tensor, Tensor, RowResult], Error]
    feedback: Callable[[Feedback, Error, Tokens, tuple[Tensor, ...]], Tensor]
    scaled: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    has_bias: bool
    buffer_dtype: Callable[[LossCall], torch.dtype]
    value_dtype: Callable[[LossCall], torch.dtype]
    chunk_bytes: Mapping[str, int]


def plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Raw logits of a chunk into `out` [n, V]."""
    if out.dtype == hidden.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(hidden, weight.T))
    if bias is not None:
        out.add_(bias)


def add_weight_grad(total: Tensor | None, values: Tensor, scaled_hidden: Tensor) -> Tensor:
    """`total + valuesᵀ @ scaled_hidden`, in place where there is a total, summed in the dtype of `total`."""
    if total is None:
        return torch.mm(values.T, scaled_hidden)
    if values.dtype == total.dtype:
        return total.addmm_(values.T, scaled_hidden)
    return torch.addmm(total, values.T, scaled_hidden, out_dtype=total.dtype, out=total)


def add_filtered_weight_grad(
    total: Tensor | None, values: Tensor, scaled_hidden: Tensor, target: Tensor, result: RowResult
) -> Tensor:
    """As `add_weight_grad`, without the groups of `GROUP` entries of a row that are all below `FILTER_THRESHOLD`.

    The group of the gold token, target [n], always counts.
    """
    del result
    is_small = reduce_groups(values, torch.amax) < FILTER_THRESHOLD
    is_small.scatter_(1, (target // GROUP)[:, None], False)
    is_left_out = is_small.repeat_interleave(GROUP, dim=1)[:, : values.shape[1]]
    return add_weight_grad(total, values.masked_fill(is_left_out, 0), scaled_hidden)


def plain_view(values: Tensor, scale: Tensor, result: RowResult) -> Error:
    """The view of the error of a chunk."""
    return Error(values=values, scale=scale, logit_product=result.logit_product)


def call_rule(rule: Feedback, error: Error, tokens: Tokens, prepared: tuple[Tensor, ...]) -> Tensor:
    """The feedback stage: everything it gets is an argument, and none of it is the unembedding."""
    feedback: Tensor = rule(error, tokens, prepared)
    return feedback


def plain_scaled(source: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`factor * source` in `dtype`."""
    return (factor * source).to(dtype)


def _sum_dtype(call: LossCall) -> torch.dtype:
    return accumulate_dtype(call.compute_dtype)


def _plain_value_dtype(call: LossCall) -> torch.dtype:
    # bf16 products accumulate in fp32 on a GPU. On the CPU they are slow and round each chunk's sum; fp16 cannot hold
    # errors of 1/count: both take the products with the error in fp32.
    if call.hidden.is_cuda and call.compute_dtype == torch.bfloat16:
        return torch.bfloat16
    return _sum_dtype(call)


def _nothing_fused(call: LossCall, weight: Tensor) -> None:
    del call, weight


PLAIN = Stages(
    name="torch",
    logits=plain_logits,
    loss_and_error=loss_and_error,
    fused_product=_nothing_fused,
    fused_tile=_nothing_fused,
    tile_error=tile_error,
    add_weight_grad=add_weight_grad,
    add_filtered_weight_grad=add_filtered_weight_grad,
    view=plain_view,
    feedback=call_rule,
    scaled=plain_scaled,
    has_bias=True,
    buffer_dtype=_sum_dtype,
    value_dtype=_plain_value_dtype,
    # On the CPU about where the two large products are at full speed; see docs/performance.md.
    chunk_bytes={"cpu": 64 * 2**20, "cuda": 512 * 2**20},
)


def run_exit(
    call: ExitCall,
    *,
    weight_grad: Tensor | None = None,
    bias_grad: Tensor | None = None,
    stages: Stages = PLAIN,
) -> ExitResult:
    """Run one exit: loss, statistics, dW, db and the feedback.

    Args:
        call: the exit.
        weight_grad: [V, D] accumulator in the accumulation dtype that dW is added to; None makes one.
        bias_grad: [V] accumulator likewise.
        stages: the steps to use, those of a backend.
    """
    loop = _Loop(call, stages, weight_grad, bias_grad)
    for chunk in loop.chunks:
        loop.step(chunk)
    return loop.result()


def chunk_rows(num_rows: int, vocab_size: int, itemsize: int, chunk_bytes: int) -> int:
    """Tokens a chunk: as many rows of V numbers as fit the budget, at least one.

    Evenly spread over the chunks, and rounded up to `ALIGNMENT` where that fits: the last one has what is left.
    """
    most = max(1, min(num_rows, chunk_bytes // (vocab_size * itemsize)))
    num_chunks = -(-num_rows // most)
    even = -(-num_rows // num_chunks)
    aligned = -(-even // ALIGNMENT) * ALIGNMENT
    return aligned if aligned <= most else even


def _default_chunk_bytes(call: ExitCall, stages: Stages) -> int:
    budget = stages.chunk_bytes.get(call.hidden.device.type, stages.chunk_bytes["cpu"])
    if call.preset == "memory":
        budget = min(budget, _MEMORY_PRESET_CHUNK_BYTES + call.spare_bytes)
    # A rule that reads the raw logits needs a second buffer, for a copy of them.
    return budget // 2 if call.need_hidden and call.rule.needs_logits else budget


def _num_chunk_rows(call: ExitCall, stages: Stages) -> int:
    budget = call.chunk_bytes or _default_chunk_bytes(call, stages)
    # Ranks that share the unembedding go through the same chunks.
    num_columns = call.weight.shape[0] if call.vocab is None else call.vocab.largest_shard
    return chunk_rows(call.hidden.shape[0], num_columns, stages.buffer_dtype(call).itemsize, budget)


def split_together(tensors: Sequence[Tensor | None], size: int) -> Iterator[tuple[Any, ...]]:
    """So many rows of all these tensors after the other; None of what is None."""
    return zip(*(repeat(None) if tensor is None else tensor.split(size) for tensor in tensors), strict=False)


def is_in_vocabulary(target: Tensor, vocab_size: int) -> Tensor:
    """Which of these are in 0..V-1."""
    return target == target.clamp(0, vocab_size - 1)


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a gradient until the upstream factor is known: fp16 cannot hold 1/count, and waits in fp32."""
    return torch.float32 if dtype == torch.float16 else dtype


class _Chunk(NamedTuple):
    """Some rows of what an exit has for each token.

    Attributes:
        hidden: [n, D], as the exit got them.
        is_counted: bool [n].
        target: int64 [n], 0 where not counted.
        row_weight: [n], 0 where not counted.
        uniforms: [n, m], or None.
        feedback: [n, D], where the rule's is written, or None.
    """

    hidden: Tensor
    is_counted: Tensor
    target: Tensor
    row_weight: Tensor
    uniforms: Tensor | None
    feedback: Tensor | None


class _Loop:
    """State of one run over the chunks."""

    def __init__(self, call: ExitCall, stages: Stages, weight_grad: Tensor | None, bias_grad: Tensor | None) -> None:
        self.call = call
        self.stages = stages
        self.sum_dtype = accumulate_dtype(call.compute_dtype)
        self.value_dtype = stages.value_dtype(call)
        vocab_size = call.weight.shape[0]
        # On a GPU the host launches every one of the small operations here, and many exits wait for that.
        is_meant = call.target != call.options.ignore_index
        self.is_counted = is_meant & is_in_vocabulary(call.target, call.vocab_size)
        self.is_bad = is_meant != self.is_counted
        if not call.hidden.is_cuda:
            # Looking costs a synchronisation on a GPU: there the loss becomes NaN instead, and the stats say why.
            _checks.targets_in_range(self.is_bad, call.target, call.vocab_size, call.options.ignore_index)
        self.target = (call.target * self.is_counted).long()
        # Rows that do not count are selected away: 0 times what they hold may be NaN.
        self.zero = call.hidden.new_zeros(())
        self.scale = torch.where(self.is_counted, call.row_weight, self.zero).to(self.sum_dtype)
        self.weight = call.weight.to(call.compute_dtype)
        self.bias = None if call.bias is None else call.bias.to(self.sum_dtype)
        self.fused_product = stages.fused_product(call, self.weight)
        self.need_groups = (call.need_hidden and call.rule.selects) or (call.need_weight and call.is_filtered)
        self.feedback = (
            call.hidden.new_empty(call.hidden.shape, dtype=storage_dtype(call.hidden.dtype))
            if call.need_hidden
            else None
        )
        size = _num_chunk_rows(call, stages) if len(call.hidden) else 0
        self.chunks = self._chunks(size)
        self.weight_grad = self._weight_accumulator(weight_grad)
        self.bias_grad = self._accumulator(bias_grad, (vocab_size,), call.need_bias)
        self.prepared: tuple[Tensor, ...] | None = None
        # Of each chunk loss, gold_logit, log_prob, argmax and entropy.
        self.of_chunks: list[tuple[Tensor, ...]] = []
        self.buffer = call.hidden.new_empty(size, vocab_size, dtype=stages.buffer_dtype(call))
        self.scratch: Tensor | None = None

    def _chunks(self, size: int) -> Sequence[_Chunk]:
        """What there is for each token, in parts of so many: taken apart at once, and not anew for every chunk."""
        of_tokens = (
            self.call.hidden, self.is_counted, self.target, self.scale, self.call.uniforms, self.feedback,
        )  # fmt: skip
        return [_Chunk(*chunk) for chunk in split_together(of_tokens, size)] if size else []

    def _accumulator(self, given: Tensor | None, shape: Sequence[int], is_needed: bool) -> Tensor | None:
        if not is_needed:
            return None
        return given if given is not None else self.call.hidden.new_zeros(shape, dtype=self.sum_dtype)

    def _weight_accumulator(self, given: Tensor | None) -> Tensor | None:
        # The first chunk's product starts the sum if it has its dtype. One chunk whose product has the gradient's own
        # dtype is rounded once: it needs no accumulator.
        is_whole = len(self.chunks) == 1 and self.value_dtype == self.call.weight.dtype
        is_sum = len(self.chunks) > 0 and self.value_dtype == self.sum_dtype
        if given is None and (is_whole or is_sum):
            return None
        return self._accumulator(given, self.call.weight.shape, self.call.need_weight)

    def _clean(self, hidden: Tensor, is_counted: Tensor) -> Tensor:
        """Hidden states with zeros in the rows that do not count."""
        return torch.where(is_counted[:, None], hidden, self.zero).to(self.call.compute_dtype)

    def _prepare(self, logits: Tensor) -> tuple[Tensor, ...]:
        """What the rule makes once a call, from anchors measured before the error takes the logits' place."""
        call = self.call
        rows, given = call.anchor_rows, call.anchor_hidden
        if given is not None:
            assert call.anchor_is_counted is not None, "it belongs to anchor_hidden"
            anchors = measure(given.to(call.compute_dtype), self.weight, call.anchor_is_counted)
            return call.rule.prepare(anchors, self.value_dtype)
        if rows is None:
            return call.rule.prepare(None, self.value_dtype)
        is_counted = self.is_counted[rows]
        hidden = self._clean(call.hidden[rows], is_counted)
        if len(self.chunks) > 1 or logits.dtype != self.sum_dtype or self.fused_product is not None:
            return call.rule.prepare(measure(hidden, self.weight, is_counted), self.value_dtype)
        measured = logits[rows]
        if self.bias is not None and self.stages.has_bias:
            measured = measured - self.bias
        anchors = Anchors(hidden=hidden, logits=measured, count=is_counted.sum())
        return call.rule.prepare(anchors, self.value_dtype)

    def step(self, chunk: _Chunk) -> None:
        call = self.call
        logits = self.buffer[: len(chunk.hidden)]
        hidden, result = (self._plain if self.fused_product is None else self._fused)(chunk, logits)
        self.scratch = result.raw
        self.of_chunks.append((result.loss, result.gold_logit, result.log_prob, result.argmax, result.entropy))
        if call.need_error:
            values = logits.to(self.value_dtype)
            scale = result.weighted_scale
            if scale is None:
                scale = chunk.row_weight if result.scale is None else chunk.row_weight * result.scale
            self._add_grads(chunk, hidden, values, scale, result)
            self._add_feedback(chunk, hidden, values, scale, result)

    def _plain(self, chunk: _Chunk, logits: Tensor) -> tuple[Tensor, RowResult]:
        """Logits, then loss and error in their place; the hidden states they are made from."""
        hidden = self._clean(chunk.hidden, chunk.is_counted)
        self.stages.logits(hidden, self.weight, self.bias, logits)
        self._prepare_once(logits)
        return hidden, self.stages.loss_and_error(
            logits,
            chunk.target,
            self.call.options,
            bias=self.bias,
            need_error=self.call.need_error,
            need_logits=self.call.need_hidden and self.call.rule.needs_logits,
            need_groups=self.need_groups,
            need_stats=self.call.need_stats,
            scratch=self.scratch,
        )

    def _fused(self, chunk: _Chunk, logits: Tensor) -> tuple[Tensor, RowResult]:
        """The same in one."""
        assert self.fused_product is not None, "the caller looked"
        self._prepare_once(logits)
        clean = chunk.hidden.new_empty(chunk.hidden.shape, dtype=self.call.compute_dtype)
        return clean, self.fused_product(
            chunk.hidden,
            self.weight,
            chunk.target,
            self.call.options,
            is_counted=chunk.is_counted,
            row_weight=chunk.row_weight,
            clean=clean,
            out=logits,
            need_groups=self.need_groups,
        )

    def _prepare_once(self, logits: Tensor) -> None:
        if self.call.need_hidden and self.prepared is None:
            self.prepared = self._prepare(logits)

    def _add_grads(self, chunk: _Chunk, hidden: Tensor, values: Tensor, scale: Tensor, result: RowResult) -> None:
        if self.call.need_weight:
            scaled = torch.mul(hidden, scale[:, None], out=hidden.new_empty(hidden.shape, dtype=values.dtype))
            if self.call.is_filtered:
                self.weight_grad = self.stages.add_filtered_weight_grad(
                    self.weight_grad, values, scaled, chunk.target, result
                )
            else:
                self.weight_grad = self.stages.add_weight_grad(self.weight_grad, values, scaled)
        if self.bias_grad is not None:
            self.bias_grad += product(values.T, scale[:, None].to(values.dtype), self.sum_dtype)[:, 0]

    def _add_feedback(self, chunk: _Chunk, hidden: Tensor, values: Tensor, scale: Tensor, result: RowResult) -> None:
        if chunk.feedback is None or self.prepared is None:
            return
        error = self.stages.view(values, scale, result)
        tokens = Tokens(
            hidden=hidden,
            target=chunk.target,
            logits=result.raw,
            log_normaliser=result.lse if self.call.rule.needs_logits else None,
            softcap=self.call.options.softcap,
            uniforms=chunk.uniforms,
        )
        chunk.feedback.copy_(self.stages.feedback(self.call.rule, error, tokens, self.prepared))

    def _rows(self) -> tuple[Tensor, ...]:
        """What was kept, of all tokens; zero on those that do not count, empty where it was not asked for."""
        if not self.of_chunks:
            none = self.scale.new_empty(0)
            return none, none.clone(), none.clone(), self.target.new_empty(0), none.clone()
        is_left_out = ~self.is_counted
        columns = tuple(zip(*self.of_chunks, strict=True))
        loss, gold_logit, log_prob = (joined(parts).masked_fill_(is_left_out, 0) for parts in columns[:3])
        if not self.call.need_stats:
            return loss, gold_logit, log_prob, self.target.new_empty(0), loss.new_empty(0)
        argmax, entropy = (joined(parts).masked_fill_(is_left_out, 0) for parts in columns[3:])
        return loss, gold_logit, log_prob, argmax, entropy

    def result(self) -> ExitResult:
        loss, gold_logit, log_prob, argmax, entropy = self._rows()
        loss.masked_fill_(self.is_bad, torch.nan)
        return ExitResult(
            loss=loss,
            # The scale of a bad row is zero, and NaN stays NaN.
            weighted_loss=self.scale * loss,
            gold_logit=gold_logit,
            log_prob=log_prob,
            argmax=argmax,
            entropy=entropy,
            is_bad=self.is_bad,
            feedback=self.feedback,
            weight_grad=self.weight_grad,
            bias_grad=self.bias_grad,
        )


def measure(hidden: Tensor, weight: Tensor, is_counted: Tensor) -> Anchors:
    """Forward pairs of some tokens: hidden [M, D] (zero where not counted) and `raw_logits` of them."""
    return Anchors(hidden=hidden, logits=raw_logits(hidden, weight), count=is_counted.sum())


def raw_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits [M, V] of hidden [M, D] without the bias.

    They are in the accumulation dtype: differences of them are smaller than the rounding of bf16.
    """
    return product(hidden, weight.T, accumulate_dtype(hidden.dtype))
