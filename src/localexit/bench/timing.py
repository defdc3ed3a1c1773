"""Interleaved timing: every contender runs once a round, so that a disturbance hits all of them alike."""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_STAT = Path("/proc/stat")

Runs = Mapping[str, Callable[[], object]]
# Called with a line about what goes on.
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Times:
    """One contender: milliseconds, one entry a round, and how many cores other processes used meanwhile."""

    ms: tuple[float, ...]
    others: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """Median over the rounds, ms."""
        return statistics.median(self.ms)

    def ratio_to(self, other: Times) -> float:
        """Median over the rounds of `other / self`: above 1 where this one is faster."""
        return statistics.median(b / a for a, b in zip(self.ms, other.ms, strict=True))


class Timer(Protocol):
    """Times every run once a round, after one that warms up."""

    def __call__(self, runs: Runs, *, rounds: int, say: Say) -> dict[str, Times]:
        """Times by name."""


@dataclass(frozen=True, kw_only=True)
class CpuTimer:
    """Wall clock; another order each round.

    Attributes:
        patience: seconds in all to spend on waiting until no other process works, and on running again what was
            disturbed all the same.
        seed: of the order.
    """

    patience: float = 0.0
    seed: int = 0

    def __call__(self, runs: Runs, *, rounds: int, say: Say) -> dict[str, Times]:
        """Times by name, with what other processes did."""
        clock = _Clock(self.patience)
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        order = list(runs)
        shuffle = random.Random(self.seed).shuffle
        for run in runs.values():
            run()
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            shuffle(order)
            for name in order:
                measured[name].append(clock.time(runs[name]))
        return {
            name: Times(ms=tuple(1e3 * s for s, _ in pairs), others=tuple(round(o, 2) for _, o in pairs))
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


@dataclass(frozen=True, kw_only=True)
class StreamTimer:
    """Events on a GPU's stream.

    As in training, calls follow each other without waiting for the GPU, so that launching is hidden behind work; and
    each is timed after one of its own, so that all meet the GPU as warm as they make it.

    Attributes:
        event: makes an event that can `record()` and tell `elapsed_time(end)` in ms: `torch.cuda.Event`.
        synchronize: waits for the GPU.
    """

    event: Callable[[], Any]
    synchronize: Callable[[], None]

    def __call__(self, runs: Runs, *, rounds: int, say: Say) -> dict[str, Times]:
        """Times by name."""
        measured: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            pairs = {name: self._recorded(run) for name, run in runs.items()}
            self.synchronize()
            for name, (start, end) in pairs.items():
                measured[name].append(start.elapsed_time(end))
        return {name: Times(ms=tuple(ms)) for name, ms in measured.items()}

    def _recorded(self, run: Callable[[], object]) -> Sequence[Any]:
        run()
        start, end = self.event(), self.event()
        start.record()
        run()
        end.record()
        return start, end
