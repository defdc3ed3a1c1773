"""Ending a run on request: Ctrl-C finishes the step in hand and saves."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass(kw_only=True)
class StopRequest:
    """Whether somebody asked for the end.

    Attributes:
        signal_number: what asked; None as long as nobody did.
    """

    signal_number: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the first Ctrl-C (or SIGTERM) as a request; a second one ends at once."""
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
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number
