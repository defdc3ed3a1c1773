"""Every message a caller can get for bad input to the feedback rules and the exit: expected, got, remedy.

Those about numbers and names are in `_values.py`, which needs no torch, and are here as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from localexit._values import (
    choice,
    count,
    finite,
    fraction,
    integer,
    loss_options,
    non_negative,
    number,
    positive,
    rank,
    rank_exact,
    seed,
)

__all__ = [
    "FLOAT_DTYPES",
    "INDEX_DTYPES",
    "accumulator",
    "call_options",
    "choice",
    "compressor_error",
    "compressor_targets",
    "count",
    "feedback_fits",
    "finite",
    "floating",
    "fraction",
    "head_inputs",
    "integer",
    "loss_options",
    "non_negative",
    "num_items",
    "number",
    "positive",
    "rank",
    "rank_exact",
    "reverse_mode",
    "seed",
    "shapes",
    "targets_in_range",
    "token_weight",
]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int64, torch.int32)


def floating(name: str, tensor: Any) -> None:
    """`tensor` must be a floating-point tensor of a dtype the exit takes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {names}, got {tensor.dtype}; convert it with .to(...)")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}; convert it with .to_dense()")


def shapes(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    names: tuple[str, str, str] = ("input", "linear_weight", "target"),
) -> None:
    """Check hidden [..., D], weight [V, D], target [...], bias [V]; dtypes and devices that fit."""
    of, weight_name, target_name = names
    floating(of, hidden)
    floating(weight_name, weight)
    _same_device(weight_name, weight, hidden, of=of)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"{weight_name} must be [V, D] with V of at least 1, got shape {list(weight.shape)}; "
            f"pass nn.Linear.weight as it is"
        )
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{of} has shape {list(hidden.shape)} but {weight_name} is [V, D]={list(weight.shape)}: the last "
            f"dimension of {of} must be D={weight.shape[1]}; pass nn.Linear.weight as it is, not transposed"
        )
    _token_ids(target, hidden, name=target_name, of=of)
    if bias is not None:
        floating("linear_bias", bias)
        _same_device("linear_bias", bias, hidden, of=of)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"linear_bias must be [V]=[{weight.shape[0]}], got shape {list(bias.shape)}")


def _token_ids(target: Any, rows: Tensor, *, name: str, of: str) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"{name} must be a tensor of token ids, got {type(target).__name__}")
    if target.dtype not in INDEX_DTYPES:
        raise TypeError(
            f"{name} must hold token ids as int64 or int32, got {target.dtype}; convert it with .long() "
            f"(class probabilities are not supported)"
        )
    if target.shape != rows.shape[:-1]:
        raise ValueError(
            f"{name} has shape {list(target.shape)} but {of} is {list(rows.shape)}: expected {name} to have "
            f"the shape of {of} without the last dimension, {list(rows.shape[:-1])}"
        )
    _same_device(name, target, rows, of=of)


def _same_device(name: str, tensor: Tensor, other: Tensor, *, of: str) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device} but {of} is on {other.device}; move one of them with .to(device)"
        )


def token_weight(weight: Any, target: Tensor) -> None:
    """token_weight must be None or a floating-point tensor like target."""
    if weight is None:
        return
    floating("token_weight", weight)
    if weight.shape != target.shape:
        raise ValueError(
            f"token_weight has shape {list(weight.shape)}, expected target's shape {list(target.shape)}: "
            f"one weight a token"
        )
    if weight.device != target.device:
        raise ValueError(f"token_weight is on {weight.device} but target is on {target.device}; move one of them")


def call_options(ignore_index: Any, exit_index: Any, chunk_bytes: Any) -> None:
    """Options of a call that are not the loss's."""
    integer("ignore_index", ignore_index)
    count("exit_index", exit_index, minimum=0)
    if chunk_bytes is not None:
        count("chunk_bytes", chunk_bytes, minimum=1)


def can_filter(preset: str, label_smoothing: float) -> None:
    """weight_grad='filtered' needs the error of whole rows, and one that is small where the prediction is."""
    if preset != "fast":
        raise ValueError(
            f"weight_grad='filtered' goes with preset='fast', got preset={preset!r}; pass one of the two by its default"
        )
    if label_smoothing:
        raise ValueError(
            f"weight_grad='filtered' would drop the errors of label smoothing, which all tokens have, got "
            f"label_smoothing={label_smoothing}; pass weight_grad='exact'"
        )


