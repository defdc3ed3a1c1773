"""Means, intervals and slopes against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from localexit.compare.statistics import log_slope, mean_estimate, paired_difference


def test_interval_of_three_values() -> None:
    """Mean 2, standard deviation 1, t(2, 97.5 %) = 4.302653: the margin is 4.302653 / √3."""
    estimate = mean_estimate([1.0, 2.0, 3.0])
    assert estimate.mean == 2.0
    assert estimate.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert (estimate.low, estimate.high) == (
        pytest.approx(2 - estimate.half_width),
        pytest.approx(2 + estimate.half_width),
    )


def test_one_value_resolves_nothing() -> None:
    estimate = mean_estimate([5.0])
    assert (estimate.mean, estimate.low, estimate.high) == (5.0, -math.inf, math.inf)
    assert estimate.against() == "unresolved"
    with pytest.raises(ValueError, match="at least one, got none"):
        mean_estimate([])


def test_which_side_of_a_limit() -> None:
    estimate = mean_estimate([0.9, 1.0, 1.1])
    assert estimate.half_width == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    sides = [estimate.against(limit) for limit in (0.0, 0.76, 1.0, 1.24, 1.26)]
    assert sides == ["above", "unresolved", "unresolved", "unresolved", "below"]


def test_differences_are_paired_by_seed() -> None:
    """Seeds differ by a whole nat, the methods by 0.1 in every one: unpaired, nothing would be resolved."""
    estimate = paired_difference({0: 4.1, 1: 5.1, 2: 6.1, 3: 9.0}, {2: 6.0, 1: 5.0, 0: 4.0})
    assert estimate is not None
    assert estimate.num_values == 3
    assert estimate.mean == pytest.approx(0.1)
    assert estimate.half_width == pytest.approx(0.0, abs=1e-12)
    assert estimate.against() == "above"
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_slope_of_a_power_law() -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    exact = log_slope(x, [3 * value**-0.5 for value in x])
    assert exact.mean == pytest.approx(-0.5)
    assert exact.half_width == pytest.approx(0.0, abs=1e-9)


def test_interval_of_a_slope() -> None:
    """ln x = 0, 1, 2, ln y = 0, 1.3, 2: slope 1, residuals -0.1, 0.2, -0.1, stderr √(0.06 / 1 / 2), t(1) = 12.7062."""
    estimate = log_slope([1.0, math.e, math.e**2], [1.0, math.e**1.3, math.e**2])
    assert estimate.mean == pytest.approx(1.0)
    assert estimate.half_width == pytest.approx(12.7062 * math.sqrt(0.06 / 2), rel=1e-5)
    assert log_slope([1.0, 2.0], [1.0, 4.0]).high == math.inf
    with pytest.raises(ValueError, match="at least two different values"):
        log_slope([2.0, 2.0], [1.0, 3.0])
