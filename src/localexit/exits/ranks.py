"""Parallelism as an exit sees it: what ranks that share a batch, or an unembedding, have to tell each other.

Data parallel: every rank holds the whole unembedding and its own tokens. An exit's loss divides by the tokens of all
ranks, and a choice of tokens (anchors, forward pairs of a mirror) is made among those of all ranks, so that what is
computed does not depend on how the batch is shared out. Vocabulary parallel: every rank holds some of the unembedding's
rows and all the tokens; see `exits.vocab`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from localexit import _checks
from localexit.feedback.base import Feedback
from localexit.feedback.draws import UNCOUNTED

# Buffers of rules that have a row for each of the D numbers of a hidden state, not for each token.
_OF_HIDDEN = frozenset({"expander", "residual_base"})


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


@dataclass(frozen=True, kw_only=True)
class VocabParallel:
    """The ranks that share an unembedding: rank i holds the i-th of `size` runs of ceil(V / size) rows.

    These are the shards of `DTensor`'s `Shard(0)`, and of `torch.chunk`.

    Args:
        vocab_size: V, of all ranks together.
        group: the process group; None is the default group.

    Raises:
        ValueError: torch.distributed is not initialised, this process is not in the group, or a rank would have no row.
    """

    vocab_size: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        _checks.process_group("group", self.group)
        _checks.count("vocab_size", self.vocab_size, minimum=1)
        if self.largest_shard * (self.size - 1) >= self.vocab_size:
            raise ValueError(
                f"vocab_size={self.vocab_size} leaves the last of {self.size} ranks without a row; use fewer ranks"
            )

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return dist.get_world_size(self.group)

    @property
    def largest_shard(self) -> int:
        """Rows of every rank but the last."""
        return -(-self.vocab_size // self.size)

    @property
    def rows(self) -> slice:
        """This rank's rows among all V."""
        first = dist.get_rank(self.group) * self.largest_shard
        return slice(first, min(first + self.largest_shard, self.vocab_size))

    def shard(self, feedback: Feedback) -> Feedback:
        """The part of a rule that belongs to this rank's rows: a rule of its own, for the exits of this rank.

        Args:
            feedback: made for all V rows, with the same seed on every rank; it stays as it is.
        """
        part = copy.deepcopy(feedback)
        # Pairs that a mirror has collected are of all rows.
        part.discard()
        part.vocab_size = self.rows.stop - self.rows.start
        for name in _row_buffers(feedback):
            part.register_buffer(name, getattr(feedback, name)[self.rows].clone())
        return part

    def parts(self, part: Feedback) -> list[Tensor]:
        """The tensors of a rule's part that belong to this rank's rows, and not to all ranks."""
        return [getattr(part, name) for name in _row_buffers(part)]

    def total(self, part: Tensor) -> Tensor:
        """The sum of the ranks' parts."""
        total = part.contiguous()
        dist.all_reduce(total, group=self.group)
        return total

    def gather(self, part: Tensor) -> Tensor:
        """The ranks' parts [...] next to each other: [size, ...]."""
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.stack(parts)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens as rows of this rank, 0 where they are elsewhere; whether they are here."""
        is_here = (ids >= self.rows.start) & (ids < self.rows.stop)
        return torch.where(is_here, ids - self.rows.start, 0), is_here


def _row_buffers(feedback: Feedback) -> list[str]:
    """Names of the buffers that have a row for each token the rule is made for."""
    return [
        name
        for name, buffer in feedback.named_buffers()
        if buffer.dim() and buffer.shape[0] == feedback.vocab_size and name not in _OF_HIDDEN
    ]


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
    smallest = torch.topk(keys, min(num, keys.shape[0]), largest=False)
    keys, hidden = smallest.values, hidden[smallest.indices]
    is_counted = keys < UNCOUNTED
    hidden = torch.where(is_counted[:, None], hidden, 0)
    if ranks is None:
        return Chosen(hidden=hidden, is_counted=is_counted, keys=keys)
    # All ranks send as much, however few tokens one has.
    missing = num - keys.shape[0]
    keys = ranks.gather(torch.cat([keys, keys.new_full((missing,), torch.iinfo(torch.int64).max)]))
    hidden = ranks.gather(torch.cat([hidden, hidden.new_zeros(missing, hidden.shape[1])]))
    smallest = torch.topk(keys, num, largest=False)
    keys, hidden = smallest.values, hidden[smallest.indices]
    return Chosen(hidden=hidden, is_counted=keys < UNCOUNTED, keys=keys)
