"""The table that `localexit train` ends with."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from localexit._text import visible

from .runs import Run
from .summary import exit_rows, totals
from .text import count, number, percent


def exits_table(run: Run) -> Table:
    """Last validation results of every exit of `run`, one row per exit, the last one in bold."""
    total = totals(run)
    when = "no validation yet" if total.valid_step is None else f"validation at step {count(total.valid_step)}"
    # Text objects: a folder's name is not markup.
    table = Table(title=Text(visible(run.name)), caption=Text(when))
    for heading in ("exit", "nats/token", "bits/byte", "accuracy"):
        table.add_column(heading, justify="right")
    for row in exit_rows(run):
        table.add_row(
            str(row.exit),
            number(row.nats_per_token),
            number(row.bits_per_byte),
            percent(row.accuracy),
            style="bold" if row.is_last else None,
        )
    return table
