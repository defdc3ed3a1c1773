"""The one loop over token chunks: logits, loss and error in their place, dW, feedback. No [N, V] tensor exists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from localexit import _checks
from localexit.exits.loss import LossOptions, RowResult, loss_and_error
from localexit.feedback.base import Anchors, Error, Feedback, Tokens, accumulate_dtype

# Bytes of the chunk buffer. On the CPU about where the two large products are at full speed; see docs/performance.md.
DEFAULT_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}


@dataclass(frozen=True, kw_only=True)
class ExitCall:
    """One exit, flattened and checked: what the loop works on.

    Attributes:
        hidden: [N, D].
        weight: [V, D], may be of another dtype than hidden (master weights).
        bias: [V] or None.
        target: integer [N].
        row_weight: fp32 or fp64 [N], what each row's loss is multiplied by.
        compute_dtype: dtype of the products.
        rule: the feedback rule.
        uniforms: fp32 [N, m], the rule's draws, or None.
        anchor_rows: int64 [M], the rule's anchors, or None.
        options: options of the loss.
        chunk_bytes: size of the chunk buffer in bytes.
        need_hidden, need_weight, need_bias: what to compute besides the loss.
        need_stats: also arg-max and entropy.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    row_weight: Tensor
    compute_dtype: torch.dtype
    rule: Feedback
    uniforms: Tensor | None = None
    anchor_rows: Tensor | None = None
    options: LossOptions = field(default_factory=LossOptions)
    chunk_bytes: int | None = None
    need_hidden: bool = True
    need_weight: bool = True
    need_bias: bool = True
    need_stats: bool = False

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
        lse, log_prob, argmax, entropy: [N], see `RowResult`; zero on ignored tokens.
        is_bad: bool [N], target outside 0..V-1 and not ignored.
        feedback: [N, D] in hidden's dtype (fp32 for fp16, which cannot hold errors of 1/count), or None.
        weight_grad: fp32 or fp64 [V, D], or None.
        bias_grad: fp32 or fp64 [V], or None.
    """

    loss: Tensor
    weighted_loss: Tensor
    lse: Tensor
    log_prob: Tensor
    argmax: Tensor
    entropy: Tensor
    is_bad: Tensor
    feedback: Tensor | None
    weight_grad: Tensor | None
    bias_grad: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The steps of a chunk, so that kernels and audits can replace one without touching the loop."""

    logits: Callable[[Tensor, Tensor, Tensor | None, Tensor], None]
    loss_and_error: Callable[..., RowResult]
    add_weight_grad: Callable[[Tensor, Tensor, Tensor], None]
    feedback: Callable[[Feedback, Error, Tokens, tuple[Tensor, ...]], Tensor]


def plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Raw logits of a chunk into `out` [n, V], which has the accumulation dtype."""
    if out.dtype == hidden.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(hidden, weight.T))
    if bias is not None:
        out.add_(bias)


def plain_add_weight_grad(total: Tensor, values: Tensor, scaled_hidden: Tensor) -> None:
    """`total += valuesᵀ @ scaled_hidden` with the sum kept in the dtype of `total`."""
    if values.dtype == total.dtype:
        total.addmm_(values.T, scaled_hidden.to(total.dtype))
    else:
        product = torch.mm(values.T, scaled_hidden.to(values.dtype), out_dtype=total.dtype)
        total.add_(product)


def plain_feedback(rule: Feedback, error: Error, tokens: Tokens, prepared: tuple[Tensor, ...]) -> Tensor:
    """The feedback stage: everything it gets is an argument, and none of it is the unembedding."""
    feedback: Tensor = rule(error, tokens, prepared)
    return feedback


PLAIN = Stages(
    logits=plain_logits,
    loss_and_error=loss_and_error,
    add_weight_grad=plain_add_weight_grad,
    feedback=plain_feedback,
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
        stages: the steps to use.
    """
    loop = _Loop(call, stages, weight_grad, bias_grad)
    for rows in loop.chunks:
        loop.step(rows)
    return loop.result()


