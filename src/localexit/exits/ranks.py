"""Data parallelism as an exit sees it: what ranks that share a batch have to tell each other.

Every rank holds the whole unembedding and its own tokens. An exit's loss divides by the tokens of all ranks, and a
choice of tokens (anchors, forward pairs of a mirror) is made among those of all ranks, so that what is computed does
not depend on how the batch is shared out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from localexit import _checks
from localexit.feedback.draws import UNCOUNTED


@dataclass(frozen=True, kw_only=True)
class DataParallel:
    """The ranks that share the batch of every optimiser step: each has the same model and its own part of the batch.

    The convention for gradients is that of DDP and FSDP: a rank's gradient is that of its own part times the number
    of ranks, and the *mean* over ranks is the gradient of the whole batch.

    Args:
        group: the process group; None is the default group, that of all processes.

    Raises:
        ValueError: torch.distributed is not initialised, or this process is not in the group.
    """

    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        _checks.process_group("group", self.group)

    @property
    def rank(self) -> int:
        """This process's place among the ranks."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return dist.get_world_size(self.group)

    def total(self, value: Tensor) -> Tensor:
        """The sum over ranks of a tensor that has the same shape on each."""
        total = value.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def mean(self, value: Tensor) -> Tensor:
        """The mean over ranks of a tensor that has the same shape on each."""
        return self.total(value) / self.size

    def gather(self, value: Tensor) -> Tensor:
        """Every rank's [n, ...] one after the other: [size · n, ...]; n is the same on each rank."""
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value.contiguous(), group=self.group)
        return torch.cat(parts)

    def copy_from_first(self, tensor: Tensor) -> None:
        """Overwrite a tensor with what the first rank has."""
        dist.broadcast(tensor.detach(), group=self.group, group_src=0)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Tokens that a choice fell on, those of other ranks among them.

    Attributes:
        hidden: [M, D], zero where not counted.
        is_counted: bool [M], False on tokens that only fill up, when fewer than M count.
        keys: int64 [M] ascending, what the choice ordered tokens by.
    """

    hidden: Tensor
    is_counted: Tensor
    keys: Tensor


def choose_among_ranks(hidden: Tensor, keys: Tensor, num: int, ranks: DataParallel | None) -> Chosen:
    """The `num` tokens with the smallest keys, of this rank or of all.

    A rank can contribute no more than its own `num` smallest: [num, D] of each are gathered, whatever N is.

    Args:
        hidden: [N, D].
        keys: int64 [N], from `feedback.draws.choice_keys`.
        num: M.
        ranks: the ranks to choose among; None for this process alone.
    """
    smallest = torch.topk(keys, min(num, keys.shape[0]), largest=False, sorted=True)
    keys, hidden = smallest.values, hidden[smallest.indices]
    is_counted = keys < UNCOUNTED
    hidden = torch.where(is_counted[:, None], hidden, 0)
    if ranks is not None:
        # All ranks send as much, however few tokens one has.
        missing = num - keys.shape[0]
        keys = ranks.gather(torch.cat([keys, keys.new_full((missing,), torch.iinfo(torch.int64).max)]))
        hidden = ranks.gather(torch.cat([hidden, hidden.new_zeros(missing, hidden.shape[1])]))
        smallest = torch.topk(keys, num, largest=False, sorted=True)
        keys, hidden = smallest.values, hidden[smallest.indices]
    return Chosen(hidden=hidden, is_counted=keys < UNCOUNTED, keys=keys)
