"""Interleaved timing: every contender runs once a round, so that a disturbance hits all of them alike."""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")


@dataclass(frozen=True, kw_only=True)
class Times:
    """One contender: wall-clock seconds, one entry a round, and how many cores other processes used meanwhile."""

    seconds: tuple[float, ...]
    others: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio_to(self, other: Times) -> float:
        """Median over the rounds of `other / self`: above 1 where this one is faster."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, rounds: int, patience: float = 0.0, seed: int = 0
) -> dict[str, Times]:
    """Time every run once a round, in another order each round, after one that warms up.

    Args:
        runs: what to time, by name.
        rounds: entries a contender gets.
        patience: seconds in all to spend on waiting until no other process works, and on running again what was
            disturbed all the same.
        seed: of the order.
    """
    clock = _Clock(patience)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    order = list(runs)
    shuffle = random.Random(seed).shuffle
    for run in runs.values():
        run()
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            measured[name].append(clock.time(runs[name]))
    return {
        name: Times(seconds=tuple(s for s, _ in pairs), others=tuple(round(o, 2) for _, o in pairs))
        for name, pairs in measured.items()
    }


class _Clock:
    # Cores that other processes may use without disturbing a measurement.
    quiet = 0.1

    def __init__(self, patience: float) -> None:
        self.patience = patience

    def time(self, run: Callable[[], object]) -> tuple[float, float]:
        """Seconds and others' cores of one run: the least disturbed of as many as patience allows."""
        self._wait()
        best = _measure(run)
        while best[1] > self.quiet and self.patience > 0:
            self.patience -= best[0]
            self._wait()
            best = min(best, _measure(run), key=lambda pair: pair[1])
        return best

    def _wait(self) -> None:
        while self.patience > 0 and _measure(lambda: time.sleep(0.5))[1] > self.quiet:
            self.patience -= 0.5


def _measure(run: Callable[[], object]) -> tuple[float, float]:
    gc.collect()
    others, start = _others_seconds(), time.perf_counter()
    # The result is freed inside the measurement: handing its memory back is part of the cost.
    run()
    elapsed = time.perf_counter() - start
    return elapsed, (_others_seconds() - others) / elapsed


def _others_seconds() -> float:
    """CPU seconds spent on anything but this process since the machine started; 0 where the system does not tell."""
    if not _STAT.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, _STAT.read_text().split()[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return busy - own.user - own.system
