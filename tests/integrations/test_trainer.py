"""A real run of `transformers.Trainer`: the steps of an explicit loop, with accumulation, evaluation and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from local.decoders import VOCAB, build
from localexit import LocalModel, attach, load_exits
from localexit.integrations.trainer import LocalCallback

ACCUMULATE, STEPS, LR = 2, 4, 1e-2


def rows(num: int, *, seed: int = 0) -> list[dict[str, Tensor]]:
    """Token ids of a text with a pattern, and labels of which some are left out."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(num):
        ids = (torch.arange(9) * 3 + torch.randint(VOCAB, (1,), generator=generator)) % VOCAB
        labels = ids.clone()
        labels[: index % 4] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


class Collator:
    """Stacks rows, and remembers every batch."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.batches.append({key: torch.stack([item[key] for item in items]) for key in items[0]})
        return dict(self.batches[-1])


def local_model(**options: Any) -> LocalModel:
    return attach(build("llama").float(), feedback="mirror_sampled", exit_norm="copy", seed=3, **options)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATE,
        "max_steps": STEPS,
        "max_grad_norm": 0,
        "lr_scheduler_type": "constant",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **(settings | options))


def trainer_of(local: LocalModel, folder: Path, collator: Collator | None = None, **options: Any) -> Trainer:
    return Trainer(
        local.model,
        arguments(folder, **options),
        train_dataset=rows(32),
        eval_dataset=rows(6, seed=9),
        data_collator=collator or Collator(),
        optimizers=(torch.optim.AdamW(local.parameters(), lr=LR, weight_decay=0.0), None),
        callbacks=[LocalCallback(local, max_grad_norm=0.5)],
    )


def state(local: LocalModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in local.state_dict().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_trainer_takes_the_steps_of_an_explicit_loop(tmp_path: Path) -> None:
    collator, local = Collator(), local_model()
    trainer_of(local, tmp_path, collator).train()

    explicit = local_model()
    optimizer = torch.optim.AdamW(explicit.parameters(), lr=LR, weight_decay=0.0)
    for step in range(STEPS):
        batches = collator.batches[step * ACCUMULATE : (step + 1) * ACCUMULATE]
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        for batch in batches:
            explicit(**batch, num_items=count).loss.backward()
        explicit.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
        explicit.update()
    found, expected = state(local), state(explicit)
    assert found["feedback.step"] == STEPS
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("event", ["on_init_end", "on_train_begin"])
def test_rule_and_exits_follow_the_model_to_its_device(event: str, tmp_path: Path) -> None:
    """Trainer moves the model that it is given, to a GPU where there is one, and knows nothing of the exits."""
    local = local_model()
    trainer = trainer_of(local, tmp_path)
    local.model.to("meta")
    optimizer = torch.optim.AdamW(local.parameters())
    callback = LocalCallback(local)
    getattr(callback, event)(trainer.args, trainer.state, trainer.control, optimizer=optimizer)
    assert {tensor.device.type for tensor in (*local.parameters(), *local.buffers())} == {"meta"}


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = local_model()
    trainer_of(whole, tmp_path / "whole").train()
    trainer_of(local_model(), tmp_path / "parts", max_steps=2).train()
    resumed = local_model()
    trainer_of(resumed, tmp_path / "parts").train(resume_from_checkpoint=True)
    assert_equal(state(resumed), state(whole))
    assert resumed.feedback.rows.abs().max() > 0


def test_a_checkpoint_is_a_model_with_its_exits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    local = local_model()
    trainer_of(local, tmp_path).train()
    folder = tmp_path / f"checkpoint-{STEPS}"
    again = load_exits(AutoModelForCausalLM.from_pretrained(folder), folder)
    ids = rows(1)[0]["input_ids"][None]
    for index in range(3):
        assert torch.equal(again.exit_logits(index, ids), local.eval().exit_logits(index, ids))


def test_evaluation_is_that_of_the_last_exit(tmp_path: Path) -> None:
    local = local_model()
    trainer = trainer_of(local, tmp_path, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=6)
    before = local.evaluate(**Collator()(rows(6, seed=9))).loss
    trainer.train()
    after = local.evaluate(**Collator()(rows(6, seed=9))).loss
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logged) == STEPS // 2
    assert logged[-1] == pytest.approx(float(after[-1]), rel=1e-4)
    assert after[-1] < before[-1] - 0.1


@pytest.mark.parametrize(
    ("attached", "options", "reason"),
    [
        ({}, {"max_grad_norm": 1.0}, r"expected TrainingArguments\(max_grad_norm=0\), got 1.0"),
        ({"backward": "stream"}, {}, "expected a model attached with 'deferred', got 'stream'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    attached: dict[str, Any], options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        trainer_of(local_model(**attached), tmp_path, **options).train()


def test_parameters_that_no_optimizer_has_are_named(tmp_path: Path) -> None:
    local = local_model()
    trainer = trainer_of(local, tmp_path)
    trainer.optimizer = torch.optim.SGD(local.model.parameters(), lr=LR)
    with pytest.raises(ValueError, match=r"expected one over local.parameters\(\), but exit_norms"):
        trainer.train()


def test_a_checkpoint_without_exits_is_not_resumed_from(tmp_path: Path) -> None:
    trainer_of(local_model(), tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2" / "exits.safetensors").unlink()
    with pytest.raises(ValueError, match=r"exits\.safetensors cannot be read"):
        trainer_of(local_model(), tmp_path).train(resume_from_checkpoint=True)
