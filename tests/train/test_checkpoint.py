from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from localexit._files import LARGEST_JSON
from localexit.train import checkpoint
from localexit.train.checkpoint import (
    CheckpointError,
    Snapshot,
    checkpoint_folders,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)


def snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    return Snapshot(
        step=step,
        tensors={
            "model": {"weight": torch.randn(3, 4, generator=generator), "empty": torch.zeros(0, 2)},
            "optimizer": {"0.step": torch.tensor(float(step)), "0.exp_avg": torch.randn(4, 3, generator=generator).T},
            "rng": {"cpu": torch.arange(8, dtype=torch.uint8)},
        },
        state={"step": step, "lr": 0.1 + 0.2, "sampler": {"position": step}},
    )


def steps_in(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint_folders(folder)]


def newest(folder: Path) -> tuple[int | None, list[str]]:
    lines: list[str] = []
    found = load_newest(folder, lines.append)
    return (None if found is None else found.step), lines


def test_what_is_loaded_is_what_was_saved_bit_by_bit(tmp_path: Path) -> None:
    saved = snapshot(7)
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved))
    assert loaded.step == 7
    assert loaded.state == saved.state
    for name, tensors in saved.tensors.items():
        assert loaded.tensors[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(loaded.tensors[name][key], tensor)
            assert loaded.tensors[name][key].dtype == tensor.dtype


def test_the_newest_two_are_kept_in_the_order_of_numbers(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100):
        save_checkpoint(tmp_path, snapshot(step))
    assert steps_in(tmp_path) == [100, 10]
    assert newest(tmp_path) == (100, [])


def test_no_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") == (None, [])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replace_by_link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink, replace_by_link])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_skipped_with_a_reason(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    for step in (3, 6):
        save_checkpoint(tmp_path, snapshot(step))
    damage(tmp_path / "step-6" / name)
    step, lines = newest(tmp_path)
    assert step == 3
    assert len(lines) == 1
    assert "skipped checkpoint step-6: " in lines[0]


def test_one_checkpoint_under_the_name_of_another_is_skipped(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, snapshot(3))
    (tmp_path / "step-3").rename(tmp_path / "step-4")
    assert newest(tmp_path)[0] is None


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "[" * 100_000,
        '{"format": 2, "step": 3, "sha256": {}}',
        '{"format": 1, "step": 3, "sha256": {"../secret": "0"}}',
        '{"format": 1, "step": 3}',
        '{"format": 1, "step": 3, "sha256": {}}',
    ],
)
def test_a_forged_manifest_is_skipped(tmp_path: Path, manifest: str) -> None:
    save_checkpoint(tmp_path, snapshot(3))
    (tmp_path / "step-3" / "manifest.json").write_text(manifest)
    assert newest(tmp_path)[0] is None


def test_a_huge_manifest_is_not_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, snapshot(3))
    with (tmp_path / "step-3" / "manifest.json").open("r+") as file:
        file.truncate(LARGEST_JSON + 1)
    assert "larger than any" in newest(tmp_path)[1][0]


def test_a_safetensors_file_that_lies_about_its_size_is_skipped(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, snapshot(3))
    header = json.dumps({"weight": {"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    forge_manifest(folder, "model.safetensors")
    assert newest(tmp_path)[0] is None


def forge_manifest(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"][name] = checkpoint._digest(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_a_kill_left_unfinished_is_cleared_and_never_loaded(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, snapshot(3))
    shutil.copytree(tmp_path / "step-3", tmp_path / ".unfinished-step-9")
    assert newest(tmp_path) == (3, [])
    save_checkpoint(tmp_path, snapshot(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-6"]


@pytest.mark.parametrize("failing", ["_sync", "verify", "_digest"])
def test_a_failed_save_leaves_the_older_ones(tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (3, 6):
        save_checkpoint(tmp_path, snapshot(step))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(checkpoint, failing, fail)
        save_checkpoint(tmp_path, snapshot(9))
    assert steps_in(tmp_path) == [6, 3]
    assert newest(tmp_path) == (6, [])


def test_an_older_one_is_deleted_only_after_the_newer_was_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (3, 6):
        save_checkpoint(tmp_path, snapshot(step))
    write = checkpoint._write

    def write_badly(path: Path, saved: Snapshot) -> None:
        write(path, saved)
        flip_a_bit(path / "model.safetensors")

    monkeypatch.setattr(checkpoint, "_write", write_badly)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        save_checkpoint(tmp_path, snapshot(9))
    assert steps_in(tmp_path) == [6, 3]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, snapshot(3))
    flip_a_bit(tmp_path / "step-3" / "model.safetensors")
    save_checkpoint(tmp_path, snapshot(3))
    assert newest(tmp_path) == (3, [])


@pytest.mark.parametrize("is_damaged", [True, False])
def test_later_checkpoints_give_way_to_one_saved_after_going_back(tmp_path: Path, is_damaged: bool) -> None:
    save_checkpoint(tmp_path, snapshot(100))
    for step in (200, 300):
        later = save_checkpoint(tmp_path / "elsewhere", snapshot(step))
        if is_damaged:
            flip_a_bit(later / "model.safetensors")
        later.rename(tmp_path / later.name)
    (tmp_path / "step-0150").mkdir()
    save_checkpoint(tmp_path, snapshot(150))
    assert steps_in(tmp_path) == [150, 100]
    assert newest(tmp_path) == (150, [])


def test_later_checkpoints_stay_until_the_new_one_was_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, snapshot(200))

    def refuse(path: Path) -> None:
        raise CheckpointError("damaged")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError):
        patch.setattr(checkpoint, "verify", refuse)
        save_checkpoint(tmp_path, snapshot(150))
    assert steps_in(tmp_path) == [200]


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
def test_a_kill_at_any_write_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Stop the process at each system call that changes the folder, one after the other."""
    save_checkpoint(tmp_path / "start", snapshot(3))
    save_checkpoint(tmp_path / "start", snapshot(6))
    deaths = 0
    for moment in range(60):
        folder = tmp_path / f"killed-{moment}"
        shutil.copytree(tmp_path / "start", folder)
        if _save_and_die(folder, moment) == 0:
            break
        deaths += 1
        step, lines = newest(folder)
        assert step in (6, 9)
        assert lines == []
        save_checkpoint(folder, snapshot(12))
        assert newest(folder)[0] == 12
        assert not list(folder.glob(".*"))
    assert deaths >= 10


def _save_and_die(folder: Path, moment: int) -> int:
    """Save in a child process that dies before its `moment`-th change to the folder; its exit status."""
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1]
    calls = 0

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls > moment:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    checkpoint.save_file = dying(checkpoint.save_file)  # type: ignore[attr-defined]
    for owner, name in ((os, "fsync"), (os, "mkdir"), (os, "rename"), (os, "unlink"), (os, "rmdir")):
        setattr(owner, name, dying(getattr(owner, name)))
    Path.rename = dying(Path.rename)  # type: ignore[method-assign, assignment]
    Path.mkdir = dying(Path.mkdir)  # type: ignore[method-assign, assignment]
    Path.write_text = dying(Path.write_text)  # type: ignore[method-assign, assignment]
    try:
        save_checkpoint(folder, snapshot(9))
    except BaseException:
        os._exit(1)
    os._exit(0)
