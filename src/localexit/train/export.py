"""The model that a run ends with: written so that a kill leaves a whole one, and read back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from localexit.local import LocalModel
from localexit.train.folder import RunFolder
from localexit.train.models import attach_exits, load_pretrained, load_tokenizer, without_progress_bars
from localexit.train.presets import PRESETS, resolve_name
from localexit.train.tokenizer import as_pretrained, copy_pretrained


def export_model(run: RunFolder, local: LocalModel, tokenizer: Tokenizer) -> None:
    """Write `model/`: what `transformers` loads, the tokenizer, the exits' own norms and the rule's state.

    Args:
        run: its configuration says which model it began with.
        local: the model.
        tokenizer: what a preset learned from the text; any other model passes its own on, special tokens and chat
            template included.
    """
    temporary, old = run.path / ".model", run.path / ".model-old"
    shutil.rmtree(temporary, ignore_errors=True)
    if old.exists() and not run.model.exists():
        # What a kill between the two renames below left.
        old.rename(run.model)
    save: Any = local.model
    with without_progress_bars():
        save.save_pretrained(temporary)
    source = run.read_config().model
    if source in PRESETS:
        as_pretrained(tokenizer).save_pretrained(temporary)
    else:
        copy_pretrained(resolve_name(source), temporary)
    save_file(_exit_tensors(local), temporary / "exits.safetensors")
    shutil.rmtree(old, ignore_errors=True)
    if run.model.exists():
        run.model.rename(old)
    temporary.rename(run.model)
    shutil.rmtree(old, ignore_errors=True)


def load_run(path: Path, *, device: torch.device) -> tuple[LocalModel, Tokenizer]:
    """The model that a run ended with, its exits attached, and its tokenizer.

    Raises:
        ValueError: not the folder of a run, or one that has not written its model yet.
    """
    run = RunFolder(path=path)
    run.check_has_model()
    local = attach_exits(load_pretrained(str(run.model)), run.read_config(), device=device)
    try:
        tensors = load_file(run.model / "exits.safetensors", device=str(device))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"run: {run.model / 'exits.safetensors'} cannot be read ({error}); it is damaged") from error
    own = _exit_tensors(local)
    if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in tensors.items()}:
        raise ValueError(f"run: {run.model / 'exits.safetensors'} does not fit config.json; one of them is damaged")
    local.exit_norms.load_state_dict(_below("exit_norms.", tensors))
    local.feedback.load_state_dict(_below("feedback.", tensors))
    tokenizer, _ = load_tokenizer(str(run.model))
    return local.eval(), tokenizer


def _exit_tensors(local: LocalModel) -> dict[str, torch.Tensor]:
    parts = {"exit_norms": local.exit_norms, "feedback": local.feedback}
    return {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def _below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
