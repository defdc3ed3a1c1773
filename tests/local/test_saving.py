"""Exits written beside a model and attached again elsewhere: the same logits and the same next step, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from local.decoders import VOCAB, WIDTH, batch, build, count_hooks, gradients
from local.rules import RULES, attached, rule
from localexit import LocalModel, attach, load_exits, save_exits
from localexit.feedback import Feedback, LogitAnchors, make_feedback, rule_options
from localexit.local.saving import EXITS_FILE, restore_exits
from localexit.local.schedule import ExitSchedule

OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {"rank": 5, "gain": 0.5},
    "sketch": {"rank": 6},
    "hybrid": {"rank": 7, "rank_exact": 2, "topk": 3},
    "parallel_gold": {"residual_rank": 4},
    "anchors": {"num_anchors": 3, "ridge": 0.01},
    "mirror_sampled": {"num_pairs": 4, "topk": 2, "num_draws": 3},
}


def trained(name: str, **options: Any) -> LocalModel:
    """A model after two steps of training."""
    local = attached(build(name), "mirror_sampled", **options)
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    for seed in (1, 2):
        step(local, seed)
        optimizer.step()
        optimizer.zero_grad()
        local.update()
    return local


def step(local: LocalModel, seed: int) -> torch.Tensor:
    output = local(*batch(seed))
    output.loss.backward()
    return output.exit_losses


def reloaded(local: LocalModel, folder: Path, **options: Any) -> LocalModel:
    """The same model from its files alone, in another folder than it was written to."""
    from transformers import AutoModelForCausalLM

    local.model.save_pretrained(folder / "written")  # type: ignore[operator]
    save_exits(local, folder / "written")
    shutil.move(folder / "written", folder / "read")
    model = AutoModelForCausalLM.from_pretrained(folder / "read", dtype=torch.float64)
    return load_exits(model.train(), folder / "read", **options)


@pytest.mark.parametrize("exit_norm", ["shared", "copy", "none"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_reloaded_model_has_the_same_exits_and_takes_the_same_step(name: str, exit_norm: str, tmp_path: Path) -> None:
    schedule = ExitSchedule(token_share=0.5, warmup=(0, 4))
    before = trained(name, exit_norm=exit_norm, exits=[0, 2], exit_weights=[0.5, 2.0], z_loss=0.01, schedule=schedule)
    after = reloaded(before, tmp_path)
    ids, _ = batch(3)
    for index in range(2):
        assert torch.equal(before.eval().exit_logits(index, ids), after.eval().exit_logits(index, ids))
    assert after.exit_weights == (0.5, 2.0)
    assert after.schedule == schedule
    assert torch.equal(step(before.train(), 4), step(after.train(), 4))
    expected, got = gradients(before), gradients(after)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_the_folder_is_made_with_those_it_is_in(tmp_path: Path) -> None:
    assert save_exits(attached(build("plain")), tmp_path / "runs" / "mine").is_relative_to(tmp_path / "runs" / "mine")
    assert (tmp_path / "runs" / "mine" / EXITS_FILE).is_file()


def test_a_module_of_the_callers_is_given_again(tmp_path: Path) -> None:
    before = trained("llama", exit_norm=nn.RMSNorm(WIDTH).double())
    save_exits(before, tmp_path)
    with pytest.raises(ValueError, match="exit_norm: .* pass one like it"):
        load_exits(build("llama"), tmp_path)
    after = reloaded(before, tmp_path, exit_norm=nn.RMSNorm(WIDTH).double())
    ids, _ = batch()
    assert torch.equal(before.eval().exit_logits(0, ids), after.eval().exit_logits(0, ids))


class OwnRule(LogitAnchors):
    name = "own"


def test_a_rule_of_the_callers_is_given_again(tmp_path: Path) -> None:
    def own() -> Feedback:
        return OwnRule(hidden_size=WIDTH, vocab_size=VOCAB, num_anchors=4)

    local = attach(build("plain"), feedback=own())
    local.update()
    save_exits(local, tmp_path)
    with pytest.raises(ValueError, match="'own', a rule that make_feedback does not know; pass one like it"):
        load_exits(build("plain"), tmp_path)
    with pytest.raises(ValueError, match="expected a rule like the saved 'own', got 'anchors'"):
        load_exits(build("plain"), tmp_path, feedback=rule("anchors"))
    assert load_exits(build("plain"), tmp_path, feedback=own()).feedback.step == 1


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_built_again_from_its_options(name: str) -> None:
    made = make_feedback(name, WIDTH, VOCAB, seed=5, **OPTIONS.get(name, {}))
    again = make_feedback(name, WIDTH, VOCAB, seed=5, **json.loads(json.dumps(rule_options(made))))
    assert again.spec() == made.spec()
    assert all(torch.equal(a, b) for a, b in zip(again.buffers(), made.buffers(), strict=True))
    assert rule_options(made).items() >= OPTIONS.get(name, {}).items()


def test_exits_of_another_model_are_refused(tmp_path: Path) -> None:
    save_exits(attached(build("plain"), "mirror"), tmp_path)
    with pytest.raises(ValueError, match=r"\[V, D\]=\[37, 12\], which this model does not have"):
        load_exits(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)), tmp_path)
    with pytest.raises(ValueError, match="exits has block 2, but the model has 2 blocks"):
        load_exits(build("plain", 2), tmp_path)


def test_tensors_of_another_shape_are_named(tmp_path: Path) -> None:
    save_exits(attached(build("plain"), "mirror", exit_norm="copy"), tmp_path)
    other = attach(build("plain"), feedback=make_feedback("mirror", WIDTH, VOCAB, storage="bf16"), exit_norm="copy")
    tensors = load_file(tmp_path / EXITS_FILE)
    with safe_open(tmp_path / EXITS_FILE, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors | {"feedback.rows": torch.zeros(3, 2)}, tmp_path / EXITS_FILE, metadata=metadata)
    with pytest.raises(ValueError, match=r"does not fit the exits of this model \(feedback.rows\); one of them"):
        restore_exits(other, tmp_path)


def change(path: Path, settings: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the settings in the file's metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata["attach"] = json.dumps(settings(json.loads(metadata["attach"])))
    save_file(load_file(path), path, metadata=metadata)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (lambda _: [], "it does not say how"),
        (lambda _: {}, r"it does not say how .*KeyError"),
        (lambda old: old | {"exits": 3}, "it does not say how"),
        (lambda old: old | {"feedback": "mirror"}, "it does not say how"),
        (lambda old: old | {"schedule": {"warmup": 1, "luck": 2}}, "it does not say how"),
        (lambda old: old | {"exit_norm": "layer"}, "exit_norm must be one of"),
        (lambda old: old | {"feedback": old["feedback"] | {"name": "dense", "options": {}}}, "does not fit the exits"),
        (lambda old: old | {"feedback": old["feedback"] | {"vocab_size": 10**15}}, "which this model does not have"),
    ],
)
def test_settings_that_are_none_are_refused(settings: Callable[[Any], Any], reason: str, tmp_path: Path) -> None:
    change(save_exits(attached(build("plain"), "mirror"), tmp_path), settings)
    model = build("plain")
    with pytest.raises(ValueError, match=reason):
        load_exits(model, tmp_path)
    assert count_hooks(model) == 0


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"exits\.safetensors cannot be read .* missing or damaged"):
        load_exits(build("plain"), tmp_path)
    path = save_exits(attached(build("plain")), tmp_path)
    save_file(load_file(path), path, metadata={"format": "2"})
    with pytest.raises(ValueError, match="expected exits of format 1, got '2'"):
        load_exits(build("plain"), tmp_path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="cannot be read"):
        load_exits(build("plain"), tmp_path)


# peft reads an attribute that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("exit_body", ["norm", "block"])
def test_adapters_and_exits_lie_in_one_folder(exit_body: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    local = attached(peft.get_peft_model(build("llama"), config), exit_norm="copy", exit_body=exit_body)
    optimizer = torch.optim.SGD([p for p in local.parameters() if p.requires_grad], lr=0.1)
    step(local, 1)
    optimizer.step()
    local.model.save_pretrained(tmp_path)
    save_exits(local, tmp_path)
    again = load_exits(peft.PeftModel.from_pretrained(build("llama"), tmp_path), tmp_path)
    assert type(again.model) is type(local.model)
    for index in range(3):
        assert torch.equal(again.exit_logits(index, batch()[0]), local.exit_logits(index, batch()[0]))
