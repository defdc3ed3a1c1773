"""Peak resident memory of one call, in a process of its own."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from .plans import Case
from .prepare import Prepared, prepare
from .shapes import Shape

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_in_child(case: Case, name: str, *, threads: int) -> float | None:
    """MiB above inputs and gradients at the peak of one fp32 call, in a fresh process; None where it cannot be told."""
    if not (_STATUS.exists() and _CLEAR.exists()):
        return None
    # Spawned, not forked: a fork would inherit memory freed here that waits to be used again.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_of, case, name, threads).result()


def _peak_of(case: Case, name: str, threads: int) -> float:
    """The child's part: warm up, so that code and work space are there, then measure once."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message="the nucleus of some tokens")
    case = case.only(name)
    prepared = _prepare(case)
    contender, inputs = prepared.contenders[name], prepared.inputs
    if contender.is_compiled:
        # What compiling takes is not the call's.
        contender(inputs)
        inputs.clear()
    else:
        few = Shape(num_tokens=64, hidden_size=case.shape.hidden_size, vocab_size=case.shape.hidden_size)
        small = _prepare(case.resized(few))
        small.contenders[name](small.inputs)
    peak = peak_bytes(lambda: contender(inputs))
    gradients = 4 * (inputs.hidden.numel() + inputs.weight.numel())
    return (peak - gradients) / 2**20


def _prepare(case: Case) -> Prepared:
    return prepare(case, dtype=torch.float32, device=torch.device("cpu"))


def peak_bytes(run: Callable[[], object]) -> int:
    """How far the resident set rose above where it was before `run`.

    The kernel's own high-water mark: it misses no peak, however short, and counts what PyTorch's allocator, MKL's
    work space and its threads take. To be called in a fresh process, where no freed memory waits to be used again.
    """
    before = _status("VmRSS")
    # "5" resets the high-water mark to the present size; see proc(5).
    _CLEAR.write_text("5")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
