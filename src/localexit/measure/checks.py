"""One line of an audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing an audit looked at.

    Attributes:
        name: what must hold.
        measured: what was seen.
        expected: what had to be seen.
        passed: whether it was.
    """

    name: str
    measured: str
    expected: str
    passed: bool


def table(checks: Sequence[Check]) -> str:
    """The checks as a plain table, one line each."""
    heading = ("", "check", "measured", "expected")
    rows = [("ok" if c.passed else "FAILED", c.name, c.measured, c.expected) for c in checks]
    widths = [max(len(row[column]) for row in [heading, *rows]) for column in range(4)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in [heading, *rows])
    return "\n".join(line.rstrip() for line in lines)
