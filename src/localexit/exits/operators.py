"""The exit as a custom operator, so that compilation can neither lose nor replace the surrogate gradient.

`torch.compile(torch.func.grad(f))` over an `autograd.Function` drops a custom backward and returns the true gradient
(torch 2.13); over a `torch.library.custom_op` it does not. An operator takes tensors, numbers and text only: the rule
travels as its `spec()` and its tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from localexit.exits.backends import stages_of
from localexit.exits.chunked import ExitCall, ExitResult, LossCall, run_exit, storage_dtype
from localexit.exits.loss import LossOptions
from localexit.exits.tiled import add_tiled_grads
from localexit.feedback.base import accumulate_dtype
from localexit.feedback.registry import from_spec

# Uniforms, and anchors in two forms: what of a call's arguments was drawn for it.
_NUM_DRAWS = 4
# loss, row_loss, gold_logit, log_prob, argmax, entropy, is_bad, feedback, weight_grad, bias_grad
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("localexit::exit_loss", mutates_args=())
def exit_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor,
    state: list[Tensor],
    uniforms: Tensor | None,
    anchor_rows: Tensor | None,
    anchor_hidden: Tensor | None,
    anchor_is_counted: Tensor | None,
    rule: str,
    compute_dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    chunk_bytes: int | None,
    is_summed: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    need_stats: bool,
    backend: str,
    preset: str,
    is_filtered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss of one exit and, when `is_summed`, the gradients of the sum, finished; see `ExitCall` for the arguments.

    With the preset "memory" dW and db are left to the backward, which makes them by vocabulary tiles.

    With `is_summed` the loss is `Σ row_weight · row_loss`; without, it is the vector of the products, and the
    gradients are left to the backward, which knows what reaches each token.

    Returns:
        loss, row_loss, gold_logit, log_prob, argmax, entropy, is_bad, feedback, weight_grad, bias_grad; what was not
        asked for is empty.
    """
    call = ExitCall(
        hidden=hidden,
        weight=weight,
        bias=bias,
        target=target,
        row_weight=row_weight,
        compute_dtype=compute_dtype,
        rule=from_spec(rule, state),
        uniforms=uniforms,
        anchor_rows=anchor_rows,
        anchor_hidden=anchor_hidden,
        anchor_is_counted=anchor_is_counted,
        options=LossOptions(ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap),
        chunk_bytes=chunk_bytes,
        need_hidden=need_hidden and is_summed,
        need_weight=need_weight and is_summed and preset == "fast",
        need_bias=need_bias and is_summed and preset == "fast",
        need_stats=need_stats,
        backend=backend,
        preset=preset,
        is_filtered=is_filtered,
        spare_bytes=weight.nbytes if need_weight and preset == "memory" else 0,
    )
    # The dtypes are decided: an autocast region around the call must not change the products inside.
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return _outputs(call, run_exit(call, stages=stages_of(backend)), is_summed)


def _outputs(call: ExitCall, result: ExitResult, is_summed: bool) -> _Outputs:
    empty = call.hidden.new_empty(0)

    def stored(grad: Tensor | None, dtype: torch.dtype) -> Tensor:
        return empty.clone() if grad is None else grad.to(storage_dtype(dtype))

    bias_dtype = call.weight.dtype if call.bias is None else call.bias.dtype
    return (
        result.weighted_loss.sum() if is_summed else result.weighted_loss,
        result.loss,
        result.gold_logit,
        result.log_prob,
        result.argmax,
        result.entropy,
        result.is_bad,
        stored(result.feedback, call.hidden.dtype),
        stored(result.weight_grad, call.weight.dtype),
        stored(result.bias_grad, bias_dtype),
    )


