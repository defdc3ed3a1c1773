"""Runs on several processes: the same training, one folder, and what happens when a process ends."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.ranks import rank_replies
from localexit.train.config import FeedbackSpec, TrainConfig
from localexit.train.launch import world_rank
from localexit.train.loop import Outcome
from localexit.train.trainer import Trainer
from train.small_runs import die_in_save, small_config, train_quietly


def config_of(text: Path, **changes: Any) -> TrainConfig:
    feedback = FeedbackSpec.parse("mirror_sampled:num_pairs=16")
    return small_config(text, **{"batch_size": 4, "feedback": feedback, **changes})


def train_on(
    num_ranks: int, config: TrainConfig, run: Path, cache_dir: Path, *, resume: bool = False, **limits: float
) -> list[Outcome]:
    replies = rank_replies(train_one, num_ranks, config, run, cache_dir, resume, **limits)
    assert [error for error, _ in replies if error] == []
    return [outcome for _, outcome in replies]


def train_one(config: TrainConfig, run: Path, cache_dir: Path, resume: bool) -> Outcome:
    return train_quietly(config, run, cache_dir, resume=resume)


def records(run: Path) -> list[dict[str, Any]]:
    """What was measured, times left out."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = ("kind", "step", "tokens", "lr", "loss", "grad_norm", "accuracy", "text")
    return [{key: line[key] for key in kept if key in line} for line in lines if line["kind"] != "event"]


