"""Long curves become short without lying, and labels do not overlap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localexit.report.curves import binned, binned_columns, last_finite, spread, thinned

NAN = float("nan")


def test_short_curves_are_not_touched():
    x, values = np.arange(5), np.arange(10.0).reshape(5, 2)
    for short_x, short_values in (binned(x, values, reduce="mean"), thinned(x, values)):
        np.testing.assert_array_equal(short_x, x)
        np.testing.assert_array_equal(short_values, values)


def test_bins_hold_the_mean_or_the_maximum():
    x, values = np.arange(1, 7), np.array([[1.0], [3.0], [5.0], [7.0], [9.0], [20.0]])
    bin_x, means = binned(x, values, reduce="mean", limit=3)
    _, highest = binned(x, values, reduce="max", limit=3)
    assert bin_x.tolist() == [2, 4, 6]
    assert means.ravel().tolist() == [2.0, 6.0, 14.5]
    assert highest.ravel().tolist() == [3.0, 7.0, 20.0]


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_what_is_not_finite_does_not_spread_to_its_neighbours(reduce):
    values = np.array([[1.0], [NAN], [np.inf], [-np.inf], [5.0], [5.0]])
    _, reduced = binned(np.arange(6), values, reduce=reduce, limit=3)
    np.testing.assert_array_equal(reduced.ravel(), [1.0, NAN, 5.0])


def test_a_curve_goes_on_where_only_others_have_a_number():
    values = np.array([[1.0, NAN], [NAN, 2.0], [NAN, NAN], [3.0, np.inf], [4.0, 5.0]])
    (first_x, first), (second_x, second) = binned_columns(np.arange(5), values, reduce="mean")
    assert first_x.tolist() == [0, 2, 3, 4]
    np.testing.assert_array_equal(first, [1.0, NAN, 3.0, 4.0])
    assert second_x.tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(second, [2.0, NAN, NAN, 5.0])
    assert binned_columns(np.arange(0), np.zeros((0, 2)), reduce="max")[1][1].shape == (0,)


def test_a_million_records_shrink_and_keep_their_end():
    x, values = np.arange(1_000_000), np.linspace(8, 3, 1_000_000)[:, None]
    bin_x, means = binned(x, values, reduce="mean")
    assert len(bin_x) == 400
    assert bin_x[-1] == x[-1]
    assert means[-1, 0] == pytest.approx(3, abs=0.02)


def test_thinning_keeps_first_and_last():
    x, values = thinned(np.arange(1000), np.arange(1000.0)[:, None], limit=7)
    assert len(x) == 7
    assert (x[0], x[-1]) == (0, 999)
    assert values[:, 0].tolist() == x.tolist()


def test_empty_curves_stay_empty():
    nothing = np.zeros(0, dtype=np.int64), np.zeros((0, 3))
    assert binned(*nothing, reduce="mean")[1].shape == (0, 3)
    assert thinned(*nothing)[1].shape == (0, 3)
    assert last_finite(np.zeros(0)) is None


def test_last_finite():
    assert last_finite(np.array([1.0, 2.0, NAN, np.inf])) == 1
    assert last_finite(np.array([NAN])) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.001, 0.3))
def test_spread_keeps_order_gap_and_bounds(positions, gap):
    moved = spread(positions, gap, 0.0, 1.0)
    allowed = min(gap, 1 / max(len(positions) - 1, 1))
    in_order = np.array(moved)[np.argsort(positions, kind="stable")]
    assert (np.diff(in_order) >= allowed - 1e-6).all()
    assert in_order.min() >= -1e-6
    assert in_order.max() <= 1 + 1e-6


@given(st.lists(st.integers(0, 10), min_size=1, max_size=11, unique=True))
def test_spread_leaves_what_is_apart(steps):
    positions = [step / 10 for step in steps]
    assert spread(positions, 0.099, 0.0, 1.0) == pytest.approx(positions)


def test_spread_moves_least():
    assert spread([0.5, 0.5], 0.2, 0.0, 1.0) == pytest.approx([0.4, 0.6])
    assert spread([0.0, 0.0], 0.2, 0.0, 1.0) == pytest.approx([0.0, 0.2])
