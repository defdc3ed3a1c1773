"""One cell is one training run of a comparison, one JSON object, one line of `cells.jsonl`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from localexit._files import parse_json, read_lines
from localexit.train.cache import written_atomically
from localexit.train.config import FREE_ON_RESUME, TrainConfig

FORMAT = 1
FILE_NAME = "cells.jsonl"
UNFINISHED_NAME = "unfinished"
# Settings that change times and no result.
_TIMED = frozenset({"compile", "cuda_graph"})
# What all methods of a model and budget are trained and validated on, and whether times compare.
_SHARED = frozenset({"vocab_size", "batch_size", "accumulate", "context", "eval_tokens"}) | _TIMED
# They change no result and may differ, but for those that change times.
_FREE = FREE_ON_RESUME - _TIMED | {"seed"}


class Key(NamedTuple):
    """What tells one cell from another: the model, the method as it is written, the seed, the optimiser steps."""

    model: str
    method: str
    seed: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Validation of all exits after some step.

    Attributes:
        step, tokens: optimiser steps and training tokens so far.
        loss: nats/token, first exit first.
    """

    step: int
    tokens: int
    loss: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one run measured, and where.

    Attributes:
        method: as written.
        config: of the run, as `TrainConfig.to_json()`.
        status: "finished", or "diverged": a loss or gradient was not finite.
        detail: why it diverged.
        valid: over training.
        diagnostics: per step, what `localexit.measure.diagnose` saw, as JSON.
        step_seconds: median time of a step, validations and diagnostics left out.
        wall_seconds: of the whole cell.
        flops_per_token: in matrix products, of a training step.
        exit_flops_per_token: the same of one exit, with the rule's own learning.
        peak_bytes: most GPU memory allocated; None on a CPU.
        feedback_bytes: codes and state of the rule.
        num_parameters: of the model.
        corpus: of the text, with its sha256.
        versions, device, commit: what ran, and on what.
        load_average: over one minute, before the first and after the last step: on a busy machine times say little.
    """

    method: str
    config: Mapping[str, Any]
    status: Literal["finished", "diverged"]
    detail: str = ""
    valid: tuple[Validation, ...]
    diagnostics: tuple[Mapping[str, Any], ...] = ()
    step_seconds: float
    wall_seconds: float
    flops_per_token: float
    exit_flops_per_token: float
    peak_bytes: int | None
    feedback_bytes: int
    num_parameters: int
    corpus: Mapping[str, Any]
    versions: Mapping[str, str]
    device: str
    commit: str
    load_average: tuple[float, float]

    @property
    def key(self) -> Key:
        """What tells it from others."""
        return Key(self.config["model"], self.method, self.config["seed"], self.config["steps"])

    @property
    def loss(self) -> tuple[float, ...]:
        """Last validation of every exit, nats/token; empty when it diverged."""
        return self.valid[-1].loss if self.status == "finished" else ()

    def to_json(self) -> str:
        """One line."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, line: bytes) -> Cell:
        """Inverse of `to_json`, of a line in UTF-8.

        Raises:
            ValueError: not a cell of this version.
        """
        try:
            content = parse_json(line)
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            content["valid"] = tuple(Validation(**{**v, "loss": tuple(v["loss"])}) for v in content["valid"])
            content["diagnostics"] = tuple(content["diagnostics"])
            content["load_average"] = tuple(content["load_average"])
            return cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"cells: expected a cell that this version of localexit wrote, got {line[:60]!r}… ({error})"
            ) from error


