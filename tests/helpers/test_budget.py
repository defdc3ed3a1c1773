"""The tolerance helpers notice what they are there to notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers.budget import assert_close, assert_within_budget, relative_error

LOW = (torch.float32, torch.bfloat16, torch.float16)


def scaled(tensor: Tensor) -> Tensor:
    return 0.95 * tensor


def dropped_row(tensor: Tensor) -> Tensor:
    return tensor.index_fill(0, torch.tensor([5]), 0.0)


def wrong_sign(tensor: Tensor) -> Tensor:
    return -tensor


def wrong_sign_of_one_row(tensor: Tensor) -> Tensor:
    return torch.cat([tensor[:5], -tensor[5:6], tensor[6:]])


def swapped_rows(tensor: Tensor) -> Tensor:
    return torch.cat([tensor[1:2], tensor[:1], tensor[2:]])


def noise_where_zero(tensor: Tensor) -> Tensor:
    return tensor.index_fill(0, torch.tensor([0]), 1e-6)


MUTANTS = (scaled, dropped_row, wrong_sign, wrong_sign_of_one_row, swapped_rows)


def product(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix product in a dtype, and the exact one of the same numbers."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(33, 33, generator=generator).to(dtype) for _ in range(2))
    return a @ b, a.double() @ b.double()


@pytest.mark.parametrize("dtype", LOW)
def test_the_plain_result_is_within_its_own_budget(dtype: torch.dtype) -> None:
    plain, exact = product(dtype)
    assert_within_budget(plain, plain, exact)
    assert 0 < relative_error(plain, exact) < torch.finfo(dtype).eps * 4


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_outside_the_budget(mutant: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    plain, exact = product(dtype)
    with pytest.raises(AssertionError, match="off by"):
        assert_within_budget(mutant(plain), plain, exact)


def test_one_percent_is_outside_the_budget_in_fp32() -> None:
    plain, exact = product(torch.float32)
    with pytest.raises(AssertionError):
        assert_within_budget(0.99 * plain, plain, exact)


def test_a_row_that_must_be_zero_is_checked_exactly() -> None:
    plain, exact = (tensor.index_fill(0, torch.tensor([0]), 0.0) for tensor in product(torch.bfloat16))
    assert_within_budget(plain, plain, exact)
    with pytest.raises(AssertionError, match="not zero"):
        assert_within_budget(noise_where_zero(plain), plain, exact)


def test_nan_is_outside_every_tolerance() -> None:
    plain, exact = product(torch.float32)
    broken = plain.index_fill(0, torch.tensor([3]), torch.nan)
    with pytest.raises(AssertionError):
        assert_within_budget(broken, plain, exact)
    with pytest.raises(AssertionError):
        assert_close(broken, exact)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_assert_close_notices_a_mutant(mutant: Callable[[Tensor], Tensor]) -> None:
    _, exact = product(torch.float32)
    assert_close(exact * (1 + 1e-12), exact)
    with pytest.raises(AssertionError):
        assert_close(mutant(exact), exact)


def test_assert_close_wants_zeros_where_all_is_zero() -> None:
    assert_close(torch.zeros(3), torch.zeros(3))
    with pytest.raises(AssertionError):
        assert_close(torch.full((3,), 1e-300, dtype=torch.float64), torch.zeros(3))
