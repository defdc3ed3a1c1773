"""Several ranks of a gloo group on this machine, each a process with one thread."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Forked, not spawned: importing torch once more in every rank takes longer than most tests.
_FORK = multiprocessing.get_context("fork")


def run_ranks(function: Callable[..., Any], num_ranks: int, *arguments: Any, timeout: float = 60) -> list[Any]:
    """What `function(*arguments)` returns on each rank; an error on one of them is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_start(function, rank, num_ranks, Path(folder), arguments) for rank in range(num_ranks)]
        try:
            replies = [_reply(connection, timeout) for _, connection in ranks]
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()
    errors = [error for error, _ in replies if error]
    # One rank's error makes the others' collectives fail: what they say comes last.
    assert not errors, "\n".join(sorted(errors, key=lambda error: "gloo" in error))
    return [result for _, result in replies]


def _start(function: Callable[..., Any], rank: int, num_ranks: int, folder: Path, arguments: Any) -> Any:
    mine, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_run, args=(function, rank, num_ranks, folder, arguments, theirs), daemon=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        process.start()
    theirs.close()
    return process, mine


def _reply(connection: Connection, timeout: float) -> tuple[str | None, Any]:
    if not connection.poll(timeout):
        return f"a rank said nothing for {timeout} s", None
    try:
        return pickle.loads(connection.recv_bytes())
    except EOFError:
        return "a rank died", None


def _run(
    function: Callable[..., Any], rank: int, num_ranks: int, folder: Path, arguments: Any, connection: Connection
) -> None:
    # A pool of threads does not survive a fork.
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=30),
    )
    try:
        reply = (None, function(*arguments))
    except BaseException:
        reply = (traceback.format_exc(), None)
    connection.send_bytes(pickle.dumps(reply))
    dist.destroy_process_group()
