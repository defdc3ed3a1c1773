"""Several ranks of a gloo group on this machine, each a process with one thread."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

# Forked, not spawned: importing torch once more in every rank takes longer than most tests.
_FORK = multiprocessing.get_context("fork")


def run_ranks(function: Callable[..., Any], num_ranks: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """What `function(*arguments)` returns on each rank; an error on one of them is raised here."""
    replies = rank_replies(_in_group, num_ranks, function, *arguments, timeout=timeout)
    errors = [error for error, _ in replies if error]
    # One rank's error makes the others' collectives fail: what they say comes last.
    assert not errors, "\n".join(sorted(errors, key=lambda error: "gloo" in error))
    return [result for _, result in replies]


def rank_replies(
    function: Callable[..., Any], num_ranks: int, *arguments: Any, timeout: float = 120
) -> list[tuple[str | None, Any]]:
    """The error of each rank, if any, and what `function(*arguments)` returns on it.

    The environment is that of `torchrun`; joining the others is left to the function.
    """
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    ranks = [_start(function, rank, num_ranks, port, arguments) for rank in range(num_ranks)]
    try:
        return [_reply(connection, timeout) for _, connection in ranks]
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()


def _start(function: Callable[..., Any], rank: int, num_ranks: int, port: int, arguments: Any) -> Any:
    mine, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_run, args=(function, rank, num_ranks, port, arguments, theirs), daemon=True)
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
    function: Callable[..., Any], rank: int, num_ranks: int, port: int, arguments: Any, connection: Connection
) -> None:
    # A pool of threads does not survive a fork.
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    try:
        reply = (None, function(*arguments))
    except BaseException:
        reply = (traceback.format_exc(), None)
    connection.send_bytes(pickle.dumps(reply))
    # At once: what the parent has registered for its own end is not for this process.
    os._exit(0)


def _in_group(function: Callable[..., Any], *arguments: Any) -> Any:
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()
