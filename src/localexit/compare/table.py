"""The table that `localexit compare` ends with."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from localexit.compare.results import Group, Row
from localexit.compare.statistics import Estimate
from localexit.report.text import count, number, signed

_HEADINGS = ("first exit", "last exit", "to exact local", "to backprop", "seeds", "ms/step")


def group_table(group: Group) -> Table:
    """One line a method; the page has more columns."""
    compiled = ", blocks compiled" if group.is_compiled else ""
    table = Table(
        title=Text(f"{group.model}, {count(group.steps)} steps, {count(group.tokens)} tokens{compiled}"),
        caption=Text(
            "nats/token of the validation text; differences of the last exit, paired by seed, with 95 % intervals; "
            "in brackets where the sign is not resolved"
        ),
        box=SIMPLE,
        padding=(0, 0, 0, 1),
    )
    table.add_column("method", overflow="fold", min_width=14)
    columns = dict(zip(_HEADINGS, zip(*map(_numbers, group.rows), strict=True), strict=True))
    # The cells of a sweep have nothing to be compared with.
    shown = {heading: numbers for heading, numbers in columns.items() if any(numbers)}
    for heading in shown:
        table.add_column(heading, justify="right")
    for row, *numbers in zip(group.rows, *shown.values(), strict=True):
        table.add_row(Text(row.method), *numbers)
    return table


def difference(estimate: Estimate | None) -> str:
    """A difference with half its interval; in brackets where its sign is not resolved.

    >>> from localexit.compare.statistics import mean_estimate
    >>> difference(mean_estimate([0.10, 0.12, 0.11])), difference(mean_estimate([0.1])), difference(None)
    ('+0.110 ±0.025', '(+0.100)', '')
    """
    if estimate is None:
        return ""
    margin = "" if estimate.num_values < 2 else f" ±{number(estimate.half_width)}"
    text = f"{signed(estimate.mean)}{margin}"
    return f"({text})" if estimate.against() == "unresolved" else text


def seeds(row: Row) -> str:
    """How many seeds finished, and how many did not.

    Args:
        row: of one method.
    """
    return f"{len(row.seeds)}" + (f" +{row.num_diverged} diverged" if row.num_diverged else "")


def _numbers(row: Row) -> tuple[str, ...]:
    return (
        number(row.losses[0] if row.losses else None),
        number(row.losses[-1] if row.losses else None),
        difference(row.to_exact),
        difference(row.to_backprop),
        seeds(row),
        number(1000 * row.step_seconds, 1),
    )
