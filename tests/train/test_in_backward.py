"""Runs whose units are stepped in the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from localexit.train.config import FeedbackSpec, TrainConfig
from localexit.train.errors import NonFiniteError
from train.test_trainer import make_trainer, parameters

OPTIONS: dict[str, Any] = {"optimizer": "in_backward", "lr": 1e-2, "feedback": FeedbackSpec.parse("mirror_sampled")}


def test_it_is_the_same_run() -> None:
    whole, stepped = make_trainer(**{**OPTIONS, "optimizer": "after_backward"}), make_trainer(**OPTIONS)
    for _ in range(6):
        expected, got = whole.train_step(), stepped.train_step()
        assert got.losses == pytest.approx(expected.losses, rel=1e-6)
        assert got.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
        assert got.lr == expected.lr
    reference = parameters(whole)
    for name, tensor in parameters(stepped).items():
        torch.testing.assert_close(tensor, reference[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_a_resumed_run_is_the_uninterrupted_one() -> None:
    whole, first, second = (make_trainer(**OPTIONS) for _ in range(3))
    for _ in range(6):
        whole.train_step()
    for _ in range(3):
        first.train_step()
    second.restore(first.snapshot())
    for _ in range(3):
        second.train_step()
    expected = parameters(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters(second).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 2}, "expected accumulate=1, got 2"),
        ({"backward": "deferred"}, "expected backward='stream', got 'deferred'"),
        ({"non_finite": "skip"}, "expected non_finite='stop', got 'skip'"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"optimizer='in_backward' steps each unit .*: {message}"):
        TrainConfig(optimizer="in_backward", **changes)


def test_a_step_that_is_not_finite_says_that_it_was_made() -> None:
    trainer = make_trainer(**OPTIONS)
    with torch.no_grad():
        next(iter(trainer.local.units[1].parameters())).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="units were stepped with them"):
        trainer.train_step()
