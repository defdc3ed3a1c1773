"""Peak resident memory of one call, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def is_measurable() -> bool:
    """Linux counts a process's peak and lets it start the count anew."""
    return _STATUS.exists() and _CLEAR.exists()


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
