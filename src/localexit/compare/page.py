"""Cells to one HTML page that needs nothing but itself; a pure function of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localexit.compare.cells import Cell
from localexit.compare.charts import budget_chart, group_charts, ladder_chart, styles_of
from localexit.compare.results import Group, Row, best_settings, budgets, groups, ladder
from localexit.compare.table import difference, seeds
from localexit.report.drawing import Chart
from localexit.report.page import environment, replace_file
from localexit.report.theme import Color

PAGE_NAME = "compare.html"


@dataclass(frozen=True, kw_only=True)
class RowView:
    """A row with what the page shows of it.

    Attributes:
        row: the numbers.
        color: of the method.
        to_exact, to_backprop, seeds: as text.
        diagnosis: the last one of its first diagnosed cell, or None.
    """

    row: Row
    color: Color
    to_exact: str
    to_backprop: str
    seeds: str
    diagnosis: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class GroupView:
    """One model and budget.

    Attributes:
        group: the numbers.
        rows: a line a method.
        num_exits: most exits that a method has.
        charts: its pictures.
    """

    group: Group
    rows: tuple[RowView, ...]
    num_exits: int
    charts: tuple[Chart, ...]


def write_page(cells: Sequence[Cell], folder: Path) -> Path:
    """Write `compare.html`, and its charts as PNG files to `plots/` beside it.

    Args:
        cells: of one comparison, at least one.
        folder: where to.

    Returns:
        The page's path.

    Raises:
        ValueError: cells were trained on different texts, or those of one row with different settings.
    """
    views = [_group_view(group) for group in groups(cells)]
    found = ladder(cells)
    overview = (
        *(() if found is None else (ladder_chart(found),)),
        *(chart for mine in budgets([view.group for view in views]) if (chart := budget_chart(mine)) is not None),
    )
    html = (
        environment("localexit.compare")
        .get_template("compare.html.jinja")
        .render(
            groups=views,
            overview=overview,
            best=best_settings(cells),
            num_cells=len(cells),
            settings=_settings(cells),
        )
    )
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for chart in (*overview, *(chart for view in views for chart in view.charts)):
        replace_file(plots / f"{chart.name}.png", chart.png())
    replace_file(folder / PAGE_NAME, html.encode())
    return folder / PAGE_NAME


def _group_view(group: Group) -> GroupView:
    styles = styles_of(group)
    return GroupView(
        group=group,
        rows=tuple(_row_view(row, styles[row.method][0]) for row in group.rows),
        num_exits=max((len(row.losses) for row in group.rows), default=0),
        charts=group_charts(group),
    )


def _row_view(row: Row, color: Color) -> RowView:
    diagnosed = [cell.diagnostics[-1] for cell in row.cells if cell.diagnostics]
    return RowView(
        row=row,
        color=color,
        to_exact=difference(row.to_exact),
        to_backprop=difference(row.to_backprop),
        seeds=seeds(row),
        diagnosis=dict(diagnosed[0]) if diagnosed else None,
    )


def _settings(cells: Sequence[Cell]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the cells have in common, and what they do not, as tables of names and values."""
    names = dict.fromkeys(name for cell in cells for name in cell.config)
    values = {name: _distinct(cell.config.get(name) for cell in cells) for name in names}
    machines = [
        ("device", _distinct(cell.device for cell in cells)),
        ("commit", _distinct(cell.commit for cell in cells)),
        *((name, _distinct(cell.versions.get(name) for cell in cells)) for name in cells[0].versions),
        ("text", _distinct(f"{cell.corpus['name']}, sha256 {cell.corpus['sha256']}" for cell in cells)),
        ("load average", f"{min(c.load_average[0] for c in cells)} to {max(c.load_average[1] for c in cells)}"),
    ]
    return [("training", list(values.items())), ("machine", machines)]


def _distinct(values: Any) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))
