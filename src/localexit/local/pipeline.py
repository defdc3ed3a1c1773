"""A pipeline of units over ranks: hidden states go forward from stage to stage, and nothing comes back.

With backprop a stage waits for the gradient of every micro-batch to come back through all later ones. A unit learns
from its own exit: a stage sends a micro-batch's hidden states on as soon as it has them, learns, and takes the next
one. Only the first micro-batch of a step is waited for, and what units share is summed once, at the step's end.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from localexit import _checks
from localexit.exits.chunked import raw_logits
from localexit.exits.pairs import measured_rows
from localexit.feedback.rows import Pairs, WeightMirror
from localexit.feedback.shared import SharedAnchors
from localexit.local.batch import num_targets, shifted
from localexit.local.graph import reached
from localexit.local.model import LocalModel
from localexit.local.trees import tensors_requiring_grad

# Of an exit's products, and with them of anchors.
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Pipeline:
    """This rank's stage: a run of a model's units, as many as any other stage's or one fewer.

    Every rank builds the same model, attaches it with backward="stream" and makes its stage of it, which frees the
    blocks of the other stages. Then, for each batch, the same on all ranks:

        losses = stage.step_gradients(input_ids, labels, num_microbatches=8)
        optimizer.step()  # over stage.parameters()
        optimizer.zero_grad()
        stage.update()

    Args:
        local: the attached model.
        group: the ranks, first stage first; None is the default group.
        is_shared: keep what units share (the unembedding, a shared norm) equal on all stages, by one all-reduce of
            its gradient a step. Without it every stage has its own and stages never wait for each other's steps; the
            model of the last one is then the one whose last exit is good.

    Attributes:
        units: the first and the last unit of this stage.

    Raises:
        ValueError: there are more ranks than units, the model is attached in another way, or its blocks hand on more
            than their hidden states.
    """

    def __init__(self, local: LocalModel, *, group: dist.ProcessGroup | None = None, is_shared: bool = True) -> None:
        _checks.process_group("group", group)
        if local.backward_mode != "stream" or local.data_parallel is not None or local.in_backward is not None:
            raise ValueError(
                "a pipeline trains units of a model attached with backward='stream', without data_parallel and with an "
                "ordinary optimiser; attach it so"
            )
        local.refuse_vocab_parallel("a pipeline")
        self.local = local
        self.group = group
        self.is_shared = is_shared
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.units = _share(local.num_exits, self.rank, self.size)
        self._width = local.anatomy.example_hidden.shape[-1]
        self._dtype = local.anatomy.example_hidden.dtype
        self._followed = self._outside_parameters()
        self._shapes = self._free_others()

    def parameters(self) -> list[nn.Parameter]:
        """What this stage trains: its units, and what units share."""
        first, last = self.units
        own = [p for unit in self.local.units[first : last + 1] for p in unit.parameters()]
        return [*own, *self.local.shared_parameters()]

    def step_gradients(
        self, input_ids: Tensor, labels: Tensor, *, num_microbatches: int, num_items: Tensor | int | None = None
    ) -> Tensor:
        """Gradients of one batch in `.grad`, of all the parameters of this stage.

        Args:
            input_ids: int64 [B, T], the same on all ranks.
            labels: int64 [B, T].
            num_microbatches: how many parts of B/num_microbatches rows the batch is sent in.
            num_items: what the summed loss is divided by; by default the number of labels that count.

        Returns:
            [num_exits], every exit's loss over the batch, on all ranks; NaN for exits that sat the step out.

        Raises:
            ValueError: the rows cannot be shared equally among micro-batches.
        """
        if input_ids.shape[0] % _checks.count("num_microbatches", num_microbatches, minimum=1):
            raise ValueError(
                f"num_microbatches: expected a divisor of the {input_ids.shape[0]} rows, got {num_microbatches}"
            )
        for parameter in self._followed:
            dist.broadcast(parameter.detach(), group=self.group, group_src=0)
        num_items = num_targets(shifted(labels)) if num_items is None else num_items
        parts = list(zip(input_ids.chunk(num_microbatches), labels.chunk(num_microbatches), strict=True))
        losses = self._run(parts, num_items)
        if self.is_shared:
            self._sum_shared()
            self._share_pairs()
        dist.all_reduce(losses, group=self.group)
        return losses

    def update(self) -> None:
        """Call once after the optimiser's step: as `LocalModel.update()`."""
        self.local.update()

    @torch.no_grad()
    def gather(self) -> LocalModel:
        """The whole model on every rank, each unit from the stage that trained it; for evaluation and saving.

        Stages go on training afterwards with `free()`.
        """
        for rank in range(self.size):
            first, last = _share(self.local.num_exits, rank, self.size)
            for unit in self.local.units[first : last + 1]:
                for parameter in unit.parameters():
                    if id(parameter) in self._shapes:
                        parameter.data = parameter.data.new_empty(self._shapes[id(parameter)])
                    dist.broadcast(parameter.detach(), group=self.group, group_src=rank)
        for parameter in self.local.shared_parameters():
            dist.broadcast(parameter.detach(), group=self.group, group_src=self.size - 1)
        return self.local

    def free(self) -> None:
        """Give up again what `gather()` has brought from other stages."""
        self._shapes = self._free_others()

    def _run(self, parts: list[tuple[Tensor, Tensor]], num_items: Tensor | int) -> Tensor:
        first, last = self.units
        losses = torch.zeros(self.local.num_exits, dtype=torch.float64, device=parts[0][0].device)
        incoming = [self._receive(parts[0][0])]
        self._sending: list[tuple[dist.Work, Tensor]] = []
        # Before anything else is asked for: the stages before have their anchors after their first micro-batch.
        is_measured = any(self._anchors_of(stage) for stage in range(self.rank))
        for number, (ids, labels) in enumerate(parts):
            # Asked for before this one is worked on, so that it can arrive meanwhile.
            if number + 1 < len(parts):
                incoming.append(self._receive(parts[number + 1][0]))
            output = self.local.train_units(
                first, last, ids, labels, num_items=num_items, hidden=_arrived(incoming.pop(0)), send=self._send
            )
            losses[first : last + 1] += output.exit_losses[first : last + 1]
            if number == 0 and not is_measured:
                is_measured = self._anchors_of(self.rank)
        if not is_measured:
            # Nothing of this stage or of those before has learned: a later one measures.
            any(self._anchors_of(stage) for stage in range(self.rank + 1, self.size))
        for work, _ in self._sending:
            work.wait()
        return losses

    def _receive(self, ids: Tensor) -> tuple[dist.Work, Tensor] | None:
        if self.rank == 0:
            return None
        hidden = torch.empty(*ids.shape, self._width, dtype=self._dtype, device=ids.device)
        work = dist.irecv(hidden, group=self.group, group_src=self.rank - 1)
        assert work is not None, "this rank is in the group"
        return work, hidden

    def _send(self, hidden: Tensor) -> None:
        if self.rank == self.size - 1:
            return
        # What is done is forgotten, with the hidden states that were sent.
        self._sending = [(work, sent) for work, sent in self._sending if not work.is_completed()]
        hidden = hidden.to(self._dtype).contiguous()
        work = dist.isend(hidden, group=self.group, group_dst=self.rank + 1)
        assert work is not None, "this rank is in the group"
        self._sending.append((work, hidden))

    def _sum_shared(self) -> None:
        for parameter in self.local.shared_parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=self.group)

    @torch.no_grad()
    def _share_pairs(self) -> None:
        """Let a mirror learn from all exits: hidden states are sent, and measured with this stage's unembedding."""
        rule, weight = self.local.feedback, self.local.unembedding.weight
        if not isinstance(rule, WeightMirror):
            return
        numbers = torch.zeros(self.local.num_exits, dtype=torch.int64, device=weight.device)
        for index, pairs in rule.pairs.items():
            numbers[index] = len(pairs.keys)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.group)
        for index, number in enumerate(numbers.tolist()):
            if not number:
                continue
            own = rule.pairs.get(index)
            keys = numbers.new_empty(number) if own is None else own.keys.contiguous()
            hidden = weight.new_empty(number, weight.shape[1]) if own is None else own.hidden.contiguous()
            for tensor in (keys, hidden):
                dist.broadcast(tensor, group=self.group, group_src=self._stage_of(index))
            if own is None:
                logits = raw_logits(hidden, weight)
                rule.collect(index, Pairs(hidden=hidden, logits=logits, keys=keys))

    @torch.no_grad()
    def _anchors_of(self, stage: int) -> bool:
        """Let all stages have the rows that an exit of `stage` measured, if one did: its anchors are sent.

        Returns:
            Whether nothing more is to be shared.
        """
        rule, weight = self.local.feedback, self.local.unembedding.weight
        if not isinstance(rule, SharedAnchors) or not self.is_shared:
            return True
        measured = rule.measured
        about = torch.zeros(2, dtype=torch.int64, device=weight.device)
        if measured is not None:
            about[0], about[1] = len(measured.hidden), _DTYPES.index(measured.hidden.dtype)
        dist.broadcast(about, group=self.group, group_src=stage)
        num, dtype = about.tolist()
        if not num:
            return False
        hidden = torch.empty(num, weight.shape[1], dtype=_DTYPES[dtype], device=weight.device)
        is_counted = torch.empty(num, dtype=torch.bool, device=weight.device)
        if measured is not None and self.rank == stage:
            hidden.copy_(measured.hidden)
            is_counted.copy_(measured.is_counted)
        for tensor in (hidden, is_counted):
            dist.broadcast(tensor, group=self.group, group_src=stage)
        if measured is None:
            rule.keep(measured_rows(rule, hidden, is_counted, weight.detach()))
        return True

    def _stage_of(self, exit_index: int) -> int:
        shares = [_share(self.local.num_exits, rank, self.size) for rank in range(self.size)]
        return next(rank for rank, (first, last) in enumerate(shares) if first <= exit_index <= last)

    def _outside_parameters(self) -> list[nn.Parameter]:
        """What the first unit trains and blocks of later stages use as well, otherwise than through their hidden."""
        local, (first, last) = self.local, self.units
        ids = torch.zeros(1, 2, dtype=torch.int64, device=local.unembedding.weight.device)
        # Also for what blocks return: where they run for the first time, nobody knows how to leave them out.
        local.evaluate(ids, ids)
        found: set[int] = set()

        def look(_block: nn.Module, args: object, kwargs: object) -> None:
            leaves, _ = reached(tensors_requiring_grad((args, kwargs)))
            found.update(map(id, leaves))

        if first > 0:
            own = [local.blocks[i] for unit in local.units[first : last + 1] for i in unit.block_indices]
            handles = [block.register_forward_pre_hook(look, with_kwargs=True, prepend=True) for block in own]
            hidden = torch.zeros(1, 2, self._width, dtype=self._dtype, device=ids.device)
            try:
                local.train_units(first, last, ids, ids, num_items=1, hidden=hidden)
            finally:
                for handle in handles:
                    handle.remove()
            local.discard()
            local.zero_grad()
        outside = local.units[0].parameters()
        is_used = torch.tensor([id(p) in found for p in outside], dtype=torch.int64, device=ids.device)
        dist.all_reduce(is_used, op=dist.ReduceOp.MAX, group=self.group)
        return [p for p, used in zip(outside, is_used.tolist(), strict=True) if used]

    def _free_others(self) -> dict[int, torch.Size]:
        """Free the blocks of other stages; the shapes of what was freed."""
        first, last = self.units
        shared = {id(parameter) for parameter in self.local.shared_parameters()}
        shapes: dict[int, torch.Size] = {}
        for unit in (*self.local.units[:first], *self.local.units[last + 1 :]):
            for parameter in _of_blocks(self.local, unit.block_indices):
                if id(parameter) not in shared:
                    shapes[id(parameter)] = parameter.shape
                    parameter.data = parameter.data.new_empty(0)
        return shapes


def _share(num_units: int, rank: int, size: int) -> tuple[int, int]:
    """First and last unit of a stage: runs that differ in length by at most one, the longer ones first."""
    if size > num_units:
        raise ValueError(
            f"a pipeline of {size} stages needs as many units, and the model has {num_units}; put exits on more "
            f"blocks, or start fewer processes"
        )
    length, longer = divmod(num_units, size)
    first = rank * length + min(rank, longer)
    return first, first + length - (rank >= longer)


def _of_blocks(local: LocalModel, indices: Iterable[int]) -> list[nn.Parameter]:
    return [parameter for index in indices for parameter in local.blocks[index].parameters()]


def _arrived(incoming: tuple[dist.Work, Tensor] | None) -> Tensor | None:
    if incoming is None:
        return None
    work, hidden = incoming
    work.wait()
    return hidden
