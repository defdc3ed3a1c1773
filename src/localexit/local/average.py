"""The mean of gradients over ranks, a unit at a time, while the next unit is at work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from localexit.exits.ranks import DataParallel
from localexit.local.sharding import parameters_of_blocks, shard_of
from localexit.local.units import Unit


class GradientAverage:
    """Replaces gradients by their means over ranks; one for each training forward that does so.

    A unit's gradients are copied into one buffer, whose all-reduce runs while the next unit computes, and copied back
    when that one is done: two buffers of a unit's size live at a time. What units share comes last. A mean that is
    taken again of gradients to which something was added since is still the mean of the sum, so gradients may be
    accumulated over forwards that average and forwards that do not.

    Args:
        ranks: the ranks.
        units: per unit the parameters to average.
        shared: the parameters that units share.
    """

    def __init__(self, ranks: DataParallel, units: Sequence[Sequence[nn.Parameter]], shared: Sequence[nn.Parameter]):
        self._ranks = ranks
        self._todo = dict(enumerate([*units, shared]))
        self._under_way: list[_Bucket] = []

    def start(self, unit_index: int) -> None:
        """Start on a unit's gradients, which are whole now, and finish those of the unit before."""
        before, self._under_way = self._under_way, _buckets(self._todo.pop(unit_index), self._ranks)
        for bucket in before:
            bucket.finish()

    def finish(self) -> None:
        """Average what is left, and wait until everything is there.

        A unit without any gradient has sat the step out, on all ranks alike.
        """
        for index in sorted(self._todo):
            if any(parameter.grad is not None for parameter in self._todo[index]):
                self.start(index)
        for bucket in self._under_way:
            bucket.finish()
        self._under_way = []


def averaged_here(
    model: nn.Module, units: Sequence[Unit], shared: Sequence[nn.Parameter]
) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
    """The parameters whose gradients nobody else averages.

    Args:
        model: the model; blocks wrapped in `DistributedDataParallel`, or sharded by `fully_shard`, see to themselves.
        units: its units.
        shared: what they share.

    Returns:
        Those of each unit, and those that units share.
    """
    wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    elsewhere = {id(parameter) for wrapper in wrappers for parameter in wrapper.parameters()}
    elsewhere |= parameters_of_blocks(model)

    def mine(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        return [p for p in parameters if id(p) not in elsewhere]

    return [mine(unit.parameters()) for unit in units], mine(shared)


class _Bucket:
    """Gradients of one dtype in one buffer, whose all-reduce is under way."""

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: DataParallel) -> None:
        # Ranks must agree on what is in the buffer: what a rank's tokens did not reach (an expert's weights) is zero.
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        # Of an unembedding that is spread by rows, this rank's: the ranks that share a batch have the same ones.
        self._grads = [shard_of(parameter.grad) for parameter in parameters if parameter.grad is not None]
        # Divided first: a sum over many ranks could be too large for fp16.
        self._buffer = torch.cat([grad.flatten() for grad in self._grads]).div_(ranks.size)
        self._work = dist.all_reduce(self._buffer, group=ranks.group, async_op=True)

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for the mean, and put it in the place of the gradients."""
        assert self._work is not None, "it is asynchronous"
        self._work.wait()
        means: tuple[Tensor, ...] = self._buffer.split([grad.numel() for grad in self._grads])
        torch._foreach_copy_(self._grads, [mean.view_as(g) for mean, g in zip(means, self._grads, strict=True)])


def _buckets(parameters: Sequence[nn.Parameter], ranks: DataParallel) -> list[_Bucket]:
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
    return [_Bucket(some, ranks) for some in by_dtype.values()]
