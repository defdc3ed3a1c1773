"""The committed cells: a file a setting, and a setting is of one text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from localexit.compare.cells import Cell, read_cells
from localexit.compare.methods import Method
from localexit.compare.results import Group, Row, groups

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NOT_RUN = "Not run."
# Settings of a method that say what exits there are, and where: these have a table of their own.
STRUCTURE = frozenset({"exits", "exit_norm", "exit_body", "exit_weights"})


def cells_of(setting: str) -> list[Cell]:
    """The cells of a setting; none when there is no file. Several settings are joined by `+`."""
    files = [RESULTS / f"{name}.jsonl" for name in setting.split("+")]
    return [cell for path in files if path.is_file() for cell in read_cells(path)]


def group_of(setting: str, model: str, steps: int) -> Group | None:
    """All methods on one model with one budget.

    Raises:
        ValueError: the setting's cells are of different texts.
    """
    return next((g for g in groups(cells_of(setting)) if (g.model, g.steps) == (model, steps)), None)


def plain_group(setting: str, model: str, steps: int) -> Group | None:
    """The same without methods whose exits are of another kind or in other places."""
    group = group_of(setting, model, steps)
    return None if group is None else replace(group, rows=tuple(row for row in group.rows if not has_structure(row)))


def row_of(setting: str, model: str, steps: int, method: str) -> Row | None:
    """One method of a group, as it is written."""
    group = group_of(setting, model, steps)
    return next((row for row in group.rows if row.method == method), None) if group else None


def has_structure(row: Row) -> bool:
    """Whether the method's exits are of another kind, in other places, or weighed."""
    return not STRUCTURE.isdisjoint(dict(Method.parse(row.method).settings))
