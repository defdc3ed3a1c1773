"""Running the command lines that pages show, as they stand, at a tiny size."""

from __future__ import annotations

import re
import shlex

from docs.pages import ROOT
from localexit import cli

# What makes a command small; the rest of the line is the page's.
TINY = {
    "train": "--steps 2 --warmup-steps 1 --batch-size 2 --context 16 --eval-tokens 64 --eval-every 2 "
    "--checkpoint-every 2 --sample-tokens 2 --threads 1 --device cpu --track none",
    "generate": "--max-new-tokens 3 --device cpu",
    "eval": "--tokens 64 --device cpu",
}
TINY_PRESET = "--model tiny --vocab-size 320"


def run_command(line: str) -> None:
    """Run a line of `localexit`, parse one of `torchrun`, check one of `make` or `pip` against the files it depends on.

    Raises:
        AssertionError: the command fails, or what it names does not exist.
    """
    program, *arguments = shlex.split(line)
    {"localexit": _localexit, "make": _make, "pip": _pip, "torchrun": _torchrun}[program](arguments)


def parse_command(line: str) -> None:
    """Parse a line of `localexit` without running it.

    Raises:
        ValueError: it is not one the command takes.
    """
    program, *arguments = shlex.split(line)
    assert program == "localexit"
    if arguments[-1] == "--help":
        arguments.pop()
    cli._parsed(arguments)


def _localexit(arguments: list[str]) -> None:
    tiny = TINY.get(arguments[0], "")
    if arguments[0] == "train" and "--model" not in arguments:
        tiny += f" {TINY_PRESET}"
    code = cli.run([*arguments, *tiny.split()])
    assert code == 0, f"localexit {shlex.join(arguments)} ended with {code}"


def _torchrun(arguments: list[str]) -> None:
    """Parsed only: starting processes takes long. `tests/train/test_torchrun.py` runs it."""
    if "-m" not in arguments:
        assert any((ROOT / argument).is_file() for argument in arguments)
        return
    place = arguments.index("-m")
    assert arguments[place + 1] == "localexit"
    cli._parsed(arguments[place + 2 :])


def _make(arguments: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(arguments) <= set(targets)


def _pip(arguments: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    command, what = arguments
    place, extras = re.fullmatch(r"([^[]+)(?:\[([\w,]+)\])?", what).groups()  # type: ignore[union-attr]
    assert (command, place) == ("install", ".")
    assert set((extras or "").split(",")) <= {"", *re.findall(r"^(\w+) = ", table, re.MULTILINE)}
