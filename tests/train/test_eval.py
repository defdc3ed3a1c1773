from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from localexit import cli
from localexit.report import read_evaluation
from localexit.train.data import load_data
from localexit.train.eval import evaluate_run
from localexit.train.evaluate import validate
from localexit.train.export import load_run
from localexit.train.folder import RunFolder, write_json
from train.small_runs import small_config, train_quietly, write_corpus


@pytest.fixture(scope="module")
def run(text: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    config = small_config(text, steps=20, lr=1e-2, eval_every=100, checkpoint_every=100)
    return train_quietly(config, tmp_path_factory.mktemp("runs") / "run", cache_dir).run


def test_the_runs_own_validation_text_gives_the_losses_of_its_validation(run: RunFolder, cache_dir: Path) -> None:
    found = evaluate_run(run, max_tokens=256, device="cpu", cache_dir=cache_dir)
    local, _ = load_run(run.path, device=torch.device("cpu"))
    config = run.read_config()
    expected = validate(
        local, load_data(config, cache_dir=cache_dir).valid, batch_size=3, context=config.context, max_tokens=256
    )
    assert [exit_["loss"] for exit_ in found["exits"]] == pytest.approx(expected.loss, rel=1e-5)
    assert [exit_["accuracy"] for exit_ in found["exits"]] == pytest.approx(expected.accuracy)
    assert (found["num_tokens"], found["num_blocks"], found["step"]) == (expected.num_tokens, 2, 20)
    assert found["sha256"] == json.loads(run.corpus.read_text())["sha256"]


def test_reading_gives_back_what_was_written(run: RunFolder, cache_dir: Path, tmp_path: Path) -> None:
    found = evaluate_run(run, max_tokens=128, thresholds=(0.25, 0.75), device="cpu", cache_dir=cache_dir)
    write_json(tmp_path / "found.json", found)
    read = read_evaluation(tmp_path / "found.json")
    assert read.early["threshold"].tolist() == [0.25, 0.75]
    assert read.early["average_blocks"].tolist() == [point["average_blocks"] for point in found["early"]]
    assert read.exits["calibration_error"].tolist() == [exit_["calibration_error"] for exit_ in found["exits"]]
    assert (read.step, read.num_tokens, read.num_blocks) == (20, found["num_tokens"], 2)


def test_another_text_is_cut_by_the_runs_tokenizer(run: RunFolder, cache_dir: Path, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", seed=5)
    found = evaluate_run(run, data=str(other), max_tokens=256, device="cpu", cache_dir=cache_dir)
    assert found["data"] == str(other)
    assert found["exits"][-1]["loss"] < 4


def test_text_that_has_changed_is_refused(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    changing = tmp_path / "text"
    shutil.copytree(text, changing)
    run = train_quietly(small_config(changing, steps=3), tmp_path / "run", cache_dir).run
    (changing / "0.txt").write_text("something else, and a second line\n" * 20)
    with pytest.raises(ValueError, match="expected the text of the run"):
        evaluate_run(run, device="cpu", cache_dir=cache_dir)


def test_the_command_prints_tables_and_the_report_draws_them(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache_dir: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_dir))
    copied = tmp_path / "run"
    shutil.copytree(run.path, copied)
    assert cli.run(["eval", str(copied), "--tokens", "64", "--device", "cpu", "--thresholds", "0.5", "0.9"]) == 0
    printed = capsys.readouterr().out
    assert "calibration" in printed
    assert "0.50" in printed
    assert "0.90" in printed
    assert (copied / "eval.json").exists()
    assert cli.run(["report", str(copied)]) == 0
    assert (copied / "plots/early_exit_loss.png").exists()
    assert (copied / "plots/early_exit_accuracy.png").exists()
    elsewhere = tmp_path / "elsewhere.json"
    assert cli.run(["eval", str(run.path), "--tokens", "64", "--device", "cpu", "--output", str(elsewhere)]) == 0
    assert elsewhere.exists()
    assert not run.evaluation.exists()


@pytest.mark.parametrize(
    ("arguments", "named"), [(["--tokens", "0"], "tokens"), (["--thresholds", "1.5"], "thresholds"), ([], "run")]
)
def test_bad_options_are_refused(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["eval", "nowhere", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_every_measured_number_is_written() -> None:
    from localexit.inference.quality import EarlyExit, ExitQuality
    from localexit.report.evaluation import EARLY_COLUMNS, EXIT_COLUMNS

    assert {field.name for field in dataclasses.fields(ExitQuality)} == set(EXIT_COLUMNS)
    assert {field.name for field in dataclasses.fields(EarlyExit)} == set(EARLY_COLUMNS)