def chunk_rows(num_rows: int, vocab_size: int, itemsize: int, chunk_bytes: int) -> int:
    """Tokens a chunk: as many rows of V numbers as fit the budget, at least one, evenly spread over the chunks."""
    most = max(1, min(num_rows, chunk_bytes // (vocab_size * itemsize)))
    num_chunks = -(-num_rows // most)
    return -(-num_rows // num_chunks)


def _chunks(call: ExitCall) -> Sequence[slice]:
    num_rows = call.hidden.shape[0]
    if num_rows == 0:
        return []
    budget = call.chunk_bytes or DEFAULT_CHUNK_BYTES.get(call.hidden.device.type, DEFAULT_CHUNK_BYTES["cpu"])
    size = chunk_rows(num_rows, call.weight.shape[0], accumulate_dtype(call.compute_dtype).itemsize, budget)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _value_dtype(call: ExitCall) -> torch.dtype:
    # bf16 products accumulate in fp32 on a GPU. On the CPU they are slow and round each chunk's sum; fp16 cannot hold
    # errors of 1/count: both take the products with the error in fp32.
    if call.hidden.is_cuda and call.compute_dtype == torch.bfloat16:
        return torch.bfloat16
    return accumulate_dtype(call.compute_dtype)


def _feedback_like(hidden: Tensor) -> Tensor:
    return torch.zeros_like(hidden, dtype=storage_dtype(hidden.dtype), memory_format=torch.contiguous_format)


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a gradient until the upstream factor is known: fp16 cannot hold 1/count, and waits in fp32."""
    return torch.float32 if dtype == torch.float16 else dtype


class _Loop:
    """State of one run over the chunks."""

    def __init__(self, call: ExitCall, stages: Stages, weight_grad: Tensor | None, bias_grad: Tensor | None) -> None:
        self.call = call
        self.stages = stages
        self.sum_dtype = accumulate_dtype(call.compute_dtype)
        self.value_dtype = _value_dtype(call)
        num_rows, vocab_size = call.hidden.shape[0], call.weight.shape[0]
        is_counted = call.target != call.options.ignore_index
        self.is_bad = is_counted & ((call.target < 0) | (call.target >= vocab_size))
        self.is_counted = is_counted & ~self.is_bad
        if not call.hidden.is_cuda:
            # Looking costs a synchronisation on a GPU: there the loss becomes NaN instead, and the stats say why.
            _checks.targets_in_range(self.is_bad, call.target, vocab_size, call.options.ignore_index)
        self.target = torch.where(self.is_counted, call.target, 0).long()
        self.scale = torch.where(self.is_counted, call.row_weight, 0).to(self.sum_dtype)
        self.weight = call.weight.to(call.compute_dtype)
        self.bias = None if call.bias is None else call.bias.to(self.sum_dtype)
        self.weight_grad = self._accumulator(weight_grad, call.weight.shape, call.need_weight)
        self.bias_grad = self._accumulator(bias_grad, (vocab_size,), call.need_bias)
        self.feedback = _feedback_like(call.hidden) if call.need_hidden else None
        self.prepared = call.rule.prepare(self._measure_anchors(), self.value_dtype) if call.need_hidden else ()
        rows = call.hidden.new_zeros(num_rows, dtype=self.sum_dtype)
        self.loss, self.lse, self.log_prob = rows, rows.clone(), rows.clone()
        self.chunks = _chunks(call)
        self.buffer = call.hidden.new_empty(self._most_rows(), vocab_size, dtype=self.sum_dtype)
        self.entropy = rows.clone() if call.need_stats else rows.new_empty(0)
        self.argmax = self.target.clone() if call.need_stats else self.target.new_empty(0)

    def _most_rows(self) -> int:
        return max((rows.stop - rows.start for rows in self.chunks), default=0)

    def _accumulator(self, given: Tensor | None, shape: Sequence[int], is_needed: bool) -> Tensor | None:
        if not is_needed:
            return None
        return given if given is not None else self.call.hidden.new_zeros(shape, dtype=self.sum_dtype)

    def _clean_hidden(self, rows: slice | Tensor) -> Tensor:
        """Hidden states with ignored rows selected away: 0 times what an ignored row holds may be NaN."""
        hidden = torch.where(self.is_counted[rows, None], self.call.hidden[rows], 0)
        return hidden.to(self.call.compute_dtype)

    def _measure_anchors(self) -> Anchors | None:
        if self.call.anchor_rows is None:
            return None
        return measure(self._clean_hidden(self.call.anchor_rows), self.weight, self.is_counted[self.call.anchor_rows])

    def step(self, rows: slice) -> None:
        call = self.call
        hidden = self._clean_hidden(rows)
        logits = self.buffer[: rows.stop - rows.start]
        self.stages.logits(hidden, self.weight, self.bias, logits)
        result = self.stages.loss_and_error(
            logits,
            self.target[rows],
            call.options,
            bias=self.bias,
            need_error=call.need_error,
            need_logits=call.need_hidden and call.rule.needs_logits,
            need_stats=call.need_stats,
        )
        self._keep_rows(rows, result)
        if call.need_error:
            values = logits.to(self.value_dtype)
            self._add_grads(rows, hidden, values)
            self._add_feedback(rows, hidden, values, result)

    def _keep_rows(self, rows: slice, result: RowResult) -> None:
        self.loss[rows], self.lse[rows], self.log_prob[rows] = result.loss, result.lse, result.log_prob
        if self.call.need_stats:
            self.argmax[rows], self.entropy[rows] = result.argmax, result.entropy

    def _add_grads(self, rows: slice, hidden: Tensor, values: Tensor) -> None:
        scale = self.scale[rows]
        if self.weight_grad is not None:
            scaled = hidden.to(self.sum_dtype) * scale[:, None]
            self.stages.add_weight_grad(self.weight_grad, values, scaled)
        if self.bias_grad is not None:
            self.bias_grad += values.T.to(self.sum_dtype) @ scale

    def _add_feedback(self, rows: slice, hidden: Tensor, values: Tensor, result: RowResult) -> None:
        if self.feedback is None:
            return
        error = Error(values=values, scale=self.scale[rows], logit_product=result.logit_product)
        tokens = Tokens(
            hidden=hidden,
            target=self.target[rows],
            logits=result.raw,
            log_normaliser=result.lse,
            softcap=self.call.options.softcap,
            uniforms=None if self.call.uniforms is None else self.call.uniforms[rows],
        )
        feedback = self.stages.feedback(self.call.rule, error, tokens, self.prepared)
        self.feedback[rows] = feedback.to(self.feedback.dtype)

    def result(self) -> ExitResult:
        def masked(rows: Tensor) -> Tensor:
            return torch.where(self.is_counted, rows, 0) if rows.numel() else rows

        loss = torch.where(self.is_bad, torch.nan, masked(self.loss))
        return ExitResult(
            loss=loss,
            # The scale of a bad row is zero, and NaN stays NaN.
            weighted_loss=self.scale * loss,
            lse=masked(self.lse),
            log_prob=masked(self.log_prob),
            argmax=masked(self.argmax),
            entropy=masked(self.entropy),
            is_bad=self.is_bad,
            feedback=self.feedback,
            weight_grad=self.weight_grad,
            bias_grad=self.bias_grad,
        )


def measure(hidden: Tensor, weight: Tensor, is_counted: Tensor) -> Anchors:
    """Forward pairs of some tokens: hidden [M, D] (zero where not counted) and raw logits [M, V] without the bias."""
    return Anchors(hidden=hidden, logits=torch.mm(hidden, weight.T), count=is_counted.sum())
