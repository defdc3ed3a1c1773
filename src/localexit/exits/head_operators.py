"""The drop-in heads as a custom operator: exact logits forward, exact dW and the rule's feedback backward."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from localexit import _checks
from localexit.exits.loss import row_dot
from localexit.feedback.base import Error, Tokens, accumulate_dtype
from localexit.feedback.registry import from_spec


@torch.library.custom_op("localexit::exit_logits", mutates_args=())
def exit_logits(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    state: list[Tensor],
    gain: Tensor,
    rule: str,
    compute_dtype: torch.dtype,
) -> Tensor:
    """`hidden @ weight.T` in compute_dtype: [..., V]; the rule decides what reaches hidden back, times `gain`."""
    if not hidden.is_cuda:
        _checks.targets_in_range(target >= weight.shape[0], target, weight.shape[0])
    # The dtype is decided: an autocast region around the call must not change it.
    with torch.autocast(hidden.device.type, enabled=False):
        return hidden.to(compute_dtype) @ weight.to(compute_dtype).T


@exit_logits.register_fake
def _exit_logits_fake(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    state: list[Tensor],
    gain: Tensor,
    rule: str,
    compute_dtype: torch.dtype,
) -> Tensor:
    return hidden.new_empty((*hidden.shape[:-1], weight.shape[0]), dtype=compute_dtype)


@torch.library.custom_op("localexit::exit_logits_backward", mutates_args=())
def exit_logits_backward(
    grad_logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    logits: Tensor | None,
    state: list[Tensor],
    gain: Tensor,
    rule: str,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Feedback and dW for the error grad_logits [..., V]; what is not needed is empty. Sums in fp32, no autocast."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        dtype = accumulate_dtype(torch.promote_types(hidden.dtype, weight.dtype))
        values = grad_logits.reshape(-1, weight.shape[0]).to(dtype)
        rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        feedback = hidden.new_empty(0)
        if need_hidden:
            flat_logits = None if logits is None else logits.reshape(values.shape).to(dtype)
            flat = _feedback(values, rows, target.reshape(-1), flat_logits, state, rule)
            feedback = (gain * flat).to(hidden.dtype).reshape(hidden.shape)
        weight_grad = (values.T @ rows).to(weight.dtype) if need_weight else weight.new_empty(0)
        return feedback, weight_grad


def _feedback(
    values: Tensor, rows: Tensor, target: Tensor, logits: Tensor | None, state: list[Tensor], spec: str
) -> Tensor:
    rule = from_spec(spec, state)
    product = None if logits is None else row_dot(values, logits)
    error = Error(values=values, scale=values.new_ones(values.shape[0]), logit_product=product)
    tokens = Tokens(
        hidden=rows,
        # Negative targets are ignored rows; one beyond the vocabulary was an error on the CPU.
        target=target.long().clamp(0, values.shape[1] - 1),
        logits=logits,
        log_normaliser=None if logits is None else logits.logsumexp(1),
    )
    feedback: Tensor = rule(error, tokens, rule.prepare(None, values.dtype))
    return feedback


@exit_logits_backward.register_fake
def _exit_logits_backward_fake(
    grad_logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    logits: Tensor | None,
    state: list[Tensor],
    gain: Tensor,
    rule: str,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    def like(tensor: Tensor, is_needed: bool) -> Tensor:
        return tensor.new_empty(tensor.shape if is_needed else 0)

    return like(hidden, need_hidden), like(weight, need_weight)


def _refuse_double_backward(ctx: Any, *upstream: Tensor) -> NoReturn:
    raise RuntimeError(
        "an exit head cannot be differentiated twice: its feedback is not a derivative of the loss; take gradient "
        "penalties on another path, or detach the first gradient"
    )


exit_logits_backward.register_autograd(_refuse_double_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, target, state, gain, ctx.rule, _ = inputs
    # The logits are kept only for a rule that reads them; saved properly, so that editing them in place is an error.
    logits = output if from_spec(ctx.rule, state).needs_logits else None
    ctx.save_for_backward(hidden, weight, target, gain, logits, *state)


def _backward(ctx: Any, grad_logits: Tensor) -> tuple[Any, ...]:
    hidden, weight, target, gain, logits, *state = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    feedback, weight_grad = exit_logits_backward(
        grad_logits, hidden, weight, target, logits, state, gain, ctx.rule, need_hidden, need_weight
    )
    return (
        feedback if need_hidden else None,
        weight_grad if need_weight else None,
        None,
        [None] * len(state),
        None,
        None,
        None,
    )


exit_logits.register_autograd(_backward, setup_context=_setup_context)