def assert_same_run(run: Path, other: Path) -> None:
    """The same up to rounding."""
    mine, theirs = records(run), records(other)
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        for key, value in b.items():
            if isinstance(value, list):
                # An exit that sat the step out has no loss.
                assert [number is None for number in a[key]] == [number is None for number in value], key
                assert [n or 0 for n in a[key]] == pytest.approx([n or 0 for n in value], rel=1e-3), key
            else:
                assert a[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3)), key
    model, expected = (load_file(path / "model/model.safetensors") for path in (run, other))
    for name, tensor in expected.items():
        torch.testing.assert_close(model[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def alone(text: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train_quietly(config_of(text), run, cache_dir)
    return run


def test_two_processes_train_like_one(text: Path, cache_dir: Path, alone: Path, tmp_path: Path) -> None:
    outcomes = train_on(2, config_of(text), tmp_path / "run", cache_dir)
    assert [(outcome.status, outcome.is_main) for outcome in outcomes] == [("finished", True), ("finished", False)]
    assert_same_run(tmp_path / "run", alone)


def train_with_a_late_process(config: TrainConfig, run: Path, cache_dir: Path) -> Outcome:
    """The second process found the folder that the main one had just made, and thinks that it is to resume."""
    return train_one(config, run, cache_dir, resume=world_rank() == 1)


@pytest.mark.slow
def test_the_main_process_decides_whether_to_resume(text: Path, cache_dir: Path, alone: Path, tmp_path: Path) -> None:
    replies = rank_replies(train_with_a_late_process, 2, config_of(text), tmp_path / "run", cache_dir)
    assert [error for error, _ in replies if error] == []
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("backward", ["stream", "deferred"])
def test_accumulation(backward: str, text: Path, cache_dir: Path, tmp_path: Path) -> None:
    config = config_of(text, accumulate=2, batch_size=2, backward=backward)
    train_on(2, config, tmp_path / "two", cache_dir)
    train_quietly(config, tmp_path / "one", cache_dir)
    assert_same_run(tmp_path / "two", tmp_path / "one")


def stop_at(step: int, number: int, rank: int) -> None:
    """Have a process send itself a signal after a step."""
    made = Trainer.train_step

    def train_step(self: Trainer) -> Any:
        result = made(self)
        if self.step == step and (self.ranks is None or self.ranks.rank == rank):
            os.kill(os.getpid(), number)
        return result

    Trainer.train_step = train_step  # type: ignore[method-assign]


def train_until(step: int, number: int, rank: int, config: TrainConfig, run: Path, cache_dir: Path) -> Outcome:
    stop_at(step, number, rank)
    return train_quietly(config, run, cache_dir)


@pytest.mark.slow
@pytest.mark.parametrize("then", [1, 2, 4])
def test_resume_with_another_number_of_processes(
    then: int, text: Path, cache_dir: Path, alone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    replies = rank_replies(train_until, 4, 2, signal.SIGTERM, 3, config_of(text), run, cache_dir)
    assert [(error, outcome.status) for error, outcome in replies] == [(None, "interrupted")] * 4
    assert (run / "checkpoints/step-2").is_dir()
    train_on(then, config_of(text), run, cache_dir, resume=True)
    assert_same_run(run, alone)


@pytest.mark.slow
def test_a_killed_process_ends_the_others(text: Path, cache_dir: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = rank_replies(train_until, 2, 4, signal.SIGKILL, 1, config_of(text), run, cache_dir, timeout=40)
    assert second == ("a rank died", None)
    assert "RunFailedError" in str(first[0])
    assert "process 0 of 2 stopped" in str(first[0])
    assert "continue with --resume" in str(first[0])
    # At most the steps since the last checkpoint are lost.
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-3"]
    train_on(2, config_of(text), run, cache_dir, resume=True)
    assert_same_run(run, alone)


@pytest.mark.slow
def test_sharded_from_four_processes_to_two_to_one(text: Path, cache_dir: Path, alone: Path, tmp_path: Path) -> None:
    """Every checkpoint is read by another number of processes than wrote it; the model is exported whole."""
    run, config = tmp_path / "run", config_of(text, shard=True)
    replies = rank_replies(train_until, 4, 2, signal.SIGTERM, 3, config, run, cache_dir)
    assert [(error, outcome.status) for error, outcome in replies] == [(None, "interrupted")] * 4
    assert len(list((run / "checkpoints/step-2").glob("shard-*.safetensors"))) == 4
    replies = rank_replies(resume_until, 2, 4, signal.SIGTERM, 0, config, run, cache_dir)
    assert [(error, outcome.status) for error, outcome in replies] == [(None, "interrupted")] * 2
    assert len(list((run / "checkpoints/step-4").glob("shard-*.safetensors"))) == 2
    train_on(1, config, run, cache_dir, resume=True)
    assert_same_run(run, alone)
    assert not list(run.glob("checkpoints/.*"))


@pytest.mark.slow
def test_sharded_with_exits_that_sit_out(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    """All processes draw the same exits; what has not been stepped yet has no optimiser state in a checkpoint."""
    config, whole = config_of(text, shard=True, exits_per_step=1), tmp_path / "whole"
    train_quietly(config, whole, cache_dir)
    run = tmp_path / "run"
    replies = rank_replies(train_until, 2, 1, signal.SIGTERM, 1, config, run, cache_dir)
    assert [(error, outcome.status) for error, outcome in replies] == [(None, "interrupted")] * 2
    train_on(2, config, run, cache_dir, resume=True)
    assert_same_run(run, whole)


def resume_until(step: int, number: int, rank: int, config: TrainConfig, run: Path, cache_dir: Path) -> Outcome:
    stop_at(step, number, rank)
    return train_quietly(config, run, cache_dir, resume=True)


@pytest.mark.slow
def test_a_damaged_shard_is_noticed(text: Path, cache_dir: Path, alone: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", config_of(text, shard=True)
    train_on(2, config, run, cache_dir)
    shard = next((run / "checkpoints/step-6").glob("shard-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    train_on(2, config, run, cache_dir, resume=True)
    skipped = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "skipped checkpoint step-6" in line]
    assert len(skipped) == 1
    assert_same_run(run, alone)


def save_and_die(config: TrainConfig, run: Path, cache_dir: Path) -> Outcome:
    die_in_save()
    return train_quietly(config, run, cache_dir)


@pytest.mark.slow
def test_killed_while_saving(text: Path, cache_dir: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = rank_replies(save_and_die, 2, config_of(text), run, cache_dir, timeout=40)
    assert first == ("a rank died", None)
    assert "RunFailedError" in str(second[0])
    train_on(2, config_of(text), run, cache_dir, resume=True)
    assert_same_run(run, alone)


def test_a_batch_that_cannot_be_shared_is_refused(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    config = config_of(text, batch_size=3)
    for error, _ in rank_replies(train_one, 2, config, tmp_path / "run", cache_dir, False):
        assert "batch_size: expected a multiple of the 2 processes that share a batch, got 3" in str(error)
    assert not (tmp_path / "run").exists()