def differing_settings(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Fields that two configurations differ in; those aside that change neither result nor times, and the seed.

    What an earlier version had no field for counts as what that version did.
    """
    mine, theirs = (TrainConfig.from_json(config).to_json() for config in (mine, theirs))
    return sorted(name for name in mine.keys() - _FREE if mine[name] != theirs[name])


class CellFile:
    """`cells.jsonl` of a folder: every finished cell, rewritten whole for each new one.

    One process writes to a folder at a time; what several machines wrote in folders of their own is merged.

    Args:
        folder: made when the first cell is added.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self._cells = {cell.key: cell for cell in read_cells(self.path)} if self.path.is_file() else {}

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, in the order they were added."""
        return tuple(self._cells.values())

    def get(self, key: Key) -> Cell | None:
        """The cell of that key."""
        return self._cells.get(key)

    def add(self, cells: Iterable[Cell]) -> None:
        """Keep further cells; on disk when this returns.

        Raises:
            ValueError: another result for the same key is there already, or a cell was trained on another text.
        """
        cells = tuple(cells)
        check_one_text([*self._cells.values(), *cells])
        for cell in cells:
            known = self._cells.get(cell.key)
            if known is not None and known != cell:
                raise ValueError(
                    f"cells: expected one result for {_describe(cell.key)}, got two that differ; merge folders that "
                    f"hold different cells"
                )
            self._cells[cell.key] = cell
        with written_atomically(self.path) as partial:
            partial.write_text("".join(f"{cell.to_json()}\n" for cell in self.cells), encoding="utf-8")
        for cell in cells:
            shutil.rmtree(self.unfinished(cell.key), ignore_errors=True)

    def unfinished(self, key: Key) -> Path:
        """Folder for the state of a cell whose time was over before it was finished; gone when the cell is there."""
        digest = hashlib.sha256(repr(tuple(key)).encode()).hexdigest()
        return self.path.parent / UNFINISHED_NAME / digest[:16]


def _cell_of(line: bytes, path: Path, number: int) -> Cell:
    try:
        return Cell.from_json(line)
    except ValueError as error:
        raise ValueError(f"{error}, in line {number} of {str(path)!r}") from error


def read_cells(path: Path) -> list[Cell]:
    """The cells of a file, or of the `cells.jsonl` of a folder.

    Raises:
        ValueError: there is no such file, or a line is no cell.
    """
    path = path / FILE_NAME if path.is_dir() else path
    try:
        return [_cell_of(line, path, number) for number, line in read_lines(path)]
    except OSError as error:
        raise ValueError(
            f"cells: expected a {FILE_NAME} that `localexit compare` wrote, got {str(path)!r}: {error}"
        ) from error


def check_one_text(cells: Sequence[Cell]) -> None:
    """Refuse cells of different texts: their losses say nothing about each other.

    Raises:
        ValueError: there are such cells.
    """
    # The same text may be elsewhere on another machine.
    texts = {cell.corpus["sha256"]: cell.corpus["name"] for cell in cells}
    if len(texts) > 1:
        told = ", ".join(sorted(f"{name} (sha256 {sha256[:12]})" for sha256, name in texts.items()))
        raise ValueError(
            f"cells: expected one text for all, got {told}; keep the cells of each text in a folder of "
            f"their own (Python's standard library is another text in every version)"
        )


def check_one_setting(cells: Sequence[Cell]) -> None:
    """Refuse cells of one method, model and budget with different settings, and methods with different batches.

    Raises:
        ValueError: there are such cells.
    """
    first: dict[tuple[str, ...], Cell] = {}
    for cell in cells:
        model, method, _, steps = cell.key
        where = f"on {model!r} with {steps} steps"
        same_method = first.setdefault((where, method), cell)
        odd = differing_settings(same_method.config, cell.config)
        # A text is told by its sha256, not by where it is.
        _refuse(f"for {method!r} {where}", [name for name in odd if name != "data"])
        any_method = first.setdefault((where,), cell)
        odd = differing_settings(any_method.config, cell.config)
        _refuse(where, [name for name in odd if name in _SHARED])


def _refuse(what: str, odd: Sequence[str]) -> None:
    if odd:
        raise ValueError(
            f"cells: expected one setting {what}, got two that differ in {', '.join(odd)}; keep them in different "
            f"folders"
        )


def _describe(key: Key) -> str:
    return f"method {key.method!r} on {key.model!r}, seed {key.seed}, {key.steps} steps"
