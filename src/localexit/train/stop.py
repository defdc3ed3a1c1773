"""Ending a run on request: Ctrl-C finishes the step in hand and saves."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

# `timeout` and job schedulers signal a process and its group: one request may come several times.
_SAME_REQUEST_SECONDS = 1.0


@dataclass(kw_only=True)
class StopRequest:
    """Whether somebody asked for the end.

    Attributes:
        signal_number: what asked; None as long as nobody did.
    """

    signal_number: int | None = None
    _asked_at: float = field(default=0.0, init=False)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the first Ctrl-C (or SIGTERM) as a request; one that comes a second later or more ends at once."""
        try:
            before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            # Not the main thread: signals are somebody else's.
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal_number is None:
            self.signal_number, self._asked_at = number, now
        elif now - self._asked_at >= _SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt
