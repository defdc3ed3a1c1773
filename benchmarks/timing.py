"""Interleaved timing: every contender runs once a round, so that a disturbance hits all of them alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Times:
    """Wall-clock seconds of one contender, one entry a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio_to(self, other: Times) -> float:
        """Median over the rounds of `other / self`: above 1 where this one is faster."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def interleaved(runs: Mapping[str, Callable[[], object]], *, rounds: int, seed: int = 0) -> dict[str, Times]:
    """Time every run once a round, in another order each round, after a round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    shuffle = random.Random(seed).shuffle
    for number in range(rounds + 1):
        shuffle(order)
        for name in order:
            gc.collect()
            start = time.perf_counter()
            # The result is freed inside the measurement: handing its memory back is part of the cost.
            runs[name]()
            elapsed = time.perf_counter() - start
            if number > 0:
                seconds[name].append(elapsed)
    return {name: Times(seconds=tuple(values)) for name, values in seconds.items()}
