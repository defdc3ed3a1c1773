"""Runs whose exits take part in some steps, see some tokens, or have weights of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from localexit.report import exits_table, read_run, write_report
from localexit.train.config import TrainConfig
from train.small_runs import small_config, train_quietly
from train.test_trainer import make_trainer, parameters

SCHEDULES: list[dict[str, Any]] = [
    {"exits_per_step": 1},
    {"token_share": 0.3},
    {"exits_per_step": 1, "token_share": 0.5, "exit_warmup": 4, "exit_weights": (0.5, 2.0)},
]


@pytest.mark.parametrize("changes", SCHEDULES)
@pytest.mark.parametrize("backward", ["stream", "deferred"])
def test_a_resumed_run_draws_the_same_exits_and_tokens(changes: dict[str, Any], backward: str) -> None:
    whole, first, second = (make_trainer(backward=backward, **changes) for _ in range(3))
    for _ in range(6):
        whole.train_step()
    for _ in range(3):
        first.train_step()
    second.restore(first.snapshot())
    for _ in range(3):
        second.train_step()
    expected = parameters(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters(second).items())


def test_micro_batches_of_a_step_have_the_same_exits() -> None:
    whole = make_trainer(batch_size=8, exits_per_step=1)
    parts = make_trainer(batch_size=2, accumulate=4, exits_per_step=1)
    for _ in range(6):
        one, four = whole.train_step().losses, parts.train_step().losses
        assert sum(loss is None for loss in one) == 1
        assert [loss is None for loss in four] == [loss is None for loss in one]
        assert [loss for loss in four if loss is not None] == pytest.approx([x for x in one if x is not None], rel=1e-3)


def test_a_unit_whose_exit_sits_out_is_not_stepped() -> None:
    trainer = make_trainer(exits_per_step=1, weight_decay=0.5)
    for _ in range(4):
        before = [[p.clone() for p in unit.parameters()] for unit in trainer.local.units]
        losses = trainer.train_step().losses
        for unit, old, loss in zip(trainer.local.units, before, losses, strict=True):
            has_moved = any(not torch.equal(p, q) for p, q in zip(unit.parameters(), old, strict=True))
            assert has_moved == (loss is not None)


def test_a_run_with_cheap_exits_is_recorded_and_reported(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    config = small_config(text, exits_per_step=1, token_share=0.5, track="tensorboard")
    run = train_quietly(config, tmp_path / "run", cache_dir).run.path
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert all(sorted(loss is None for loss in row) == [False, True] for row in losses)
    read = read_run(run)
    assert exits_table(read).row_count == 2
    assert "not finite" not in write_report([run]).read_text(encoding="utf-8")


def test_options_of_exits_survive_json() -> None:
    config = TrainConfig(exits_per_step=2, token_share=0.25, exit_warmup=7, exit_weights=(1.0, 0.5))
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exits_per_step": 0}, "exits_per_step must be at least 1"),
        ({"token_share": 1.5}, "token_share must be in"),
        ({"exit_warmup": -1}, "exit_warmup must be at least 0"),
    ],
)
def test_bad_options_of_exits(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)
