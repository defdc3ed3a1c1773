"""What ends a run that has begun."""

from __future__ import annotations


class RunFailedError(RuntimeError):
    """A run that had to stop; its last checkpoint, if there is one yet, is whole."""


class NonFiniteError(RunFailedError):
    """A loss or a gradient that is NaN or infinite, found before the optimiser saw it."""
