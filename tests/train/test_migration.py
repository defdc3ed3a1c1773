"""Runs of every format that was ever written can be continued; `tests/data/write_run.py` wrote them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from localexit.train import checkpoint
from localexit.train.folder import RunFolder
from train.small_runs import train_quietly

OLD_RUNS = sorted((Path(__file__).parents[1] / "data").glob("run-format-*"))


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_there_is_an_old_run_for_every_format() -> None:
    assert [path.name for path in OLD_RUNS] == [f"run-format-{number}" for number in range(1, checkpoint.FORMAT + 1)]


@pytest.mark.parametrize("old", OLD_RUNS, ids=lambda path: path.name)
def test_an_old_run_goes_on(old: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    shutil.copytree(old, work)
    monkeypatch.chdir(work)
    run = Path("run")
    before = records(run)
    assert [line["step"] for line in before if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    config = RunFolder(path=run).read_config()
    assert train_quietly(config, run, cache_dir, resume=True).status == "finished"
    after = records(run)
    resumed = [line for line in after if line["kind"] == "event" and line["event"] == "resumed"]
    assert "continued from checkpoint step-3" in resumed[0]["detail"]
    for old_line, line in zip(_trained(before), _trained(after), strict=True):
        # Rules may have got better since; what a run counts is what it was.
        assert line["loss"] == pytest.approx(old_line["loss"], abs=0.02)
        assert (line["step"], line["tokens"], line["lr"]) == (old_line["step"], old_line["tokens"], old_line["lr"])
    # The first loss is that of the state restored, whatever the rule: another processor adds up in another order, a
    # parameter or a position in the text that is not restored is off by far more.
    assert _trained(after)[3]["loss"] == pytest.approx(_trained(before)[3]["loss"], abs=2e-5)


def _trained(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == "train"]


def test_a_checkpoint_of_a_later_format_names_the_remedy(tmp_path: Path) -> None:
    shutil.copytree(OLD_RUNS[-1] / "run" / "checkpoints" / "step-3", tmp_path / "step-3")
    manifest = tmp_path / "step-3" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": checkpoint.FORMAT + 1}))
    with pytest.raises(checkpoint.CheckpointError, match="read it with the version of localexit that wrote it"):
        checkpoint.load_checkpoint(tmp_path / "step-3")
