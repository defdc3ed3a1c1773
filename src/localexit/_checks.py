"""Every message a caller can get for bad input to the feedback rules and the exit: expected, got, remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int64, torch.int32)


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """`value` must be one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def count(name: str, value: Any, *, minimum: int) -> int:
    """An integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def non_negative(name: str, value: Any) -> float:
    """A finite number of at least 0."""
    if not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return float(value)


def fraction(name: str, value: Any) -> float:
    """A number in (0, 1]."""
    if not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}")
    return float(value)


def rank(value: int | None, hidden_size: int, name: str = "rank", *, default: int = 128) -> int:
    """A rank in 1..hidden_size; None means min(default, hidden_size)."""
    if value is None:
        return min(default, hidden_size)
    value = count(name, value, minimum=1)
    if value > hidden_size:
        raise ValueError(
            f"{name}={value} is larger than the hidden size {hidden_size}, but {name} orthonormal columns of length "
            f"{hidden_size} cannot exist beyond it; pass {name}={hidden_size} or less"
        )
    return value


def rank_exact(value: int | None, full_rank: int) -> int:
    """A rank for the exact part in 0..rank; None means a quarter of it."""
    if value is None:
        return full_rank // 4
    value = count("rank_exact", value, minimum=0)
    if value > full_rank:
        raise ValueError(
            f"rank_exact={value} is larger than rank={full_rank}, of which it is a part; pass rank_exact={full_rank} "
            f"or less, or a larger rank"
        )
    return value


def floating(name: str, tensor: Any) -> None:
    """`tensor` must be a floating-point tensor of a dtype the exit takes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {names}, got {tensor.dtype}; convert it with .to(...)")


def shapes(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    """Check hidden [..., D], weight [V, D], target [...], bias [V]; dtypes and devices that fit."""
    floating("input", hidden)
    floating("linear_weight", weight)
    _same_device("linear_weight", weight, hidden)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"linear_weight must be [V, D] with V of at least 1, got shape {list(weight.shape)}; "
            f"pass nn.Linear.weight as it is"
        )
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input has shape {list(hidden.shape)} but linear_weight is [V, D]={list(weight.shape)}: the last "
            f"dimension of input must be D={weight.shape[1]}; pass nn.Linear.weight as it is, not transposed"
        )
    _target(target, hidden)
    if bias is not None:
        floating("linear_bias", bias)
        _same_device("linear_bias", bias, hidden)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"linear_bias must be [V]=[{weight.shape[0]}], got shape {list(bias.shape)}")


def _target(target: Any, hidden: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor of token ids, got {type(target).__name__}")
    if target.dtype not in INDEX_DTYPES:
        raise TypeError(
            f"target must hold token ids as int64 or int32, got {target.dtype}; convert it with .long() "
            f"(class probabilities are not supported)"
        )
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target has shape {list(target.shape)} but input is {list(hidden.shape)}: expected target to have "
            f"input's shape without the last dimension, {list(hidden.shape[:-1])}"
        )
    _same_device("target", target, hidden)


def _same_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(
            f"{name} is on {tensor.device} but input is on {hidden.device}; move one of them with .to(device)"
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


def loss_options(reduction: Any, label_smoothing: Any, z_loss: Any, softcap: Any) -> None:
    """Options of the loss."""
    choice("reduction", reduction, ("mean", "sum", "none"))
    if not isinstance(label_smoothing, Real) or not 0 <= float(label_smoothing) < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}")
    non_negative("z_loss", z_loss)
    if softcap is not None and (not isinstance(softcap, Real) or not 0 < float(softcap) < math.inf):
        raise ValueError(f"softcap must be a positive number or None (no cap), got {softcap!r}")


def num_items(value: Any, reduction: str) -> None:
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
    elif not isinstance(value, Real) or not float(value) > 0:
        raise ValueError(f"num_items must be a positive number of tokens, got {value!r}")


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
            f"feedback.to(device)"
        )


def targets_in_range(is_bad: Tensor, target: Tensor, vocab_size: int, ignore_index: int) -> None:
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
    _same_device(name, total, weight)


def choose_backend(backend: str) -> str:
    """The backend that runs: "auto" chooses, a named one runs or raises its reason."""
    choice("backend", backend, ("auto", "torch", "triton"))
    if backend == "triton":
        raise ValueError("backend='triton' is not available in this version; pass backend='auto' or 'torch'")
    return "torch"
