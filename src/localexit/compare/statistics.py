"""How sure a difference is: paired by seed, with Student's t. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
Verdict = Literal["above", "below", "unresolved"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        mean: the estimate.
        low, high: ends of the interval; infinite when one value cannot say how much values vary.
        num_values: how many it is made of.
    """

    mean: float
    low: float
    high: float
    num_values: int

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        return (self.high - self.low) / 2

    def against(self, limit: float = 0.0) -> Verdict:
        """On which side of a limit the whole interval lies."""
        if self.low > limit:
            return "above"
        return "below" if self.high < limit else "unresolved"


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Mean and t-interval of independent values.

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("values: expected at least one, got none; leave out what was not measured")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Estimate(mean=mean, low=-math.inf, high=math.inf, num_values=1)
    margin = float(stats.sem(values) * stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1))
    return Estimate(mean=mean, low=mean - margin, high=mean + margin, num_values=len(values))


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Mean of `ours - theirs` over the seeds that both have; None if there is no such seed.

    Text, initialisation and order of tokens depend on the seed alone: pairing takes their part out of the difference.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    return mean_estimate([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


def log_slope(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Exponent b of the power law y ∝ x^b by least squares of the logarithms, with its t-interval.

    Raises:
        ValueError: fewer than two different x.
    """
    if len(set(x)) < 2:
        raise ValueError(f"x: expected at least two different values, got {list(x)}; a line needs two points")
    fit = stats.linregress(np.log(x), np.log(y))
    if len(x) == 2:
        return Estimate(mean=float(fit.slope), low=-math.inf, high=math.inf, num_values=2)
    margin = float(fit.stderr * stats.t.ppf(0.5 + CONFIDENCE / 2, len(x) - 2))
    return Estimate(mean=float(fit.slope), low=fit.slope - margin, high=fit.slope + margin, num_values=len(x))
