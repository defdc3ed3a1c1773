"""A run directory is read as it is, forgiven only a write that was cut off, and refused with a reason."""

from __future__ import annotations

import json

import numpy as np
import pytest

from localexit.report import read_run
from report.runs_on_disk import FakeRun, append_records, write_json

TRAIN = {
    "kind": "train",
    "step": 1,
    "tokens": 8,
    "seconds": 0.5,
    "lr": 0.1,
    "loss": [3.0, 2.0],
    "grad_norm": [1.0, 1.0, 2.0],
    "tokens_per_second": 16.0,
}
VALID = {"kind": "valid", "step": 1, "tokens": 8, "loss": [3.0, 2.0], "bits_per_byte": [1.5, 1.0], "accuracy": [0, 1]}


def run_with(path, *records, tail=b""):
    """A run that logged nothing but `records` and, without an end of line, `tail`."""
    FakeRun(num_steps=0).write(path)
    write_json(path / "corpus.json", {"format": 1, "name": "tiny"})
    (path / "metrics.jsonl").unlink()
    append_records(path, records)
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    return path


def test_a_run_is_read_back(tmp_path):
    run = read_run(FakeRun(num_exits=3, num_steps=40, valid_every=10).write(tmp_path / "run"))
    assert (run.name, run.num_exits, run.device) == ("run", 3, "cpu")
    assert run.train_config["feedback"] == "mirror_sampled"
    assert run.model_config["hidden_size"] == 128
    assert "format" not in run.corpus
    records = run.records
    assert records.train.loss.shape == (40, 3)
    assert records.train.grad_norm.shape == (40, 4)
    assert records.valid.step.tolist() == [10, 20, 30, 40]
    assert records.valid.accuracy.shape == (4, 3)
    assert [sample.step for sample in records.samples] == [10, 20, 30, 40]
    assert [event.event for event in records.events] == ["started", "finished"]
    assert not records.is_truncated
    assert records.num_replaced == 0


def test_numbers_that_json_does_not_have(tmp_path):
    record = {**TRAIN, "loss": [float("nan"), None], "lr": float("inf"), "seconds": 10**400}
    train = read_run(run_with(tmp_path / "run", record)).records.train
    assert np.isnan(train.loss).all()
    assert np.isinf([train.lr[0], train.seconds[0]]).all()


@pytest.mark.parametrize("tail", [b'{"kind": "tra', b'{"kind": "sample", "text": "\xe2\x82', b"{", b'{"kind": "train"'])
def test_a_write_that_was_cut_off_is_left_out(tmp_path, tail):
    records = read_run(run_with(tmp_path / "run", TRAIN, tail=tail)).records
    assert records.is_truncated
    assert records.train.step.tolist() == [1]


def test_a_last_line_that_only_lacks_its_end_counts(tmp_path):
    records = read_run(run_with(tmp_path / "run", tail=json.dumps(TRAIN).encode())).records
    assert not records.is_truncated
    assert records.train.step.tolist() == [1]


def test_a_resume_replaces_what_it_makes_again(tmp_path):
    steps = [1, 2, 3, 4, 5, 3, 4]
    again = [{**TRAIN, "step": step, "lr": float(index)} for index, step in enumerate(steps)]
    samples = [
        {"kind": "sample", "step": step, "prompt": "p", "text": str(index), "exit": 1}
        for index, step in enumerate([2, 2, 4, 3, 3])
    ]
    records = read_run(run_with(tmp_path / "run", *again, *samples)).records
    assert records.train.step.tolist() == [1, 2, 3, 4]
    assert records.train.lr.tolist() == [0, 1, 5, 6]
    assert records.num_replaced == 3
    assert [sample.text for sample in records.samples] == ["0", "1", "3", "4"]


def test_unknown_kinds_are_counted(tmp_path):
    records = read_run(run_with(tmp_path / "run", TRAIN, {"kind": "alignment"}, {"kind": "alignment"})).records
    assert records.unknown_kinds == {"alignment": 2}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "expected a JSON object, got"),
        ("[1, 2]", "expected a JSON object, got"),
        ("[" * 100_000, "expected a JSON object, got"),
        ('{"step": ' + "9" * 5000 + "}", "expected a JSON object, got"),
        ("{}", "expected a field 'kind'"),
        (json.dumps({"kind": 3}), "expected text in 'kind', got 3"),
        (json.dumps({"kind": "train", "step": 2}), "expected a field 'tokens'"),
        (json.dumps({**TRAIN, "step": "two"}), "expected a whole number in 'step', got 'two'"),
        (json.dumps({**TRAIN, "step": -1}), "expected a whole number in 'step', got -1"),
        (json.dumps({**TRAIN, "step": True}), "expected a whole number in 'step', got True"),
        (json.dumps({**TRAIN, "step": 2**60}), "expected a whole number in 'step'"),
        (json.dumps({**TRAIN, "lr": "fast"}), "expected a number in 'lr', got 'fast'"),
        (json.dumps({**TRAIN, "loss": 3.0}), "expected a list of numbers in 'loss', got 3.0"),
        (json.dumps({**TRAIN, "loss": []}), "expected a list of numbers in 'loss'"),
        (json.dumps({**TRAIN, "loss": [1.0, [2.0]]}), "expected a number in 'loss'"),
        (json.dumps({**TRAIN, "loss": [1.0]}), "expected 2 values in 'loss', got 1"),
        (json.dumps({"kind": "sample", "step": 1, "prompt": "", "text": "", "exit": "1"}), "an integer in 'exit'"),
        (json.dumps({"kind": "event", "step": 1, "event": "started"}), "expected a field 'detail'"),
    ],
)
def test_a_broken_line_is_refused_by_its_number(tmp_path, line, message):
    path = run_with(tmp_path / "run", TRAIN)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 3: .*; delete the line") as raised:
        read_run(path)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 500 + len(str(path))


def test_two_runs_in_one_file_are_refused(tmp_path):
    path = run_with(tmp_path / "run", TRAIN, {**VALID, "loss": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match="as many exits in training as in validation records, got 2 and 3"):
        read_run(path)


@pytest.mark.parametrize("missing", ["config.json", "corpus.json", "metrics.jsonl"])
def test_a_missing_file_is_named(tmp_path, missing):
    path = FakeRun(num_steps=1).write(tmp_path / "run")
    (path / missing).unlink()
    with pytest.raises(ValueError, match=f"expected .*{missing}"):
        read_run(path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="run: expected a run directory, got .*nowhere.*; pass a folder"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a JSON object"),
        ("[]", "expected a JSON object, got list"),
        ('{"train": {}}', "expected format 1, got None"),
        ('{"format": 2}', "expected format 1, got 2; read it with the version"),
        ('{"format": 1, "train": [], "model": {}, "versions": {}}', "expected an object in 'train', got list"),
        ('{"format": 1, "train": {}, "model": {}}', "expected an object in 'versions', got NoneType"),
    ],
)
def test_a_broken_configuration_is_refused(tmp_path, content, message):
    path = FakeRun(num_steps=1).write(tmp_path / "run")
    (path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: ") as raised:
        read_run(path)
    assert message in str(raised.value)
