"""The exits of a model as one file beside it: written after training, attached again wherever the model is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from localexit.feedback import RULES, Feedback, make_feedback, rule_options
from localexit.local.attach import attach
from localexit.local.model import LocalModel, check_attached
from localexit.local.schedule import ExitSchedule

EXITS_FILE = "exits.safetensors"
FORMAT = "1"


def save_exits(local: LocalModel, folder: str | Path) -> Path:
    """Write `exits.safetensors`: what the exits have beside the model, and how they were attached.

    The model itself is saved by its own means (`model.save_pretrained(folder)`, for one); attached or not makes no
    difference to that.

    Args:
        local: the model with its exits.
        folder: of the model; made when it does not exist.

    Returns:
        The file. Its tensors are the exits' norms and bodies that are not part of the model, and the rule's state; its
        metadata has the arguments of `attach`.

    Raises:
        TypeError: `local` is not attached.
    """
    check_attached(local)
    local.refuse_vocab_parallel("save_exits()")
    path = Path(folder) / EXITS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(_tensors(local), path, metadata={"format": FORMAT, "attach": json.dumps(_settings(local))})
    return path


def load_exits(
    model: nn.Module,
    folder: str | Path,
    *,
    feedback: Feedback | None = None,
    exit_norm: nn.Module | None = None,
    backward: str = "deferred",
) -> LocalModel:
    """Give a model the exits that `save_exits` wrote: logits at every exit, and the next step, are what they were.

    Args:
        model: the model, loaded by its own means, on its device.
        folder: where `exits.safetensors` is.
        feedback: for a rule that `make_feedback` does not know: one like it. Its state is loaded.
        exit_norm: for exits with a module of the caller's as their norm: one like it. Its parameters are loaded.
        backward: see `attach`; a choice of the training to come, not of the exits.

    Raises:
        ValueError: the file is missing, damaged, of another version, or does not fit the model; or a module that it
            does not hold is needed.
    """
    path = Path(folder) / EXITS_FILE
    settings = _read_settings(path)
    try:
        exits, weights = list(settings["exits"]), list(settings["exit_weights"])
        loss = {name: settings[name] for name in ("label_smoothing", "z_loss")}
        norm = _exit_norm(settings["exit_norm"], exit_norm)
        rule = _rule(settings["feedback"], feedback, model)
        schedule = _schedule(settings["schedule"])
        # The first files were written before exits could have bodies.
        body = settings.get("exit_body", "norm")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: it does not say how its exits were attached ({error!r}); it is damaged") from error
    local = attach(
        model,
        feedback=rule,
        exits=exits,
        exit_norm=norm,
        exit_body=body,
        backward=backward,
        exit_weights=weights,
        schedule=schedule,
        **loss,
    )
    try:
        restore_exits(local, folder)
    except BaseException:
        local.remove()
        raise
    return local


def restore_exits(local: LocalModel, folder: str | Path) -> None:
    """Load the tensors of `exits.safetensors` into exits that were attached in the same way.

    Raises:
        ValueError: the file is missing or damaged, or has other tensors.
    """
    local.refuse_vocab_parallel("restore_exits()")
    path = Path(folder) / EXITS_FILE
    try:
        tensors = load_file(path, device=str(local.unembedding.weight.device))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); it is missing or damaged") from error
    own = _tensors(local)
    if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in tensors.items()}:
        odd = sorted(own.keys() ^ tensors.keys()) or sorted(n for n in own if own[n].shape != tensors[n].shape)
        raise ValueError(f"{path} does not fit the exits of this model ({', '.join(odd[:3])}); one of them is damaged")
    local.exit_norms.load_state_dict(_below("exit_norms.", tensors))
    local.exit_bodies.load_state_dict(_below("exit_bodies.", tensors))
    local.feedback.load_state_dict(_below("feedback.", tensors))


def _settings(local: LocalModel) -> dict[str, Any]:
    rule, loss = local.feedback, local.loss_settings
    return {
        "exits": [exit_.block_index for exit_ in local.exits],
        "exit_norm": local.exit_norm,
        "exit_body": local.exit_body,
        "exit_weights": local.exit_weights,
        "schedule": asdict(local.schedule),
        "feedback": {
            "name": rule.name,
            "hidden_size": rule.hidden_size,
            "vocab_size": rule.vocab_size,
            "options": rule_options(rule) if rule.name in RULES else None,
        },
        "label_smoothing": loss.label_smoothing,
        "z_loss": loss.z_loss,
    }


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); it is missing or damaged") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected exits of format {FORMAT}, got {metadata.get('format')!r}; pass a folder in which "
            f"localexit.save_exits wrote, or read it with the version that did"
        )
    try:
        settings = json.loads(metadata["attach"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: it does not say how its exits were attached ({error!r}); it is damaged") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: it does not say how its exits were attached (no object); it is damaged")
    return settings


def _exit_norm(name: str | None, given: nn.Module | None) -> str | nn.Module:
    if name is None and given is None:
        raise ValueError("exit_norm: the exits were attached with a module of the caller's; pass one like it")
    if name is not None and given is not None:
        raise ValueError(f"exit_norm: the exits were attached with {name!r}, which needs no module; leave it out")
    return name or given or ""


def _schedule(saved: Mapping[str, Any]) -> ExitSchedule:
    warmup = saved["warmup"]
    return ExitSchedule(**{**saved, "warmup": tuple(warmup) if isinstance(warmup, list) else warmup})


def _rule(saved: Mapping[str, Any], given: Feedback | None, model: nn.Module) -> Feedback:
    if given is not None:
        if given.name != saved["name"]:
            raise ValueError(f"feedback: expected a rule like the saved {saved['name']!r}, got {given.name!r}")
        return given
    if saved["options"] is None:
        raise ValueError(
            f"feedback: the exits were trained with {saved['name']!r}, a rule that make_feedback does not know; pass "
            f"one like it"
        )
    shape = (saved["vocab_size"], saved["hidden_size"])
    weight = next((m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.weight.shape == shape), None)
    if weight is None:
        raise ValueError(
            f"the exits were saved with an unembedding [V, D]={list(shape)}, which this model does not have"
        )
    return make_feedback(saved["name"], shape[1], shape[0], **saved["options"]).to(weight.device)


def _tensors(local: LocalModel) -> dict[str, Tensor]:
    parts = {"exit_norms": local.exit_norms, "exit_bodies": local.exit_bodies, "feedback": local.feedback}
    return {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
