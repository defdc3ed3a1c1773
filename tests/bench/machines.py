"""A machine as the benchmark sees it, small and without a GPU: bf16, events, an allocator that counts."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from localexit.bench.plans import Case
from localexit.bench.platforms import Platform
from localexit.bench.timing import StreamTimer


class Event:
    """What `torch.cuda.Event` can do, by the wall clock."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


def gpu_like() -> Platform:
    """All that `platforms.cuda()` is, on the CPU."""

    def peak_mib(case: Case, name: str, run: Callable[[], object]) -> float:
        run()
        return float(len(name))

    return Platform(
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        exact_dtype=torch.float32,
        rounds=5,
        shapes=("32x48x301",),
        numerics_shape="16x32x200",
        timer=StreamTimer(event=Event, synchronize=lambda: None),
        peak_mib=peak_mib,
        release=lambda: None,
    )


def quiet(line: str) -> None:
    """Progress that nobody reads."""
