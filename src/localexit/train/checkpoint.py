"""Checkpoints that survive a kill at any moment: whole and verified, or not there.

A checkpoint is a folder `step-N` of safetensors and JSON files and a `manifest.json` with the sha256 of each. It is
written under a temporary name, synced to disk, renamed, and read back before an older one is deleted. Nothing in it
is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from localexit._files import read_json

FORMAT = 1
NUM_KEPT = 2
TENSOR_FILES = ("model", "optimizer", "rng")
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"

_TEMPORARY = ".unfinished-"
_NAME = re.compile(r"step-(0|[1-9]\d{0,14})")
_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A training state.

    Attributes:
        step: optimiser steps made.
        tensors: by file (`model`, `optimizer`, `rng`) and name.
        state: everything else, in types that JSON has.
        shards: folder with what of `model` and `optimizer` each process has written, in place of these two; see
            `localexit.train.sharded`.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    shards: Path | None = None


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, or of another version."""


def save_checkpoint(folder: Path, snapshot: Snapshot) -> Path:
    """Write `folder/step-N`; once it has been read back, delete all but it and the one before.

    Checkpoints of later steps are deleted too: the run has gone back behind them, and is on another way now.

    Raises:
        OSError: it could not be written; other checkpoints are untouched.
        CheckpointError: what was read back is not what was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    temporary = folder / f"{_TEMPORARY}step-{snapshot.step}"
    final = folder / f"step-{snapshot.step}"
    try:
        _write(temporary, snapshot)
        verify(temporary)
        # An invalid checkpoint of this step may be in the way: a valid one would have been resumed from.
        _delete(final)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(folder)
    verify(final)
    newest_first = checkpoint_folders(folder)
    position = newest_first.index(final)
    for other in newest_first[:position] + newest_first[position + NUM_KEPT :]:
        _delete(other)
    return final


def load_newest(folder: Path, report: Callable[[str], None]) -> Snapshot | None:
    """The newest checkpoint that is whole, or None when there is none.

    Args:
        folder: where they are.
        report: called with one line for each that was skipped, and why.
    """
    for candidate in checkpoint_folders(folder):
        try:
            return load_checkpoint(candidate)
        except CheckpointError as error:
            report(f"skipped {error}")
    return None


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    if not folder.is_dir():
        return []
    named = {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    return [named[step] for step in sorted(named, reverse=True)]


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint, or None when there is none."""
    newest = checkpoint_folders(folder)[:1]
    return int(newest[0].name.removeprefix("step-")) if newest else None


def load_checkpoint(path: Path) -> Snapshot:
    """Read one checkpoint, after verifying it.

    Raises:
        CheckpointError: it is damaged, incomplete or of another version.
    """
    verify(path)
    state = _read_json(path, STATE_FILE)
    try:
        names = [name for name in TENSOR_FILES if (path / f"{name}.safetensors").exists()]
        tensors = {name: load_file(path / f"{name}.safetensors") for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path.name}: {error}") from error
    shards = None if set(names) == set(TENSOR_FILES) else path
    return Snapshot(step=int(path.name.removeprefix("step-")), tensors=tensors, state=state, shards=shards)


def verify(path: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: a file is missing, a link, or not what was written.
    """
    manifest = _read_json(path, MANIFEST_FILE)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path.name}: expected format {FORMAT}, got {manifest.get('format')!r}; read it with the "
            f"version of localexit that wrote it"
        )
    digests = manifest.get("sha256")
    is_own = path.name.endswith(f"step-{manifest.get('step')}")
    if not isinstance(digests, dict) or not _is_complete(set(digests)) or not is_own:
        raise CheckpointError(f"checkpoint {path.name}: its manifest is not of this checkpoint")
    for name, digest in digests.items():
        if _digest(_regular_file(path, name)) != digest:
            raise CheckpointError(f"checkpoint {path.name}: {name} is damaged (its sha256 is not the recorded one)")


def _is_complete(names: set[str]) -> bool:
    """Whether these are the files of a checkpoint, whole or in shards."""
    shards = {name for name in names if _SHARD.fullmatch(name)}
    if shards:
        return names == {STATE_FILE, "rng.safetensors", *shards}
    return names == {STATE_FILE, *(f"{name}.safetensors" for name in TENSOR_FILES)}


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed process left half written or half deleted."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, snapshot: Snapshot) -> None:
    path.mkdir()
    for name, part in snapshot.tensors.items():
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in part.items()}
        save_file(tensors, path / f"{name}.safetensors")
    for shard in snapshot.shards.iterdir() if snapshot.shards is not None else ():
        shard.rename(path / shard.name)
    (path / STATE_FILE).write_text(json.dumps(snapshot.state, indent=1) + "\n", encoding="utf-8")
    for file in path.glob("*.safetensors"):
        # safetensors lets nobody else read what it writes; these have the mode that any new file gets.
        shutil.copymode(path / STATE_FILE, file)
    files = sorted(path.iterdir())
    _sync_all(files)
    digests = {file.name: _digest(file) for file in files}
    manifest = {"format": FORMAT, "step": snapshot.step, "sha256": digests}
    # No newline at the end: every byte cut off shows.
    (path / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync_all([path / MANIFEST_FILE, path])


def _delete(path: Path) -> None:
    """Delete a checkpoint; a kill in between leaves it whole, or under a name that is not a checkpoint's."""
    if path.exists():
        temporary = path.with_name(f"{_TEMPORARY}old-{path.name}")
        path.rename(temporary)
        shutil.rmtree(temporary)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = _regular_file(folder, name)
    try:
        content = read_json(path)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"checkpoint {folder.name}: {name} is damaged ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {folder.name}: {name} is damaged (not an object)")
    return content


def _regular_file(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"checkpoint {folder.name}: {name} is missing, or not a regular file")
    return path


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sync_all(paths: Iterable[Path]) -> None:
    for path in paths:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
