"""Batches of context windows from a token stream, drawn by a private generator and resumed exactly.

    sampler = BatchSampler(stream, batch_size=16, context=256, seed=0)
    ids = sampler.next_batch()  # [16, 256] int64: inputs and labels, shifted once by the model
    state = sampler.state()  # goes into JSON; after restore(state) the next batch is the same

`valid_batches(stream, batch_size=16, context=256, max_tokens=200_000)` yields the same batches every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from localexit import _checks
from localexit.train.tokens import TokenStream

_FORMAT = 1


class BatchSampler:
    """Batches of context windows: each window once per epoch, in an order drawn anew for every epoch.

    The order of epoch i is a permutation drawn from a private generator seeded with (seed, i); epochs follow each
    other without a gap, so a batch may hold the end of one and the beginning of the next. `world_size` ranks share
    each global batch of batch_size · world_size windows: what is seen does not depend on how it is shared out.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        batch_size: int,
        context: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Start at the beginning of epoch 0.

        Args:
            stream: token ids.
            batch_size: windows per batch on this rank.
            context: tokens per window.
            seed: non-negative seed of the order.
            rank: this process among `world_size`.
            world_size: processes that share the global batch.

        Raises:
            ValueError: an argument out of range, or a stream shorter than one context.
        """
        _checks.count("batch_size", batch_size, minimum=1)
        _checks.count("seed", seed, minimum=0)
        _check_rank(rank, world_size)
        self._windows = stream.windows(context)
        self._batch_size, self._seed = batch_size, seed
        self._rank, self._world_size = rank, world_size
        self._position = 0
        self._order = self._draw_order(0)
        self._order_epoch = 0

    @property
    def num_windows(self) -> int:
        """Windows per epoch."""
        return len(self._windows)

    @property
    def position(self) -> int:
        """Windows drawn so far by all ranks together."""
        return self._position

    @property
    def epoch(self) -> int:
        """Epoch that the next batch begins in."""
        return self._position // self.num_windows

    def next_batch(self) -> Tensor:
        """[batch_size, context] int64 token ids, both inputs and labels: the model shifts them once."""
        first = self._position + self._rank * self._batch_size
        chosen = [self._window_at(first + offset) for offset in range(self._batch_size)]
        self._position += self._batch_size * self._world_size
        return _as_ids(self._windows[chosen])

    def state(self) -> dict[str, int]:
        """Position and what it depends on, as JSON-ready integers."""
        return {
            "format": _FORMAT,
            "position": self._position,
            "seed": self._seed,
            "num_windows": self.num_windows,
            "context": self._windows.shape[1],
        }

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue after the batches that the sampler which gave `state` had drawn.

        Batch size and world size may differ from then.

        Raises:
            ValueError: the state is of another seed, context or amount of data.
        """
        own = self.state()
        for name in ("format", "seed", "num_windows", "context"):
            if state.get(name) != own[name]:
                raise ValueError(
                    f"{name}: expected {state.get(name)}, as in the saved sampler; got {own[name]}; "
                    "resume with the configuration and data of the run"
                )
        _checks.count("position", state["position"], minimum=0)
        self._position = state["position"]

    def _window_at(self, position: int) -> int:
        epoch, index = divmod(position, self.num_windows)
        if epoch != self._order_epoch:
            self._order, self._order_epoch = self._draw_order(epoch), epoch
        return int(self._order[index])

    def _draw_order(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(self.num_windows)


def valid_batches(
    stream: TokenStream,
    *,
    batch_size: int,
    context: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Tensor]:
    """Yield [≤ batch_size, context] int64 ids: every window once, in order; always the same ones.

    Args:
        stream: token ids.
        batch_size: windows per batch; the last batch may be smaller.
        context: tokens per window.
        max_tokens: cap over all ranks; the windows are then spread evenly over the stream, at least one.
        rank: this process among `world_size`, which gets every world_size-th window.
        world_size: processes that share the pass; their numbers of batches may differ by one.

    Raises:
        ValueError: an argument out of range, or a stream shorter than one context.
    """
    _checks.count("batch_size", batch_size, minimum=1)
    _check_rank(rank, world_size)
    windows = stream.windows(context)
    num_chosen = len(windows)
    if max_tokens is not None:
        _checks.count("max_tokens", max_tokens, minimum=1)
        num_chosen = min(num_chosen, max(1, max_tokens // context))
    chosen = np.arange(num_chosen) * len(windows) // num_chosen
    mine = chosen[rank::world_size]
    return (_as_ids(windows[mine[first : first + batch_size]]) for first in range(0, len(mine), batch_size))


def _as_ids(windows: npt.NDArray[np.unsignedinteger[Any]]) -> Tensor:
    return torch.from_numpy(windows.astype(np.int64))


def _check_rank(rank: int, world_size: int) -> None:
    _checks.count("world_size", world_size, minimum=1)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 ≤ rank < world_size = {world_size}; got {rank}; pass this process's rank")
