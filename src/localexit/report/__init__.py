"""Run directories to tables, plots and one HTML page. A pure function of files."""

from __future__ import annotations

from .evaluation import Evaluation
from .page import write_report
from .records import Event, Records, Sample, TrainRecords, ValidRecords
from .runs import Run, read_evaluation, read_run
from .summary import ExitRow, Totals, comparability_warnings, exit_rows, totals
from .table import evaluation_tables, exits_table

__all__ = [
    "Evaluation",
    "Event",
    "ExitRow",
    "Records",
    "Run",
    "Sample",
    "Totals",
    "TrainRecords",
    "ValidRecords",
    "comparability_warnings",
    "evaluation_tables",
    "exit_rows",
    "exits_table",
    "read_evaluation",
    "read_run",
    "totals",
    "write_report",
]