@exit_loss.register_fake
def _exit_loss_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor,
    state: list[Tensor],
    uniforms: Tensor | None,
    anchor_rows: Tensor | None,
    anchor_hidden: Tensor | None,
    anchor_is_counted: Tensor | None,
    rule: str,
    compute_dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    chunk_bytes: int | None,
    is_summed: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    need_stats: bool,
    backend: str,
    preset: str,
    is_filtered: bool,
) -> _Outputs:
    dtype = accumulate_dtype(compute_dtype)
    num_rows = hidden.shape[0]

    def rows(is_needed: bool = True, kind: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(num_rows if is_needed else 0, dtype=kind)

    def like(tensor: Tensor | None, is_needed: bool) -> Tensor:
        if tensor is None or not (is_needed and is_summed):
            return hidden.new_empty(0)
        return tensor.new_empty(tensor.shape, dtype=storage_dtype(tensor.dtype))

    return (
        hidden.new_empty((), dtype=dtype) if is_summed else rows(),
        rows(),
        rows(),
        rows(),
        rows(need_stats, torch.int64),
        rows(need_stats),
        rows(kind=torch.bool),
        like(hidden, need_hidden),
        like(weight, need_weight and preset == "fast"),
        like(bias, need_bias and preset == "fast"),
    )


@torch.library.custom_op("localexit::scale_gradients", mutates_args=())
def scale_gradients(
    upstream: Tensor,
    feedback: Tensor,
    weight_grad: Tensor,
    bias_grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Finished gradients times the scalar upstream gradient, in the dtypes of what they are gradients of.

    hidden, weight and bias are here to be differentiated through: asking for that is an error, not a silent zero.
    """
    scaled = stages_of(backend).scaled
    bias_like = weight if bias is None else bias
    return (
        scaled(feedback, upstream, hidden.dtype),
        scaled(weight_grad, upstream, weight.dtype),
        scaled(bias_grad, upstream, bias_like.dtype),
    )


@scale_gradients.register_fake
def _scale_gradients_fake(
    upstream: Tensor,
    feedback: Tensor,
    weight_grad: Tensor,
    bias_grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    bias_like = weight if bias is None else bias
    return (
        feedback.new_empty(feedback.shape, dtype=hidden.dtype),
        weight_grad.new_empty(weight_grad.shape, dtype=weight.dtype),
        bias_grad.new_empty(bias_grad.shape, dtype=bias_like.dtype),
    )


def _refuse_double_backward(ctx: Any, *upstream: Tensor) -> NoReturn:
    raise RuntimeError(
        "an exit cannot be differentiated twice: its feedback is not a derivative of the loss; take gradient penalties "
        "on another path, or detach the first gradient"
    )


scale_gradients.register_autograd(_refuse_double_backward)


@torch.library.custom_op("localexit::tiled_gradients", mutates_args=())
def tiled_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor,
    gold_logit: Tensor,
    log_prob: Tensor,
    compute_dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients dW and db of the memory preset, finished; see `exits.tiled`. What is not needed is empty.

    The row weights include what comes from above.
    """
    options = LossOptions(ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap)
    call = LossCall(
        hidden=hidden,
        weight=weight,
        bias=bias,
        target=target,
        row_weight=row_weight,
        compute_dtype=compute_dtype,
        options=options,
    )
    stages = stages_of(backend)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        sums = accumulate_dtype(compute_dtype)
        # A tile's product is rounded once, to the gradient's dtype where that is the product's own.
        dtype = weight.dtype if weight.dtype == stages.value_dtype(call) else sums
        weight_grad = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        bias_grad = torch.zeros_like(weight[:, 0], dtype=sums) if need_bias else None
        add_tiled_grads(call, gold_logit, log_prob, stages, weight_grad=weight_grad, bias_grad=bias_grad)
    bias_dtype = weight.dtype if bias is None else bias.dtype
    return (
        hidden.new_empty(0) if weight_grad is None else weight_grad.to(weight.dtype),
        hidden.new_empty(0) if bias_grad is None else bias_grad.to(bias_dtype),
    )


@tiled_gradients.register_fake
def _tiled_gradients_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor,
    gold_logit: Tensor,
    log_prob: Tensor,
    compute_dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    bias_dtype = weight.dtype if bias is None else bias.dtype
    return (
        weight.new_empty(weight.shape) if need_weight else hidden.new_empty(0),
        weight.new_empty(weight.shape[0], dtype=bias_dtype) if need_bias else hidden.new_empty(0),
    )


tiled_gradients.register_autograd(_refuse_double_backward)


class _Settings(NamedTuple):
    """The operator's arguments after the draws, in their order."""

    rule: str
    compute_dtype: torch.dtype
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    chunk_bytes: int | None
    is_summed: bool
    need_hidden: bool
    need_weight: bool
    need_bias: bool
    need_stats: bool
    backend: str
    preset: str
    is_filtered: bool


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    hidden, weight, bias, target, row_weight, state, *draws_and_rest = inputs
    draws, rest = draws_and_rest[:_NUM_DRAWS], draws_and_rest[_NUM_DRAWS:]
    _, row_loss, gold_logit, log_prob, _, _, _, *grads = output
    ctx.mark_non_differentiable(*output[1:])
    # Else the backward is handed a zero for every output without a gradient, one of them as large as the weight.
    ctx.set_materialize_grads(False)
    ctx.num_state = len(state)
    ctx.settings = _Settings(*rest)
    again = grads if ctx.settings.is_summed else (*draws, *state)
    ctx.save_for_backward(hidden, weight, bias, target, row_weight, row_loss, gold_logit, log_prob, *again)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
    settings: _Settings = ctx.settings
    nothing = (None,) * (_NUM_DRAWS + len(settings))
    if upstream is None:
        return (None, None, None, None, None, [None] * ctx.num_state, *nothing)
    hidden, weight, bias, target, row_weight, row_loss, gold_logit, log_prob, *again = ctx.saved_tensors
    if settings.is_summed:
        grads = scale_gradients(upstream, *again, hidden, weight, bias, settings.backend)
    else:
        grads = _recompute(ctx, hidden, weight, bias, target, upstream * row_weight, again)
    hidden_grad, weight_grad, bias_grad = grads
    if settings.preset == "memory" and (settings.need_weight or settings.need_bias):
        weight_grad, bias_grad = tiled_gradients(
            hidden,
            weight,
            bias,
            target,
            upstream * row_weight,
            gold_logit,
            log_prob,
            settings.compute_dtype,
            settings.ignore_index,
            settings.label_smoothing,
            settings.z_loss,
            settings.softcap,
            settings.need_weight,
            settings.need_bias,
            settings.backend,
        )
    return (
        hidden_grad if settings.need_hidden else None,
        weight_grad if settings.need_weight else None,
        bias_grad if settings.need_bias else None,
        None,
        upstream * row_loss if ctx.needs_input_grad[4] else None,
        [None] * ctx.num_state,
        *nothing,
    )


def _recompute(
    ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, row_weight: Tensor, again: list[Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for one upstream number a token: the exit once more, with that as the row weight."""
    draws, state = again[:_NUM_DRAWS], again[_NUM_DRAWS:]
    settings = ctx.settings._replace(is_summed=True)
    with torch.no_grad():
        outputs = exit_loss(hidden, weight, bias, target, row_weight, state, *draws, *settings)
    return scale_gradients(row_weight.new_ones(()), *outputs[7:], hidden, weight, bias, ctx.settings.backend)


exit_loss.register_autograd(_backward, setup_context=_setup_context)
