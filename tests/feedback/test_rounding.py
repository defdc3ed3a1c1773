"""Stochastic rounding: right on average, to a neighbour, and repeatable."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from localexit.feedback.rounding import round_stochastically, rounding_generator, rounding_seed

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16]


def rounded(values: Tensor, dtype: torch.dtype, step: int = 0) -> Tensor:
    return round_stochastically(values.clone(), dtype, rounding_generator(0, step, CPU)).double()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("start", [1.0, -1.0, 0.0123, -1.9999])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_is_the_exact_number(dtype: torch.dtype, start: float, share: float) -> None:
    below = torch.tensor(start).to(dtype)
    above = torch.nextafter(below, below * math.inf)
    exact = torch.lerp(below.double(), above.double(), share).float()
    sample = rounded(exact.repeat(20_000), dtype)
    assert set(sample.tolist()) == {float(below), float(above)}
    share_above = float((sample == float(above)).double().mean())
    assert share_above == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 20_000))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_dtype_can_hold_stays(dtype: torch.dtype) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    assert torch.equal(rounded(values, dtype), values.double())
    assert torch.equal(rounded(torch.zeros(5), dtype), torch.zeros(5).double())


def test_repeats_for_a_step_and_differs_between_steps() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    first = rounded(values, torch.bfloat16)
    assert torch.equal(rounded(values, torch.bfloat16), first)
    assert not torch.equal(rounded(values, torch.bfloat16, step=1), first)


def test_the_seeds_of_steps_fill_31_bits() -> None:
    """What a kernel takes as a positive int32."""
    seeds = [rounding_seed(0, step) for step in range(200)]
    assert len(set(seeds)) == 200
    assert 2**30 < max(seeds) < 2**31