def num_items(value: Any, reduction: str, hidden: Tensor) -> None:
    """num_items is the normaliser of reduction='mean' and of no other."""
    if value is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"num_items is the divisor of reduction='mean', got reduction={reduction!r}; leave one of them out"
        )
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"num_items must be a number or a 0-dim tensor, got shape {list(value.shape)}")
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"num_items must be a number of tokens, got a tensor of {value.dtype}")
        if value.device.type != "cpu":
            _same_device("num_items", value, hidden, of="input")
    elif not 0 < number("num_items", value, "a number of tokens or a 0-dim tensor") < math.inf:
        raise ValueError(f"num_items must be a positive number of tokens, got {value!r}")


def head_inputs(h: Tensor, shared_weight: Tensor, targets: Tensor, made_for: tuple[int, int]) -> None:
    """Arguments of a drop-in head that was made for [V, D]."""
    shapes(h, shared_weight, targets, names=("h", "shared_weight", "targets"))
    if tuple(shared_weight.shape) != made_for:
        raise ValueError(
            f"shared_weight is [V, D]={list(shared_weight.shape)} but the head was made for {list(made_for)}; build "
            f"the head with the unembedding's sizes"
        )


def compressor_error(grad_logits: Any, vocab_size: int) -> None:
    """An error [..., V] handed to a compressor."""
    floating("grad_logits", grad_logits)
    if grad_logits.dim() < 1 or grad_logits.shape[-1] != vocab_size:
        raise ValueError(
            f"grad_logits has shape {list(grad_logits.shape)} but the compressor was made for a vocabulary of "
            f"{vocab_size}: expected that as the last dimension"
        )


def compressor_targets(targets: Any, grad_logits: Tensor) -> None:
    """Targets [...] of an error handed to a compressor."""
    _token_ids(targets, grad_logits, name="targets", of="grad_logits")
    if not targets.is_cuda:
        vocab_size = grad_logits.shape[-1]
        targets_in_range(targets >= vocab_size, targets, vocab_size)


def feedback_fits(feedback: Any, hidden: Tensor, weight: Tensor) -> None:
    """The rule must be made for this unembedding, and live where it is used."""
    from localexit.feedback.base import Feedback

    if not isinstance(feedback, Feedback):
        raise TypeError(
            f"feedback must be a Feedback module, got {type(feedback).__name__}; build one with "
            f"localexit.make_feedback(name, hidden_size, vocab_size)"
        )
    vocab_size, hidden_size = weight.shape
    if (feedback.vocab_size, feedback.hidden_size) != (vocab_size, hidden_size):
        raise ValueError(
            f"feedback {feedback.name!r} was made for [V, D]=[{feedback.vocab_size}, {feedback.hidden_size}] but "
            f"linear_weight is [{vocab_size}, {hidden_size}]; build it with the unembedding's sizes"
        )
    if feedback.step.device != hidden.device:
        raise ValueError(
            f"feedback {feedback.name!r} is on {feedback.step.device} but input is on {hidden.device}; move it with "
            f"feedback.to(device), or an attached model as a whole: local.to(device)"
        )


def targets_in_range(is_bad: Tensor, target: Tensor, vocab_size: int, ignore_index: int = -100) -> None:
    """On the CPU, where looking is free: no target outside the vocabulary."""
    if bool(is_bad.any()):
        first = int(target[is_bad][0])
        raise ValueError(
            f"target has {int(is_bad.sum())} values outside 0..{vocab_size - 1}, the first is {first}; tokens to leave "
            f"out must have the value ignore_index={ignore_index}"
        )


def reverse_mode(**arguments: Tensor | None) -> None:
    """No argument may carry a forward-mode tangent: it would be lost without a word."""
    for name, tensor in arguments.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(
                f"{name} carries a forward-mode tangent (jvp, jacfwd), but an exit has gradients in reverse mode only; "
                f"use torch.autograd.grad or backward()"
            )


def accumulator(name: str, total: Any, shape: Sequence[int], dtype: torch.dtype, weight: Tensor) -> None:
    """An accumulator for a gradient: right shape, wide enough, on the weight's device."""
    if total is None:
        return
    if not isinstance(total, Tensor) or tuple(total.shape) != tuple(shape) or total.dtype != dtype:
        got = f"{list(total.shape)} {total.dtype}" if isinstance(total, Tensor) else type(total).__name__
        raise ValueError(f"{name} must be a {list(shape)} tensor of {dtype} to sum in, got {got}")
    _same_device(name, total, weight, of="linear_weight")


def process_group(name: str, group: Any) -> None:
    """A process group that this process is in; None is the default group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"{name}: expected an initialised torch.distributed, got none; start the script with torchrun and call "
            f"torch.distributed.init_process_group() first"
        )
    is_outside = group == dist.GroupMember.NON_GROUP_MEMBER
    if not (group is None or is_outside or isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"{name} must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    if is_outside or dist.get_rank(group) < 0:
        raise ValueError(f"{name}: this process (rank {dist.get_rank()}) is not in the group; pass one that it is in")
