"""The tables that `localexit train` and `localexit eval` end with."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from localexit._text import visible

from .evaluation import Evaluation
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


def evaluation_tables(evaluation: Evaluation) -> tuple[Table, Table]:
    """Every exit, and early exits by threshold."""
    what = f"{count(evaluation.num_tokens)} tokens of {visible(evaluation.data)}"
    exits = Table(title=Text("exits"), caption=Text(what))
    for heading in ("exit", "blocks", "nats/token", "accuracy", "confidence", "calibration\nerror", "as the\nlast"):
        exits.add_column(heading, justify="right")
    for index, values in enumerate(zip(*evaluation.exits.values(), strict=True)):
        blocks, loss, *shares = values
        exits.add_row(str(index), count(blocks), number(loss), *map(percent, shares))
    early = Table(title=Text("the first exit that is sure"), caption=Text("blocks: average up to the exit that writes"))
    for heading in ("threshold", "blocks", "nats/token", "accuracy", "as the\nlast"):
        early.add_column(heading, justify="right")
    for threshold, blocks, loss, *shares in zip(*evaluation.early.values(), strict=True):
        early.add_row(number(threshold, 2), number(blocks, 2), number(loss), *map(percent, shares))
    return exits, early
