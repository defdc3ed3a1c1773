"""The command under torchrun, as the README has it: processes of its own, and a restart after one was killed."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread
from time import monotonic, sleep
from typing import Any

import pytest

from docs.commands import TINY, TINY_PRESET
from docs.pages import README, blocks
from train.small_runs import write_corpus

(LINE,) = (line for line in "".join(blocks(README.read_text(), "console")).splitlines() if line.startswith("torchrun"))


def torchrun(folder: Path, *more: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """The README's line in a folder with a text, at a tiny size."""
    write_corpus(folder / "path/to/text", num_files=6, num_sentences=40)
    arguments = [*before, *shlex.split(LINE)[1:], *shlex.split(f"{TINY['train']} {TINY_PRESET}"), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        cwd=folder,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=240)[0]
    finally:
        process.kill()


def events(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == "event"]


@pytest.mark.slow
def test_the_line_of_the_readme(tmp_path: Path) -> None:
    process = torchrun(tmp_path)
    output = output_of(process)
    assert process.returncode == 0, output
    assert output.count("report: ") == 1
    assert (tmp_path / "runs/two/model/model.safetensors").exists()


def kill_one(process: subprocess.Popen[str], checkpoint: Path) -> None:
    """Kill the second process that torchrun started, once a checkpoint is there."""
    until = monotonic() + 200
    while not checkpoint.is_dir() and monotonic() < until:
        sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's children in /proc")
def test_a_killed_process_is_started_again(tmp_path: Path) -> None:
    steps = ("--steps", "400", "--checkpoint-every", "10")
    process = torchrun(tmp_path, *steps, before=("--max-restarts", "1", "--monitor-interval", "0.1"))
    run = tmp_path / "runs/two"
    killer = Thread(target=kill_one, args=(process, run / "checkpoints/step-10"))
    killer.start()
    output = output_of(process)
    killer.join()
    assert process.returncode == 0, output
    started, resumed, finished = events(run)
    assert [started["event"], resumed["event"], finished["event"]] == ["started", "resumed", "finished"]
    assert resumed["step"] >= 10
    assert resumed["step"] % 10 == 0
