"""The processes of one run: joined at its start, asked to agree, parted at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from localexit.exits.ranks import DataParallel
from localexit.train.launch import is_launched, local_rank, num_restarts, world_rank, world_size

# A rank that says nothing for so long is taken for lost; the others end with an error.
TIMEOUT = timedelta(minutes=5)
# For what takes long by nature, the first rank's reading of a large text.
PATIENCE = timedelta(hours=6)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        device: where it computes.
        data_parallel: the ranks that share each batch; None for a process by itself.
        slow: a group of all ranks that waits long, on the CPU; None likewise.
    """

    device: torch.device
    data_parallel: DataParallel | None = None
    slow: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """This process's place."""
        return world_rank()

    @property
    def size(self) -> int:
        """How many processes there are."""
        return world_size()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files and talks."""
        return self.rank == 0

    def largest(self, number: int) -> int:
        """The largest of the numbers that the ranks have: what one of them knows, all know."""
        if self.data_parallel is None:
            return number
        numbers = torch.tensor(number, device=self.device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.data_parallel.group)
        return int(numbers)

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.slow is not None:
            dist.barrier(group=self.slow)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process does what is inside before the others do; of each machine the one that is first there."""
        is_first = local_rank() == 0
        if not is_first:
            self.wait()
        yield
        if is_first:
            self.wait()


@contextmanager
def joined(device: torch.device, *, needs_group: bool = False) -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, for as long as the block runs; a process by itself joins nobody.

    Args:
        device: as asked for; on a GPU machine a rank takes the GPU of its own number.
        needs_group: make a process by itself a group of one, for what works in groups only.
    """
    if not (is_launched() or needs_group):
        yield Ranks(device=device)
        return
    is_cuda = device.type == "cuda"
    if is_cuda and device.index is None:
        device = torch.device("cuda", local_rank())
    if is_cuda:
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT)) if is_launched() else (HashStore(), 0, 1)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        # torchrun keeps one store over restarts, and in it the addresses of processes that are gone.
        store=PrefixStore(str(num_restarts()), store),
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=device if is_cuda else None,
    )
    try:
        yield Ranks(
            device=device,
            data_parallel=DataParallel(),
            slow=dist.new_group(backend="gloo", timeout=PATIENCE),
        )
    finally:
        dist.destroy_process_group()
