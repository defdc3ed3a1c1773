"""The command `localexit` in a test: in this process, or in one of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localexit import cli


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that is refused."""
    assert cli.run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("localexit: ")
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    return printed.err


def environment(**changes: str) -> dict[str, str]:
    """Of a process of its own: these sources and tests, one thread."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests.parent / "src"), str(tests), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changes}
