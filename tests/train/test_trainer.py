from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from localexit import Dense
from localexit.train.checkpoint import CheckpointError, Snapshot
from localexit.train.config import FeedbackSpec, TrainConfig
from localexit.train.models import attach_exits, build_model
from localexit.train.trainer import Trainer

VOCAB, CONTEXT = 61, 12


class RandomBatches:
    """A sampler of random ids, rows after rows of one fixed stream."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size, self.position = batch_size, 0
        self.rows = torch.randint(VOCAB, (64, CONTEXT), generator=torch.Generator().manual_seed(4))

    def next_batch(self) -> Tensor:
        first = self.position % len(self.rows)
        self.position += self.batch_size
        return self.rows[first : first + self.batch_size]

    def state(self) -> dict[str, int]:
        return {"position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def make_trainer(**changes: Any) -> Trainer:
    options: dict[str, Any] = {"model": "tiny", "steps": 10, "warmup_steps": 2, "context": CONTEXT, "batch_size": 4}
    config = TrainConfig(**{**options, **changes})
    model = build_model(config, vocab_size=VOCAB, end_of_text_id=0)
    local = attach_exits(model, config, device=torch.device("cpu"))
    return Trainer(local, RandomBatches(config.batch_size), config)  # type: ignore[arg-type]


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.local.state_dict().items()}


def test_a_step_lowers_the_loss_and_counts() -> None:
    trainer = make_trainer(lr=1e-2, steps=40, batch_size=32)
    results = [trainer.train_step() for _ in range(40)]
    assert [result.step for result in results] == list(range(1, 41))
    assert [result.tokens for result in results] == [32 * CONTEXT * step for step in range(1, 41)]
    assert results[-1].losses[-1] < results[0].losses[-1] - 0.5
    assert len(results[0].losses) == 2
    assert len(results[0].grad_norms) == 3
    assert results[0].lr < results[2].lr > results[-1].lr
    assert int(trainer.local.feedback.step) == 40


@pytest.mark.parametrize("backward", ["stream", "deferred"])
def test_micro_batches_are_one_batch(backward: str) -> None:
    whole = make_trainer(batch_size=8, backward=backward, feedback=FeedbackSpec.parse("transport"))
    parts = make_trainer(batch_size=2, accumulate=4, backward=backward, feedback=FeedbackSpec.parse("transport"))
    for _ in range(3):
        one, four = whole.train_step(), parts.train_step()
        assert four.tokens == one.tokens
        assert four.losses == pytest.approx(one.losses, rel=1e-5)
        assert four.grad_norms == pytest.approx(one.grad_norms, rel=1e-4)


def test_stream_and_deferred_train_alike() -> None:
    stream, deferred = make_trainer(backward="stream"), make_trainer(backward="deferred")
    for _ in range(3):
        assert stream.train_step().losses == pytest.approx(deferred.train_step().losses, rel=1e-5)


def test_the_optimiser_decays_matrices_and_embeddings_only() -> None:
    trainer = make_trainer(weight_decay=0.3)
    decayed, plain = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(parameter.dim() >= 2 for parameter in decayed["params"])
    assert all(parameter.dim() == 1 for parameter in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(trainer.local.parameters()))


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_the_learning_rate_rises_and_falls_to_its_end(decay: str, warmup_steps: int) -> None:
    trainer = make_trainer(lr=1e-2, final_lr=0.1, decay=decay, warmup_steps=warmup_steps)
    rates = [trainer.train_step().lr for _ in range(10)]
    assert max(rates) == rates[warmup_steps] == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-3)
    assert rates[:warmup_steps] == sorted(rates[:warmup_steps])
    assert rates[warmup_steps:] == sorted(rates[warmup_steps:], reverse=True)


@pytest.mark.parametrize("backward", ["stream", "deferred"])
@pytest.mark.parametrize("exit_norm", ["shared", "copy", "none"])
def test_frozen_blocks_stay_while_the_readout_learns(backward: str, exit_norm: str) -> None:
    trainer = make_trainer(train_blocks=False, backward=backward, exit_norm=exit_norm)
    before = parameters(trainer)
    for _ in range(3):
        trainer.train_step()
    changed = {name for name, tensor in parameters(trainer).items() if not torch.equal(tensor, before[name])}
    learned = {name for name in changed if not name.startswith("feedback.")}
    norms = {name for name in before if name.startswith("exit_norms.") or name == "model.model.norm.weight"}
    assert learned == {"model.lm_head.weight", *norms}


@pytest.mark.parametrize("rule", ["mirror_sampled", "dense", "anchors", "transport"])
@pytest.mark.parametrize("exit_norm", ["shared", "copy"])
def test_a_restored_trainer_goes_on_bit_by_bit(rule: str, exit_norm: str) -> None:
    options: dict[str, Any] = {"feedback": FeedbackSpec.parse(rule), "exit_norm": exit_norm, "seed": 3}
    one = make_trainer(**options)
    for _ in range(3):
        one.train_step()
    snapshot = one.snapshot()
    saved = Snapshot(
        step=snapshot.step,
        tensors={file: {k: t.clone() for k, t in tensors.items()} for file, tensors in snapshot.tensors.items()},
        state=snapshot.state,
    )
    rest = [one.train_step() for _ in range(4)]
    other = make_trainer(**{**options, "threads": 1})
    other.restore(saved)
    again = [other.train_step() for _ in range(4)]
    assert [r.losses for r in again] == [r.losses for r in rest]
    assert [(r.step, r.tokens, r.lr, r.grad_norms) for r in again] == [
        (r.step, r.tokens, r.lr, r.grad_norms) for r in rest
    ]
    expected = parameters(one)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters(other).items())


def test_tied_weights_are_saved_once_and_restored() -> None:
    trainer = make_trainer()
    trainer.local.model.model.embed_tokens.weight = trainer.local.model.lm_head.weight
    saved = trainer.snapshot()
    names = [name for name in saved.tensors["model"] if name.endswith(("lm_head.weight", "embed_tokens.weight"))]
    assert len(names) == 1
    with torch.no_grad():
        kept = trainer.local.model.lm_head.weight.clone()
        tensors = {name: tensor.clone() for name, tensor in saved.tensors["model"].items()}
        trainer.local.model.lm_head.weight.zero_()
    trainer.restore(Snapshot(step=0, tensors={**saved.tensors, "model": tensors}, state=saved.state))
    assert torch.equal(trainer.local.model.lm_head.weight, kept)


@pytest.mark.parametrize("change", [{"exit_norm": "copy"}, {"feedback": FeedbackSpec.parse("dense")}])
def test_a_snapshot_of_another_model_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="checkpoint step-0 does not fit this run"):
        make_trainer(**change).restore(make_trainer().snapshot())


def test_the_size_of_the_unembedding_is_an_option_and_changes_nothing_else() -> None:
    plain, large = make_trainer().local.model, make_trainer(unembedding_std=0.08).local.model
    for (name, ours), (_, theirs) in zip(large.named_parameters(), plain.named_parameters(), strict=True):
        factor = 4.0 if name == "lm_head.weight" else 1.0
        torch.testing.assert_close(ours, factor * theirs, msg=name)
    assert float(plain.lm_head.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_the_unembedding_can_start_as_what_the_codes_stand_for() -> None:
    codes = {"feedback": FeedbackSpec.parse("dense:rank=8"), "unembedding_std": 0.05}
    plain, local = make_trainer(**codes).local, make_trainer(unembedding_init="codes", **codes).local
    rule, weight = local.feedback, local.unembedding.weight.detach()
    assert isinstance(rule, Dense)
    torch.testing.assert_close(weight, rule.initial_weight(std=0.05))
    for (name, ours), (_, theirs) in zip(local.model.named_parameters(), plain.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs) != (name == "lm_head.weight"), name
