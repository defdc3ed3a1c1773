from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from localexit.train.evaluate import Validation
from localexit.train.logs import LINE_INTERVAL, Display, MetricsLog, drop_after
from localexit.train.trainer import StepResult


def result(step: int, *, losses: tuple[float, ...] = (2.5, 2.25)) -> StepResult:
    return StepResult(
        step=step,
        tokens=32 * step,
        seconds=0.5 * step,
        lr=1e-3,
        losses=losses,
        grad_norms=(0.1, 0.2, 0.3),
        tokens_per_second=1234.5,
    )


VALIDATION = Validation(loss=(2.0, 1.5), bits_per_byte=(1.0, 0.75), accuracy=(0.25, 0.5), num_tokens=99)


def steps(path: Path) -> list[tuple[str, int]]:
    return [(line["kind"], line["step"]) for line in map(json.loads, path.read_text().splitlines())]


def written(path: Path, last: int) -> Path:
    log = MetricsLog(path)
    log.event(0, "started", "")
    for step in range(1, last + 1):
        log.train(result(step))
    log.valid(last, 32 * last, VALIDATION)
    log.sample(last, prompt="a", text="b", exit_index=1)
    log.event(last, "non_finite", "")
    log.sync()
    log.close()
    return path


def test_every_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.train(result(1))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "kind": "train",
        "step": 1,
        "tokens": 32,
        "seconds": 0.5,
        "lr": 1e-3,
        "loss": [2.5, 2.25],
        "grad_norm": [0.1, 0.2, 0.3],
        "tokens_per_second": 1234.5,
    }
    log.close()


def test_what_was_measured_after_a_checkpoint_is_dropped_and_events_stay(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", 4)
    mode = path.stat().st_mode
    drop_after(path, 2)
    assert path.stat().st_mode == mode
    assert steps(path) == [("event", 0), ("train", 1), ("train", 2), ("event", 4)]
    drop_after(path, 0)
    assert steps(path) == [("event", 0), ("event", 4)]


def test_nothing_is_dropped_at_the_last_step(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", 3)
    before = path.read_bytes()
    drop_after(path, 3)
    assert path.read_bytes() == before


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', '{"kind": "train", "step": 1}', "[1]\n", "null\n", "\n"])
def test_a_torn_line_is_dropped(tmp_path: Path, torn: str) -> None:
    path = written(tmp_path / "metrics.jsonl", 2)
    before = path.read_text()
    path.write_text(before + torn)
    drop_after(path, 9)
    assert path.read_text() == before


def test_no_log_yet_is_fine(tmp_path: Path) -> None:
    drop_after(tmp_path / "metrics.jsonl", 3)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_without_a_terminal_lines_come_now_and_then() -> None:
    console, now = Console(file=io.StringIO(), width=200), [0.0]
    with Display(console, num_steps=100, first_step=0, clock=lambda: now[0]) as display:
        for step in range(1, 101):
            now[0] += 1.0
            display.step(result(step))
        display.valid(100, VALIDATION)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == "step 1/100 · loss 2.250 · 1,234 tokens/s · 1:39 left"
    assert len(lines) == 1 + 99 // int(LINE_INTERVAL) + 1 + 1
    assert lines[-1] == "step 100/100 · validation nats/token by exit: 2.000 1.500"


def test_on_a_terminal_there_is_a_bar_with_the_rate_and_the_loss() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with Display(console, num_steps=4, first_step=2) as display:
        display.step(result(3))
        display.say("[not] markup")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3/4" in shown
    assert "loss 2.250" in shown
    assert "1,234 tokens/s" in shown
    assert "[not] markup" in shown
