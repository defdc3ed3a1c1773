"""Checkpoints of runs whose blocks are spread over processes: every process writes its share, any number reads them.

torch.distributed.checkpoint in its safetensors form: a shard says where in the whole tensor it belongs, so that
another number of processes can read what it needs, and nothing is unpickled.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from localexit.local import LocalModel
from localexit.local.sharding import is_sharded
from localexit.train.checkpoint import Snapshot, save_checkpoint
from localexit.train.ranks import Ranks

# Where shards are written before they are part of a checkpoint.
_STAGING = ".shards"
_PARTS = ("model", "optimizer")


def save_sharded(folder: Path, snapshot: Snapshot, ranks: Ranks) -> None:
    """As `save_checkpoint`, by all processes together; the main one makes a checkpoint of what all have written."""
    staging = folder / _STAGING
    if ranks.is_main:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    ranks.wait()
    tensors = {f"{part}.{name}": t for part in _PARTS for name, t in snapshot.tensors[part].items()}
    writer = HuggingFaceStorageWriter(str(staging), save_distributed=True)
    save(dict(tensors), storage_writer=writer)
    if ranks.is_main:
        others = {name: part for name, part in snapshot.tensors.items() if name not in _PARTS}
        save_checkpoint(folder, replace(snapshot, tensors=others, shards=staging))
        staging.rmdir()


def read_shards(
    path: Path, model: Mapping[str, Tensor], parameters: list[nn.Parameter]
) -> dict[str, Mapping[str, Tensor]]:
    """This process's share of a checkpoint, however many wrote it.

    Args:
        path: the checkpoint.
        model: tensors to read into, by name.
        parameters: what the optimiser steps, in its order.

    Returns:
        `model`, and the optimiser's tensors by their names in a snapshot.

    Raises:
        ValueError: a tensor is missing, or has another shape.
    """
    reader = HuggingFaceStorageReader(str(path))
    saved = reader.read_metadata().state_dict_metadata
    optimizer: dict[str, Tensor] = {}
    for name in saved:
        part, _, key = name.partition(".")
        if part == "optimizer":
            parameter = parameters[int(key.partition(".")[0])]
            is_moment = not key.endswith(".step")
            optimizer[key] = torch.zeros_like(parameter.detach()) if is_moment else torch.zeros(())
    parts = {"model": model, "optimizer": optimizer}
    missing = {f"model.{name}" for name in model} ^ {name for name in saved if name.startswith("model.")}
    if missing:
        raise ValueError(f"it has other parameters than the model ({', '.join(sorted(missing)[:3])}, …)")
    tensors = {f"{part}.{name}": tensor for part in _PARTS for name, tensor in parts[part].items()}
    with torch.no_grad():
        load(tensors, storage_reader=reader)
    return {part: {name: tensors[f"{part}.{name}"] for name in parts[part]} for part in _PARTS}


def gathered_state(local: LocalModel) -> dict[str, Tensor]:
    """The model's tensors by name, whole and on the CPU; made by all processes together."""
    state: dict[str, Any] = local.model.state_dict()
    return {name: (tensor.full_tensor() if is_sharded(tensor) else tensor).cpu() for name, tensor in state.items()}
