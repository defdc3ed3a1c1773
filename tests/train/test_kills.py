"""Kills, full disks, read-only folders and damaged files: a run goes on from the newest whole checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import environment
from localexit.train.checkpoint import load_newest, save_checkpoint
from localexit.train.config import TrainConfig
from localexit.train.errors import RunFailedError
from train.small_runs import small_config, train_quietly
from train.test_checkpoint import snapshot
from train.test_loop import records, without_times

MEASURED = ("train", "valid", "sample")


def assert_same_result(one: Path, two: Path) -> None:
    """The same log but for times, the same last checkpoint."""
    assert without_times(records(one, *MEASURED)) == without_times(records(two, *MEASURED))
    newest = [load_newest(run / "checkpoints", lambda line: pytest.fail(line)) for run in (one, two)]
    assert newest[0] is not None
    assert newest[1] is not None
    assert newest[0].step == newest[1].step
    for name, tensors in newest[0].tensors.items():
        assert tensors.keys() == newest[1].tensors[name].keys()
        assert all(torch.equal(tensor, newest[1].tensors[name][key]) for key, tensor in tensors.items())


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("num_kills", "checkpoint_every"),
    [
        pytest.param(10, 1, marks=pytest.mark.slow),
        pytest.param(10, 3, marks=pytest.mark.slow),
        pytest.param(100, 1, marks=pytest.mark.long),
        pytest.param(100, 3, marks=pytest.mark.long),
    ],
)
def test_a_run_that_is_killed_again_and_again_is_the_run(
    text: Path, cache_dir: Path, tmp_path: Path, num_kills: int, checkpoint_every: int
) -> None:
    steps = 8 * num_kills
    config = small_config(
        text, steps=steps, checkpoint_every=checkpoint_every, eval_every=steps // 2, sample_tokens=2, warmup_steps=2
    )
    train_quietly(config, tmp_path / "whole", cache_dir)
    ended = subprocess.run(
        [
            *(sys.executable, str(Path(__file__).with_name("killing.py")), json.dumps(config.to_json())),
            *(str(tmp_path / "killed"), str(cache_dir), str(num_kills), "0"),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    kills = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(kills) == num_kills
    for kill in kills:
        assert kill["skipped"] == []
        assert kill["newest"] >= kill["logged"] - checkpoint_every
    # Kills of the first moments do not lead anywhere; most of the others do.
    assert len({kill["newest"] for kill in kills}) > num_kills // 3
    assert_same_result(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_examples", [100, pytest.param(2000, marks=pytest.mark.long)])
def test_whatever_is_damaged_the_one_before_is_found(tmp_path: Path, num_examples: int) -> None:
    """One random damage to one random file of the newest checkpoint."""
    whole = tmp_path / "whole"
    for step in (3, 6):
        save_checkpoint(whole, snapshot(step))
    rng = Random(0)
    for number in range(num_examples):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        damaged = rng.choice(sorted((folder / "step-6").iterdir()))
        damage = rng.choice(DAMAGES)
        damage(damaged, rng)
        lines: list[str] = []
        newest = load_newest(folder, lines.append)
        assert newest is not None
        assert newest.step == 3, (damaged.name, damage.__name__)
        assert len(lines) == 1
        assert lines[0].startswith("skipped checkpoint step-6: ")
        # A manifest may accuse any file.
        assert damaged.name == "manifest.json" or f"step-6: {damaged.name} is " in lines[0], (lines[0], damage.__name__)
        shutil.rmtree(folder)


def flip(path: Path, rng: Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def zero(path: Path, rng: Random) -> None:
    """A block that the disk gave up: zeros, and one byte that was none."""
    content = bytearray(path.read_bytes())
    start = rng.choice([index for index, byte in enumerate(content) if byte])
    content[start : start + 64] = bytes(len(content[start : start + 64]))
    path.write_bytes(content)


def append(path: Path, rng: Random) -> None:
    """One byte more; white space at the end of JSON would be no damage."""
    path.write_bytes(path.read_bytes() + bytes([rng.randrange(33, 256)]))


def swap(path: Path, rng: Random) -> None:
    """The file of the checkpoint before, where it is another."""
    other = path.parent.with_name("step-3") / path.name
    if other.read_bytes() == path.read_bytes():
        return flip(path, rng)
    shutil.copy(other, path)
    return None


def remove(path: Path, rng: Random) -> None:
    path.unlink()


DAMAGES: list[Callable[[Path, Random], None]] = [flip, cut, zero, append, swap, remove]


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, options: str) -> None:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)], check=True, capture_output=True
        )

    def free(self) -> None:
        subprocess.run(["umount", str(self.path)], check=False, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    disk.path.mkdir()
    try:
        disk.mount("size=1m")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a file system here: {error}")
    yield disk
    disk.free()


# From no room for the first files to room for two checkpoints and a half; a checkpoint has 1.9 MiB.
@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "16k", "1m", "2500k", "4500k", "5m"])
def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(
    text: Path, cache_dir: Path, tmp_path: Path, disk: Disk, size: str
) -> None:
    config = small_config(text, steps=12, checkpoint_every=3, eval_every=6)
    run = disk.path / "run"
    disk.mount(f"remount,size={size}")
    with pytest.raises((RunFailedError, ValueError), match="No space left|cannot be written|can be written"):
        train_quietly(config, run, cache_dir)
    newest = load_newest(run / "checkpoints", lambda line: pytest.fail(line))
    logged = records(run, "train") if (run / "metrics.jsonl").exists() else []
    assert (newest.step if newest else 0) >= (logged[-1]["step"] if logged else 0) - 3
    disk.mount("remount,size=64m")
    is_run = (run / "config.json").is_file()
    if not is_run:
        shutil.rmtree(run, ignore_errors=True)
    assert train_quietly(config, run, cache_dir, resume=is_run).status == "finished"
    train_quietly(config, tmp_path / "whole", cache_dir)
    assert_same_result(run, tmp_path / "whole")


def test_a_read_only_folder_is_refused_and_left_as_it_is(text: Path, cache_dir: Path, disk: Disk) -> None:
    disk.mount("remount,size=64m")
    config: TrainConfig = small_config(text)
    run = train_quietly(config, disk.path / "run", cache_dir).run.path
    (run / "checkpoints" / "step-6" / "state.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    disk.mount("remount,ro")
    with pytest.raises(RunFailedError, match="Read-only file system"):
        train_quietly(config, run, cache_dir, resume=True)
    with pytest.raises(ValueError, match="run: expected a folder that can be written, got .*Read-only file system"):
        train_quietly(config, disk.path / "other", cache_dir)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    tensors = load_file(run / "checkpoints" / "step-3" / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
