"""What `torchrun` tells a process, readable before torch is imported."""

from __future__ import annotations

import os


def is_launched() -> bool:
    """Whether `torchrun` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def world_rank() -> int:
    """This process among all that were started together; 0 without `torchrun`."""
    return int(os.environ["RANK"]) if is_launched() else 0


def local_rank() -> int:
    """This process among those on this machine; 0 without `torchrun`."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else 0


def world_size() -> int:
    """How many processes were started together; 1 without `torchrun`."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def num_restarts() -> int:
    """How often `torchrun --max-restarts` has started the processes anew after a failure."""
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"]) if is_launched() else 0
