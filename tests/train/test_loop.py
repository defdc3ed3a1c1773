from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from localexit.feedback import feedback_names
from localexit.train.checkpoint import load_checkpoint
from localexit.train.config import FeedbackSpec, TrainConfig
from localexit.train.data import load_data
from localexit.train.devices import resolve_device, resolve_precision
from localexit.train.errors import NonFiniteError, RunFailedError
from localexit.train.stop import StopRequest
from localexit.train.trainer import StepResult, Trainer
from train.small_runs import small_config, train_quietly, write_corpus

RUN_FILES = {"config.json", "corpus.json", "metrics.jsonl", "checkpoints", "model"}


def records(run: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] in kinds]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def test_a_run_leaves_what_it_promises(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    config = small_config(text, track="tensorboard")
    outcome = train_quietly(config, tmp_path / "run", cache_dir)
    run = outcome.run.path
    assert outcome.status == "finished"
    assert {path.name for path in run.iterdir()} == RUN_FILES | {"tensorboard"}
    assert outcome.run.read_config() == config
    assert [line["step"] for line in records(run, "train")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in records(run, "valid", "sample")] == [3, 3, 6, 6]
    assert [line["event"] for line in records(run, "event")] == ["started", "finished"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-3", "step-6"]
    model = {path.name for path in (run / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "exits.safetensors"} <= model
    assert list((run / "tensorboard").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs file modes")
def test_others_can_read_what_a_run_leaves(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        run = train_quietly(small_config(text), tmp_path / "run", cache_dir).run.path
    finally:
        os.umask(before)
    assert {path for path in run.rglob("*") if path.is_file() and path.stat().st_mode & 0o777 != 0o644} == set()


def test_the_records_have_the_fields_the_report_reads(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    from localexit.report import exits_table, read_run, write_report

    run = train_quietly(small_config(text), tmp_path / "run", cache_dir).run.path
    read = read_run(run)
    assert read.num_exits == 2
    assert read.records.train.grad_norm.shape == (6, 3)
    assert read.records.valid.loss.shape == (2, 2)
    assert read.corpus["valid_tokens"] > 0
    assert exits_table(read).row_count == 2
    assert write_report([run]).is_file()


def test_feedback_is_diagnosed_during_training(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Records, TensorBoard and report have it; the training itself is bit by bit what it is without."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from localexit.report import read_run
    from localexit.report.plots import gradient_cosines

    plain = small_config(text, feedback=FeedbackSpec.parse("mirror"))
    config = replace(plain, diagnose_every=4, track="tensorboard")
    run = train_quietly(config, tmp_path / "run", cache_dir).run.path
    other = train_quietly(plain, tmp_path / "other", cache_dir).run.path
    assert without_times(records(run, "train", "valid")) == without_times(records(other, "train", "valid"))
    read = read_run(run)
    found = read.records.diagnoses
    assert found.step.tolist() == [4, 6]
    assert found.gradient_cosine.shape == found.bias_ratio.shape == (2, 2)
    assert 0 < found.rows_error[1] < found.rows_error[0] < 1
    assert gradient_cosines(read) is not None
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {"feedback/gradient_cosine/exit_0", "feedback/bias_ratio/exit_1", "feedback/rows_error"} <= set(
        board.Tags()["scalars"]
    )


@pytest.mark.parametrize("content", ["file", "folder", "link"])
def test_a_folder_that_exists_is_left_as_it_is(text: Path, cache_dir: Path, tmp_path: Path, content: str) -> None:
    run = tmp_path / "run"
    if content == "file":
        run.write_text("mine")
    elif content == "link":
        run.symlink_to(tmp_path / "nowhere")
    else:
        run.mkdir()
        (run / "mine").write_text("mine")
    with pytest.raises(ValueError, match="run: expected a new folder, got .*--resume"):
        train_quietly(small_config(text), run, cache_dir)
    assert content != "folder" or [path.name for path in run.iterdir()] == ["mine"]
    assert content != "file" or run.read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 50_000}, "vocab_size: expected at most"),
        ({"vocab_size": 200}, "vocab_size: expected at least 257"),
        ({"context": 10**6}, "data: expected at least one context"),
        ({"model": "huge"}, r"model must be a preset \(tiny, "),
        ({"model": "./nowhere"}, "model must be a preset"),
        ({"exits": "every:5"}, "exits='every:5'"),
        ({"exits": "7"}, "exits has block 7"),
        ({"feedback": FeedbackSpec.parse("dense:rank=1000")}, "rank=1000 is larger than the hidden size"),
        ({"device": "abacus"}, "device must be 'auto' or a device torch can use"),
        ({"data": "nowhere/at/all"}, "data: expected"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_folder_is_made(
    text: Path, cache_dir: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_quietly(small_config(text, **change), tmp_path / "run", cache_dir)
    assert not (tmp_path / "run").exists()


def test_a_resume_from_another_configuration_names_the_fields(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    run = train_quietly(small_config(text), tmp_path / "run", cache_dir).run.path
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"lr: the run has 0\.003, got 0\.5; steps: the run has 6, got 9|steps.*lr"):
        train_quietly(small_config(text, lr=0.5, steps=9), run, cache_dir, resume=True)
    assert (run / "metrics.jsonl").read_text() == before


def test_a_resume_on_other_text_is_refused(cache_dir: Path, tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text")
    config = small_config(text)
    run = train_quietly(config, tmp_path / "run", cache_dir).run.path
    write_corpus(tmp_path / "text", seed=1)
    with pytest.raises(ValueError, match="data: expected the text of the run"):
        train_quietly(config, run, cache_dir, resume=True)


def test_a_folder_without_a_run_cannot_be_resumed(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run: expected a run directory with config\.json"):
        train_quietly(small_config(text), tmp_path, cache_dir, resume=True)


def test_a_finished_run_resumes_to_nothing_more(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    config = small_config(text)
    run = train_quietly(config, tmp_path / "run", cache_dir).run.path
    measured = records(run, "train", "valid", "sample")
    assert train_quietly(config, run, cache_dir, resume=True).status == "finished"
    assert records(run, "train", "valid", "sample") == measured


KILLED = """
import json, os, sys
from pathlib import Path
# Imported once for all runs: it takes longer than they do.
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast
from train.small_runs import train_quietly
from localexit.train.config import TrainConfig
from localexit.train.trainer import Trainer

configs, die_at, folder, cache_dir, mode = sys.argv[1:]
train_step = Trainer.train_step

def dying(self):
    if self.step < int(die_at):
        return train_step(self)
    # A child of its own for every run: what is dead writes nothing more.
    os._exit(9)

Trainer.train_step = dying
codes = set()
for content in json.loads(configs):
    config = TrainConfig.from_json(content)
    child = os.fork()
    if child == 0:
        train_quietly(config, Path(folder) / config.feedback.name, Path(cache_dir), resume=mode == "resume")
        os._exit(0)
    codes.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
sys.exit(max(codes))
"""


def train_in_new_process(
    configs: list[TrainConfig], folder: Path, cache_dir: Path, *, die_at: int, resume: bool, prelude: str = ""
) -> int:
    """Train in another process, where every run stops dead before the step after `die_at`; the process's exit code.

    `prelude` is Python to run first.
    """
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent / "src"), os.environ.get("PYTHONPATH", "")])
    mode = "resume" if resume else "start"
    arguments = [json.dumps([config.to_json() for config in configs]), str(die_at), str(folder), str(cache_dir), mode]
    ended = subprocess.run(
        [sys.executable, "-c", prelude + KILLED, *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode in (0, 9), ended.stderr
    return ended.returncode


@pytest.mark.filterwarnings("ignore:feedback 'parallel:UserWarning", "ignore:the nucleus of some tokens:UserWarning")
@pytest.mark.parametrize(
    "rules", [("mirror_sampled", "dense"), pytest.param(feedback_names(), marks=pytest.mark.slow, id="every rule")]
)
def test_two_processes_do_what_one_does_bit_by_bit(
    text: Path, cache_dir: Path, tmp_path: Path, rules: tuple[str, ...]
) -> None:
    options: dict[str, Any] = {"steps": 40, "eval_every": 10, "checkpoint_every": 20, "sample_tokens": 2}
    configs = [small_config(text, **options, feedback=FeedbackSpec.parse(rule)) for rule in rules]
    for config in configs:
        train_quietly(config, tmp_path / "whole" / config.feedback.name, cache_dir)
    halves = tmp_path / "halves"
    assert train_in_new_process(configs, halves, cache_dir, die_at=25, resume=False) == 9
    for rule in rules:
        assert [line["step"] for line in records(halves / rule, "train")] == list(range(1, 26))
    assert train_in_new_process(configs, halves, cache_dir, die_at=40, resume=True) == 0
    for rule in rules:
        assert_same_run(tmp_path / "whole" / rule, halves / rule)


def assert_same_run(whole: Path, halves: Path) -> None:
    """Same log but for times, same last checkpoint."""
    kinds = ("train", "valid", "sample")
    assert without_times(records(halves, *kinds)) == without_times(records(whole, *kinds))
    assert [line["event"] for line in records(halves, "event")] == ["started", "resumed", "finished"]
    for name in ("model", "optimizer", "rng"):
        one, two = (load_file(run / "checkpoints" / "step-40" / f"{name}.safetensors") for run in (whole, halves))
        assert one.keys() == two.keys()
        assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    states = [json.loads((run / "checkpoints" / "step-40" / "state.json").read_text()) for run in (whole, halves)]
    assert states[0].pop("seconds") > 0
    states[1].pop("seconds")
    assert states[0] == states[1]


def test_a_resume_without_a_checkpoint_starts_over(
    text: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(text)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", _raising(Trainer.train_step, at=2, error=KeyboardInterrupt()))
        train_quietly(config, tmp_path / "run", cache_dir)
    train_quietly(config, tmp_path / "run", cache_dir, resume=True)
    train_quietly(config, tmp_path / "whole", cache_dir)
    kinds = ("train", "valid", "sample")
    assert without_times(records(tmp_path / "run", *kinds)) == without_times(records(tmp_path / "whole", *kinds))


def test_a_damaged_checkpoint_is_skipped_and_the_log_says_so(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    config = small_config(text)
    run = train_quietly(config, tmp_path / "run", cache_dir).run.path
    kinds = ("train", "valid", "sample")
    measured = without_times(records(run, *kinds))
    (run / "checkpoints" / "step-6" / "model.safetensors").write_bytes(b"")
    train_quietly(config, run, cache_dir, resume=True)
    resumed = records(run, "event")[-2]
    assert "skipped checkpoint step-6: model.safetensors is damaged" in resumed["detail"]
    assert "continued from checkpoint step-3" in resumed["detail"]
    assert without_times(records(run, *kinds)) == measured


def test_only_damaged_checkpoints_do_not_start_the_run_over(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    config = small_config(text)
    run = train_quietly(config, tmp_path / "run", cache_dir).run.path
    before = (run / "metrics.jsonl").read_text()
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "state.json").unlink()
    with pytest.raises(ValueError, match="run: expected a whole checkpoint .* step-6: state.json is missing.*step-3"):
        train_quietly(config, run, cache_dir, resume=True)
    assert (run / "metrics.jsonl").read_text() == before


def test_a_folder_that_cannot_be_written_is_refused(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="run: expected a folder that can be written"):
        train_quietly(small_config(text), tmp_path / "file" / "run", cache_dir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_can_be_resumed(
    text: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    config = small_config(text, steps=8, eval_every=100, checkpoint_every=100)
    run = tmp_path / "run"
    train_step = Trainer.train_step

    def signalled(self: Trainer) -> StepResult:
        result = train_step(self)
        if self.step == 5:
            os.kill(os.getpid(), number)
        return result

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled)
        outcome = train_quietly(config, run, cache_dir)
    assert signal.getsignal(number) is handler
    assert (outcome.status, outcome.signal_number) == ("interrupted", number)
    assert [line["event"] for line in records(run, "event")] == ["started", "interrupted"]
    assert (run / "checkpoints" / "step-5").is_dir()
    assert (run / "model" / "model.safetensors").is_file()
    assert train_quietly(config, run, cache_dir, resume=True).status == "finished"
    train_quietly(config, tmp_path / "whole", cache_dir)
    assert without_times(records(run, "train", "valid")) == without_times(records(tmp_path / "whole", "train", "valid"))


def test_a_signal_that_comes_twice_is_one_request_and_one_that_comes_later_ends_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [100.0]
    monkeypatch.setattr("localexit.train.stop.time", SimpleNamespace(monotonic=lambda: clock[0]))
    stop = StopRequest()
    with stop.listening():
        for clock[0], number in ((100.0, signal.SIGTERM), (100.0, signal.SIGTERM), (100.9, signal.SIGINT)):
            signal.raise_signal(number)
        assert stop.signal_number == signal.SIGTERM
        clock[0] = 101.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_a_value_that_is_not_finite_ends_the_run_with_its_last_checkpoint(
    text: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(text)
    error = NonFiniteError("step 5: expected finite losses")
    with monkeypatch.context() as patch, pytest.raises(NonFiniteError):
        patch.setattr(Trainer, "train_step", _raising(Trainer.train_step, at=4, error=error))
        train_quietly(config, tmp_path / "run", cache_dir)
    assert records(tmp_path / "run", "event")[-1] == {
        "kind": "event",
        "step": 4,
        "event": "non_finite",
        "detail": "step 5: expected finite losses",
    }
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-3"]
    assert train_quietly(config, tmp_path / "run", cache_dir, resume=True).status == "finished"


def test_a_context_longer_than_the_model_takes_is_refused(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    run = train_quietly(small_config(text, steps=3), tmp_path / "run", cache_dir).run.path
    config = small_config(text, model=str(run / "model"), vocab_size=None, context=17)
    with pytest.raises(ValueError, match="context: expected at most the 16 tokens"):
        train_quietly(config, tmp_path / "other", cache_dir)


def test_code_that_comes_with_a_model_is_not_run(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    run = train_quietly(small_config(text, steps=3), tmp_path / "run", cache_dir).run.path
    path = run / "model" / "config.json"
    content = {**json.loads(path.read_text()), "auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"}
    path.write_text(json.dumps(content))
    (run / "model" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="could not be loaded"):
        train_quietly(small_config(text, model=str(run / "model"), vocab_size=None), tmp_path / "other", cache_dir)
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_ends_the_run_with_its_last_checkpoint(
    text: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from localexit.train import checkpoint

    save = checkpoint.save_file
    calls = 0

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunFailedError, match=r"No space left.*the last checkpoint is whole"):
        train_quietly(small_config(text), tmp_path / "run", cache_dir)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-3"]


@pytest.mark.parametrize("module", ["train.checkpoint", "local.saving"])
def test_what_safetensors_cannot_write_ends_the_run(
    text: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    from safetensors import SafetensorError

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(f"localexit.{module}.save_file", full)
    with pytest.raises(RunFailedError, match="No space left"):
        train_quietly(small_config(text), tmp_path / "run", cache_dir)


def test_a_source_that_is_gone_at_the_end_is_a_failure_of_the_run(
    text: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_quietly(small_config(text), tmp_path / "first", cache_dir).run
    train_step = Trainer.train_step

    def removing(self: Trainer) -> StepResult:
        shutil.rmtree(first.model, ignore_errors=True)
        return train_step(self)

    monkeypatch.setattr(Trainer, "train_step", removing)
    with pytest.raises(RunFailedError, match="model must be a preset"):
        train_quietly(small_config(text, model=str(first.model), vocab_size=None), tmp_path / "run", cache_dir)


def test_a_model_in_the_home_folder(
    text: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_quietly(small_config(text), tmp_path / "first", cache_dir).run
    monkeypatch.setenv("HOME", str(tmp_path))
    config = small_config(text, model="~/first/model", vocab_size=None)
    assert train_quietly(config, tmp_path / "run", cache_dir).status == "finished"
    assert (tmp_path / "run" / "model" / "tokenizer.json").read_bytes() == (first.model / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="model must be a preset"):
        train_quietly(small_config(text, model="~nobody-here/model"), tmp_path / "other", cache_dir)


def test_an_interrupt_saves_although_a_damaged_checkpoint_of_the_step_exists(
    text: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(text, eval_every=100, checkpoint_every=3)
    run = train_quietly(config, tmp_path / "run", cache_dir).run.path
    damaged = run / "checkpoints" / "step-6"
    (damaged / "state.json").write_text("{}")
    train_step = Trainer.train_step

    def signalled(self: Trainer) -> StepResult:
        result = train_step(self)
        if self.step == 5:
            # The step that the damaged one is called after.
            damaged.rename(damaged.with_name("step-5"))
            os.kill(os.getpid(), signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled)
        assert train_quietly(config, run, cache_dir, resume=True).status == "interrupted"
    assert load_checkpoint(run / "checkpoints" / "step-5").step == 5


@pytest.mark.parametrize(("exits", "num_exits"), [("every:2", 1), ("0", 2)])
def test_options_of_the_exits_are_applied(
    text: Path, cache_dir: Path, tmp_path: Path, exits: str, num_exits: int
) -> None:
    config = small_config(text, exits=exits, steps=3, exit_norm="copy")
    run = train_quietly(config, tmp_path / "run", cache_dir).run.path
    assert len(records(run, "train")[0]["loss"]) == num_exits
    tensors = load_file(run / "model" / "exits.safetensors")
    assert any(name.startswith("exit_norms.") for name in tensors) == (num_exits > 1)
    assert "feedback.rows" in tensors


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 1e-2},
        {"betas": (0.5, 0.6)},
        {"weight_decay": 5.0},
        {"clip": 1e-3},
        {"label_smoothing": 0.3},
        {"z_loss": 0.1},
        {"seed": 5},
        {"precision": "bf16"},
        {"warmup_steps": 0},
        {"decay": "cosine"},
        {"final_lr": 0.9},
        {"accumulate": 2},
        {"exit_norm": "none"},
        {"train_blocks": False},
        {"vocab_size": 300},
        {"feedback": FeedbackSpec.parse("mirror:num_pairs=2")},
    ],
)
def test_every_option_changes_what_is_learned(
    text: Path, cache_dir: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"eval_every": 100, "checkpoint_every": 100, "sample_tokens": 0, "lr": 1e-3}
    plain = train_quietly(small_config(text, **options), tmp_path / "plain", cache_dir).run.path
    other = train_quietly(small_config(text, **{**options, **change}), tmp_path / "other", cache_dir).run.path
    assert records(plain, "valid")[-1]["loss"] != records(other, "valid")[-1]["loss"]


def test_logging_less_often_keeps_the_last_step(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    run = train_quietly(small_config(text, log_every=4), tmp_path / "run", cache_dir).run.path
    assert [line["step"] for line in records(run, "train")] == [4, 6]


def test_a_model_in_a_folder_is_trained_on(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    first = train_quietly(small_config(text, steps=30, lr=1e-2), tmp_path / "first", cache_dir).run.path
    config = small_config(text, model=str(first / "model"), vocab_size=None)
    second = train_quietly(config, tmp_path / "second", cache_dir).run.path
    untrained = train_quietly(small_config(text), tmp_path / "untrained", cache_dir).run.path
    assert records(second, "train")[0]["loss"][-1] < records(untrained, "train")[0]["loss"][-1] - 0.3
    with pytest.raises(ValueError, match="vocab_size is for presets"):
        train_quietly(small_config(text, model=str(first / "model")), tmp_path / "third", cache_dir)
    shutil.rmtree(first / "model")
    (first / "model").mkdir()
    with pytest.raises(ValueError, match="its tokenizer could not be loaded"):
        train_quietly(config, tmp_path / "third", cache_dir)


def test_a_model_without_its_tokenizer_is_refused_before_the_text_is_read(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`transformers` makes a GPT-2 tokenizer out of nothing: every text is then a single token."""
    sizes = {"vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("localexit.train.data.load_corpus", lambda *_: pytest.fail("the text was read"))
    with pytest.raises(ValueError, match=r"its tokenizer could not be loaded: it has no tokens .*save_pretrained"):
        load_data(small_config(text, model=str(tmp_path / "model"), vocab_size=None))


def test_devices_and_precisions_by_name() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    assert resolve_precision("auto", torch.device("cpu")) == torch.float32
    assert resolve_precision("bf16", torch.device("cpu")) == torch.bfloat16
    assert resolve_precision("fp32", torch.device("cpu")) == torch.float32
    with pytest.raises(ValueError, match=r"got 'vulkan'.*'Vulkan' backend$"):
        resolve_device("vulkan")


def _raising(train_step: Any, *, at: int, error: BaseException) -> Any:
    def step(self: Trainer) -> StepResult:
        if self.step == at:
            raise error
        return train_step(self)

    return step
