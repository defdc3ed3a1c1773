"""The page and the terminal come down to the same numbers."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from localexit.report import comparability_warnings, exit_rows, exits_table, read_run, totals
from localexit.report.summary import are_losses_comparable
from report.runs_on_disk import FakeRun


def written(table):
    """What a terminal shows of `table`."""
    stream = io.StringIO()
    Console(file=stream, width=100, force_terminal=False).print(table)
    return stream.getvalue()


def test_rows_hold_the_last_validation(tmp_path):
    run = read_run(FakeRun(num_exits=3, num_steps=45, valid_every=20).write(tmp_path / "run"))
    rows = exit_rows(run)
    assert [row.exit for row in rows] == [0, 1, 2]
    assert [row.is_last for row in rows] == [False, False, True]
    assert [row.nats_per_token for row in rows] == run.records.valid.loss[-1].tolist()
    assert [row.accuracy for row in rows] == run.records.valid.accuracy[-1].tolist()
    assert rows[0].change is None
    assert rows[2].change == rows[2].nats_per_token - rows[1].nats_per_token < 0
    assert rows[1].train_nats_per_token == pytest.approx(run.records.train.loss[25:, 1].mean())
    total = totals(run)
    assert (total.steps, total.tokens, total.valid_step) == (45, 45 * 1024, 40)
    assert total.seconds == pytest.approx(45 * 0.21)


def test_rows_without_validation_have_training_only(tmp_path):
    run = read_run(FakeRun(num_exits=2, num_steps=5, valid_every=100).write(tmp_path / "run"))
    rows = exit_rows(run)
    assert all(row.nats_per_token is None and row.change is None for row in rows)
    assert all(row.train_nats_per_token is not None for row in rows)
    assert totals(run).valid_step is None


def test_the_terminal_table(tmp_path):
    run = read_run(FakeRun(num_exits=2, num_steps=40, valid_every=20).write(tmp_path / "run"))
    lines = written(exits_table(run)).splitlines()
    row = exit_rows(run)[1]
    expected = ["1", f"{row.nats_per_token:.3f}", f"{row.bits_per_byte:.3f}", f"{100 * row.accuracy:.1f} %"]
    assert any(all(cell in line for cell in expected) for line in lines)
    assert "validation at step 40" in lines[-1]


def test_a_folder_name_is_not_markup(tmp_path):
    run = read_run(FakeRun(num_steps=1).write(tmp_path / "[bold red]run\x1b[2J"))
    shown = written(exits_table(run))
    assert "[bold red]run⟨U+001B⟩[2J" in shown
    assert "no validation yet" in shown


def test_a_run_that_logged_nothing(tmp_path):
    run = read_run(FakeRun(num_steps=0).write(tmp_path / "run"))
    assert exit_rows(run) == ()
    assert totals(run).steps is None
    assert "nats/token" in written(exits_table(run))


@pytest.mark.parametrize(
    ("first", "second", "warnings"),
    [
        ({}, {}, []),
        ({}, {"sha256": "0"}, ["different text"]),
        ({}, {"vocab_size": 4096}, ["different tokens"]),
        # the same text and size of vocabulary, cut otherwise
        ({}, {"corpus": {"valid_bytes_per_token": 3.5}}, ["different tokens"]),
        # other text is cut otherwise by the same vocabulary
        ({}, {"sha256": "0", "corpus": {"valid_bytes_per_token": 3.5}}, ["different text"]),
        ({}, {"sha256": "0", "vocab_size": 4096}, ["different text", "different tokens"]),
    ],
)
def test_runs_that_must_not_be_compared(tmp_path, first, second, warnings):
    runs = [
        read_run(FakeRun(num_steps=1, **first).write(tmp_path / "a")),
        read_run(FakeRun(num_steps=1, **second).write(tmp_path / "b")),
    ]
    found = comparability_warnings(runs, ["A", "B"])
    assert len(found) == len(warnings)
    assert all(part in warning and "A against B" in warning for part, warning in zip(warnings, found, strict=True))
    assert are_losses_comparable(runs) == (not warnings)
