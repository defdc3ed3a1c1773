"""A mirror's update against the exact one: residuals unrounded, corrections never a step away and right on average."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from localexit.feedback.ridge import apart_from_mean
from localexit.kernels.mirror import correct, residuals

NUM_SEEDS = 40


def make_case(vocab_size: int, width: int, num_pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, residual, back, and what the exact correction gives: corrections far smaller than a step of bf16."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(vocab_size, width, generator=generator).bfloat16()
    # fp32: the interpreter cannot multiply bf16.
    residual = 1e-3 * torch.randn(num_pairs, vocab_size, generator=generator)
    back = 0.1 * torch.randn(num_pairs, width, generator=generator)
    return rows, residual, back, rows.double() + residual.double().T @ back.double()


@pytest.mark.parametrize(("vocab_size", "width", "num_pairs"), [(1, 1, 1), (128, 64, 32), (200, 70, 45)])
def test_rounds_to_a_neighbour_and_is_exact_on_average(vocab_size: int, width: int, num_pairs: int) -> None:
    rows, residual, back, exact = make_case(vocab_size, width, num_pairs)
    step = exact.abs() * torch.finfo(torch.bfloat16).eps + 1e-30
    total = torch.zeros_like(exact)
    for seed in range(NUM_SEEDS):
        corrected = rows.clone()
        correct(corrected, residual, back, seed=1000 * seed)
        assert bool(((corrected.double() - exact).abs() <= step).all())
        total += corrected.double()
    # Where the number lies between two neighbours is uniform: a deviation of at most half a step a draw.
    deviation = ((total / NUM_SEEDS - exact) / step).abs()
    assert float(deviation.max()) < 5 * 0.5 / NUM_SEEDS**0.5
    # To the nearest, the corrections are lost: that is a step of the mirror that never learns.
    nearest = ((exact.bfloat16().double() - exact) / step).abs()
    assert vocab_size == 1 or float(deviation.mean()) < 0.5 * float(nearest.mean())


@pytest.mark.parametrize(("vocab_size", "width", "num_pairs"), [(1, 1, [1]), (128, 64, [64]), (200, 70, [7, 130, 9])])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_residuals_miss_nothing_of_the_hidden_states_or_rows(
    dtype: torch.dtype, vocab_size: int, width: int, num_pairs: list[int]
) -> None:
    """Logits nearly explained: what rounding takes from the hidden states is larger than what is left."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(vocab_size, width, generator=generator).to(dtype)
    hidden = 3 + 0.1 * torch.randn(sum(num_pairs), width, generator=generator)
    wrong = 1e-3 * torch.randn(len(hidden), vocab_size, generator=generator)
    logits = (hidden.double() @ rows.double().T + wrong).float()
    apart, in_fp64 = apart_from_mean(hidden), apart_from_mean(hidden.double())
    measured = in_fp64.logits(logits.double())
    exact = measured - in_fp64.hidden @ rows.double().T
    rounded = measured - apart.hidden.half().double() @ rows.double().T
    rows_rounded = measured - in_fp64.hidden @ rows.half().double().T
    for given in (logits, logits.T.contiguous().T):
        # fp16 in place of bf16, which the interpreter cannot multiply.
        error = residuals(rows, apart, given.split(num_pairs), terms=torch.float16).double() - exact
        # The sum's rounding in fp32, and the result's own.
        assert float(error.abs().max()) < 1e-5 * float(logits.abs().max()) + 1e-3 * float(exact.abs().max())
    if width > 1:
        missing = [rounded] if dtype == torch.float16 else [rounded, rows_rounded]
        assert all(float((each - exact).abs().max()) > 10 * float(error.abs().max()) for each in missing)


def test_the_roundings_of_one_update_are_independent() -> None:
    """Halfway between two numbers every one is rounded up as if a coin had been thrown for it."""
    rows = torch.ones(300, 200, dtype=torch.bfloat16)
    half_a_step = torch.finfo(torch.bfloat16).eps / 2
    correct(rows, torch.full((1, 300), half_a_step), torch.ones(1, 200), seed=3)
    up = (rows > 1).double() - 0.5
    for sums, num in ((up.sum(), up.numel()), (up.sum(0), 300), (up.sum(1), 200)):
        assert float(sums.abs().max()) < 4.5 * 0.5 * num**0.5
    # Also of neighbours, and of the corners of a rectangle.
    corners = up[:-1, :-1] * up[1:, 1:] * up[:-1, 1:] * up[1:, :-1] * 4
    for product in (up[1:] * up[:-1], up[:, 1:] * up[:, :-1], up[7:, 7:] * up[:-7, :-7], corners):
        assert float(product.sum().abs()) < 4.5 * 0.25 * product.numel() ** 0.5


def test_operands_may_lie_column_by_column() -> None:
    rows, residual, back, _ = make_case(128, 64, 32)
    expected, corrected = rows.clone(), rows.clone()
    correct(expected, residual, back, seed=1)
    correct(corrected, residual.T.contiguous().T, back.T.contiguous().T, seed=1)
    assert torch.equal(corrected, expected)


def test_the_seed_decides() -> None:
    rows, residual, back, _ = make_case(128, 64, 32)
    results = []
    for seed in (1, 1, 2):
        corrected = rows.clone()
        correct(corrected, residual, back, seed=seed)
        results.append(corrected)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
