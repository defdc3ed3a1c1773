"""The model that a run ends with: written so that a kill leaves a whole one, and read back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from localexit.local import LocalModel, restore_exits, save_exits
from localexit.train.folder import RunFolder
from localexit.train.models import attach_exits, load_pretrained, load_tokenizer, without_progress_bars
from localexit.train.presets import PRESETS, resolve_name
from localexit.train.tokenizer import as_pretrained, copy_pretrained


def export_model(
    run: RunFolder, local: LocalModel, tokenizer: Tokenizer, *, whole: Mapping[str, Tensor] | None = None
) -> None:
    """Write `model/`: what `transformers` loads, the tokenizer, the exits' own norms and the rule's state.

    Args:
        run: its configuration says which model it began with.
        local: the model.
        tokenizer: what a preset learned from the text; any other model passes its own on, special tokens and chat
            template included.
        whole: the model's tensors by name where the model itself has only shards of them.
    """
    temporary, old = run.path / ".model", run.path / ".model-old"
    shutil.rmtree(temporary, ignore_errors=True)
    if old.exists() and not run.model.exists():
        # What a kill between the two renames below left.
        old.rename(run.model)
    save: Any = local.model
    with without_progress_bars():
        save.save_pretrained(temporary, state_dict=whole)
    source = run.read_config().model
    if source in PRESETS:
        as_pretrained(tokenizer).save_pretrained(temporary)
    else:
        copy_pretrained(resolve_name(source), temporary)
    save_exits(local, temporary)
    for tensors in temporary.glob("*.safetensors"):
        # safetensors lets nobody else read what it writes; these have the mode that any new file gets.
        shutil.copymode(temporary / "config.json", tensors)
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
    restore_exits(local, run.model)
    tokenizer, _ = load_tokenizer(str(run.model))
    return local.eval(), tokenizer
