"""Rounding that keeps small changes: up or down at random, so that the mean of the result is the exact number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from localexit.feedback.draws import derive_seed

_FP32_MANTISSA = 23


def rounding_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """The random numbers of one optimiser step's rounding: a pure function of (seed, step) on a kind of device."""
    return torch.Generator(device).manual_seed(rounding_seed(seed, step))


def rounding_seed(seed: int, step: int) -> int:
    """The seed of one optimiser step's rounding, in 0..2^31 - 1."""
    return derive_seed(seed, f"rounding/{step}") % 2**31


def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """`values` in a dtype with fewer bits, rounded up with the probability of the distance from the number below.

    A change of a tenth of a step then moves one number in ten by a step; rounding to nearest would lose it.

    Args:
        values: fp32; overwritten.
        dtype: bf16 or fp16. Below its smallest normal number rounding is to nearest.
        generator: on the device of `values`.
    """
    dropped = _FP32_MANTISSA + round(math.log2(torch.finfo(dtype).eps))
    noise = torch.randint(1 << dropped, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    # A carry out of the dropped bits is the step up, also into the exponent.
    values.view(torch.int32).add_(noise).bitwise_and_(-(1 << dropped))
    return values.to(dtype)
