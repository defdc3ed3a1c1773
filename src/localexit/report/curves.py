"""Make long curves short before they are drawn, and keep labels at their ends apart. Arrays only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from .records import Floats, Ints

MAX_POINTS = 400
_MAX_DRAWN = 1e30


def binned(x: Ints, values: Floats, *, reduce: Literal["mean", "max"], limit: int = MAX_POINTS) -> tuple[Ints, Floats]:
    """Reduce x [T], values [T, C] to at most `limit` equal stretches: last x, mean or max of the values.

    What cannot be drawn is left out; a stretch of nothing else becomes NaN, a gap in the curve.
    """
    finite = gapped(values)
    if len(x) <= limit:
        return x, finite
    edges = np.linspace(0, len(x), limit + 1).astype(np.int64)
    last_x = x[edges[1:] - 1]
    if reduce == "max":
        return last_x, np.fmax.reduceat(finite, edges[:-1], axis=0)
    num_finite = np.add.reduceat(np.isfinite(finite), edges[:-1], axis=0, dtype=np.int64)
    sums = np.add.reduceat(np.nan_to_num(finite), edges[:-1], axis=0)
    return last_x, np.where(num_finite > 0, sums / np.maximum(num_finite, 1), np.nan)


def binned_columns(
    x: Ints, values: Floats, *, reduce: Literal["mean", "max"], limit: int = MAX_POINTS
) -> list[tuple[Ints, Floats]]:
    """`binned` for each column of values [T, C] by itself, without the records where it has no number and others have.

    An exit that sits a step out has no loss there: its curve goes on with the next one. A record without any number and
    an infinity stay gaps.
    """
    is_missing = np.isnan(values) & ~np.isnan(values).all(axis=1, keepdims=True)
    short = [
        binned(x[~missing], column[~missing, None], reduce=reduce, limit=limit)
        for column, missing in zip(values.T, is_missing.T, strict=True)
    ]
    return [(short_x, column[:, 0]) for short_x, column in short]


def thinned(x: Ints, values: Floats, *, limit: int = MAX_POINTS) -> tuple[Ints, Floats]:
    """Keep at most `limit` evenly spaced records of x [T], values [T, C], the first and the last included."""
    kept = np.unique(np.linspace(0, len(x) - 1, min(limit, len(x))).round().astype(np.int64))
    return x[kept], gapped(values[kept])


def gapped(values: Floats) -> Floats:
    """Put NaN, a gap, in place of what cannot be drawn: infinities, and numbers too large for an axis."""
    return np.where(np.abs(values) < _MAX_DRAWN, values, np.nan)


def last_finite(values: Floats) -> int | None:
    """Index of the last number in values [T] that is one; None if there is none."""
    (indices,) = np.nonzero(np.isfinite(values))
    return int(indices[-1]) if len(indices) else None


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move `positions` as little as possible (least squares) so that neighbours are `gap` apart.

    The result keeps their order and lies in [low, high]; where that is too narrow, the gap shrinks.

    >>> spread([0.5, 0.5, 0.9], gap=0.2, low=0.0, high=1.0)
    [0.4, 0.6, 0.9]
    """
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    gap = min(gap, (high - low) / max(len(positions) - 1, 1))
    # Without the gaps the order must not fall: isotonic regression by pooling adjacent violators.
    pools: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        mean, size = positions[index] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            other_mean, other_size = pools.pop()
            mean = (mean * size + other_mean * other_size) / (size + other_size)
            size += other_size
        pools.append((mean, size))
    highest = high - (len(positions) - 1) * gap
    levels = [min(max(mean, low), highest) for mean, size in pools for _ in range(size)]
    moved = [0.0] * len(positions)
    for rank, index in enumerate(order):
        moved[index] = round(levels[rank] + rank * gap, 9)
    return moved
