"""A NaN or an infinity never reaches the optimiser: the run stops, or leaves the batch out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localexit import LocalModel
from localexit.train.checkpoint import load_checkpoint
from localexit.train.config import FeedbackSpec
from localexit.train.errors import NonFiniteError
from localexit.train.trainer import Trainer
from train.small_runs import small_config, train_quietly
from train.test_trainer import make_trainer

STEPS = 20
PLACES = ("hidden", "weight", "loss", "gradient")
VALUES = (float("nan"), float("inf"), -float("inf"))


@contextmanager
def broken(local: LocalModel, place: str, value: float) -> Iterator[None]:
    """One number of what a forward computes with, or of a gradient it makes, is `value`."""
    block, weight = local.model.model.layers[0], local.unembedding.weight
    if place == "weight":
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[3, 0] = value
        yield
        with torch.no_grad():
            weight.copy_(kept)
    elif place == "loss":
        yield
    else:
        handle = (
            block.register_forward_hook(lambda _module, _inputs, out: with_value(out, value))
            if place == "hidden"
            else block.mlp.down_proj.weight.register_hook(lambda grad: with_value(grad, value))
        )
        yield
        handle.remove()


def with_value(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = value
    return tensor


def break_next_batch(trainer: Trainer, place: str, value: float) -> None:
    gradients = trainer._gradients

    def once(batches: list[Tensor]) -> Tensor:
        del trainer._gradients
        with broken(trainer.local, place, value):
            losses = gradients(batches)
        return with_value(losses, value) if place == "loss" else losses

    trainer._gradients = once  # type: ignore[method-assign]


def watch_optimizer(trainer: Trainer) -> list[int]:
    """Look at what the optimiser gets to see; a list that grows by one a step."""
    steps: list[int] = []

    def look(*_: Any) -> None:
        grads = [p.grad for p in trainer.local.parameters() if p.grad is not None]
        assert grads
        assert all(bool(torch.isfinite(grad).all()) for grad in grads)
        steps.append(trainer.step)

    trainer.optimizer.register_step_pre_hook(look)
    return steps


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Parameters, the rule's state and the optimiser's, copied."""
    snapshot = trainer.snapshot()
    tensors = {
        f"{file}.{key}": t.clone() for file in ("model", "optimizer") for key, t in snapshot.tensors[file].items()
    }
    return {key: tensor for key, tensor in tensors.items() if not key.endswith("_extra_state")}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())


@pytest.mark.parametrize(("value", "backward"), [(VALUES[0], "stream"), (VALUES[1], "deferred"), (VALUES[2], "stream")])
@pytest.mark.parametrize("place", PLACES)
def test_a_run_stops_before_the_optimiser_sees_it(place: str, value: float, backward: str) -> None:
    trainer = make_trainer(steps=STEPS, backward=backward, feedback=FeedbackSpec.parse("mirror_sampled:topk=2"))
    seen = watch_optimizer(trainer)
    for step in range(STEPS):
        before = state(trainer)
        break_next_batch(trainer, place, value)
        with pytest.raises(NonFiniteError, match=f"step {step + 1}: expected finite losses and gradients, got"):
            trainer.train_step()
        assert_same(state(trainer), before)
        assert trainer.train_step().step == step + 1
    assert seen == list(range(STEPS))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rule", ["mirror", "transport_sampled"])
def test_a_skipped_batch_leaves_no_trace(place: str, rule: str) -> None:
    """As if the batches left out had not been in the text."""
    options: dict[str, Any] = {"steps": STEPS, "feedback": FeedbackSpec.parse(rule)}
    trainer = make_trainer(**options, non_finite="skip", max_skipped=STEPS)
    plain = make_trainer(**options)
    seen = watch_optimizer(trainer)
    for step in range(STEPS):
        break_next_batch(trainer, place, VALUES[step % 3])
        result = trainer.train_step()
        assert len(result.skipped) == 1
        assert f"the batch was left out, {step + 1} of at most {STEPS}" in result.skipped[0]
        plain.sampler.next_batch()
        expected = plain.train_step()
        assert (result.losses, result.grad_norms, result.lr) == (expected.losses, expected.grad_norms, expected.lr)
    assert_same(state(trainer), state(plain))
    assert seen == list(range(STEPS))


def test_a_run_that_skips_too_often_stops() -> None:
    trainer = make_trainer(non_finite="skip", max_skipped=2)
    for _ in range(2):
        break_next_batch(trainer, "hidden", float("nan"))
        trainer.train_step()
    before = state(trainer)
    break_next_batch(trainer, "hidden", float("nan"))
    with pytest.raises(NonFiniteError, match="2 batches were skipped before, and max_skipped=2 allows no more"):
        trainer.train_step()
    assert_same(state(trainer), before)


def test_what_was_skipped_is_counted_through_a_resume(
    text: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = Trainer._gradients
    calls: list[int] = []

    def sometimes(self: Trainer, batches: list[Tensor]) -> Tensor:
        calls.append(self.step)
        losses = gradients(self, batches)
        return with_value(losses, float("nan")) if calls.count(self.step) == 1 and self.step in (1, 4) else losses

    config = small_config(text, non_finite="skip", max_skipped=1)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_gradients", sometimes)
        with pytest.raises(NonFiniteError, match="step 5: .*1 batches were skipped before"):
            train_quietly(config, run, cache_dir)
        calls.clear()
        # From step 3 on, with the count that the checkpoint has.
        with pytest.raises(NonFiniteError, match="step 5: .*1 batches were skipped before"):
            train_quietly(config, run, cache_dir, resume=True)
        calls.clear()
        assert train_quietly(small_config(text, non_finite="skip"), run, cache_dir, resume=True).status == "finished"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [(line["event"], line["step"]) for line in lines if line["kind"] == "event"]
    failed = [("resumed", 3), ("non_finite", 4)]
    assert events == [
        ("started", 0),
        ("skipped", 2),
        ("non_finite", 4),
        *failed,
        ("resumed", 3),
        ("skipped", 5),
        ("finished", 6),
    ]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert load_checkpoint(run / "checkpoints" / "step-6").state["skipped"] == 2
