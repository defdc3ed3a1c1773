"""Two GPUs of one machine under NCCL: what one process computes, and what happens when a process is killed."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.commands import environment
from localexit.train.config import FeedbackSpec
from train.small_runs import small_config, write_corpus

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def run_two(*arguments: str, timeout: float) -> list[tuple[int, str]]:
    """Exit code and errors of two processes that are started as `torchrun` would, but not ended by it."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    both = environment(
        WORLD_SIZE="2",
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("on_ranks.py")), *arguments],
            env={**both, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def test_every_rule_is_what_one_process_computes() -> None:
    for code, error in run_two("parity", timeout=240):
        assert code == 0, error


@pytest.mark.parametrize(("moment", "killed"), [("step", 1), ("save", 0)])
def test_a_killed_process_ends_the_other(moment: str, killed: int, tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text")
    config = small_config(text, batch_size=4, device="cuda", feedback=FeedbackSpec.parse("mirror_sampled:num_pairs=16"))
    arguments = (json.dumps(config.to_json()), str(tmp_path / "run"), str(tmp_path / "cache"))
    ended = run_two(moment, *arguments, timeout=120)
    assert ended[killed][0] == -signal.SIGKILL
    code, error = ended[1 - killed]
    assert code not in (0, -signal.SIGKILL)
    assert "continue with --resume" in error or "NCCL" in error, error
    # At most the steps since the last checkpoint are lost.
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-3"]
    for code, error in run_two("resume", *arguments, timeout=120):
        assert code == 0, error
    assert (tmp_path / "run/model/model.safetensors").exists()
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
