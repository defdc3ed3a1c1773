"""The two kinds of machine: which dtype is measured there, how time passes, and what memory is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .memory import peak_in_child
from .plans import Case
from .shapes import SHAPES
from .timing import CpuTimer, StreamTimer, Timer


@dataclass(frozen=True, kw_only=True)
class Platform:
    """What measuring needs to know of a machine.

    Attributes:
        device: where the inputs are.
        dtype: of hidden states and unembedding.
        exact_dtype: of the truth: precise enough to judge `dtype`.
        rounds: how often everything is timed unless told otherwise.
        shapes: what is measured unless told otherwise.
        numerics_shape: where errors are measured unless told otherwise: the oracle's whole logits in fp64 must fit.
        timer: times interleaved runs.
        peak_mib: MiB at the peak of a call above what was there before it, or None where that cannot be told. Gets the
            case, the contender's name, and the call in this process.
        release: hands memory back that nobody uses.
    """

    device: torch.device
    dtype: torch.dtype
    exact_dtype: torch.dtype
    rounds: int
    shapes: tuple[str, ...]
    numerics_shape: str
    timer: Timer
    peak_mib: Callable[[Case, str, Callable[[], object]], float | None]
    release: Callable[[], None]


def cpu(*, threads: int, patience: float = 0.0) -> Platform:
    """A CPU: fp32, a wall clock, and the peak of a process of its own for each contender."""
    torch.set_num_threads(threads)
    return Platform(
        device=torch.device("cpu"),
        dtype=torch.float32,
        exact_dtype=torch.float64,
        rounds=7,
        shapes=("cpu",),
        numerics_shape="64x256x1000",
        timer=CpuTimer(patience=patience),
        peak_mib=partial(_peak_of_process, threads),
        release=lambda: None,
    )


def cuda() -> Platform:
    """One CUDA device: bf16, events, and the allocator's own count.

    Raises:
        ValueError: there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError("cpu: expected a CUDA device, got none that torch can use here; pass --cpu")
    return Platform(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        exact_dtype=torch.float32,
        rounds=5,
        shapes=tuple(name for name in SHAPES if name != "cpu"),
        numerics_shape="512x512x16384",
        timer=StreamTimer(event=partial(torch.cuda.Event, enable_timing=True), synchronize=torch.cuda.synchronize),
        peak_mib=_peak_of_allocator,
        release=torch.cuda.empty_cache,
    )


def _peak_of_process(threads: int, case: Case, name: str, _: Callable[[], object]) -> float | None:
    return peak_in_child(case, name, threads=threads)


def _peak_of_allocator(_: Case, __: str, run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
