"""Hooks on the blocks: they keep the units' graphs apart, call the exits, and end the forward after the last one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from localexit.local.bodies import BlockCall
from localexit.local.exits import Exit
from localexit.local.graph import UnitGraph, origin
from localexit.local.parts import Parts
from localexit.local.router import RouterPlace
from localexit.local.sharding import reshard, sharded_modules
from localexit.local.steps import Step, StreamStep, TrainingStep
from localexit.local.trees import detach_tensor, first_tensor, replace_tensors, tensors_requiring_grad
from localexit.local.units import Unit


class ForwardDone(BaseException):
    """Ends a forward after the last exit, so that the model's own tail, logits and loss are not computed.

    Not an `Exception`, so that a model's own error handling lets it pass.
    """


class BlockHooks:
    """Hooks on every block; they do nothing unless a step is running.

    Args:
        model: the model, for the names of its parameters.
        blocks: its blocks, in order.
        after_blocks: the module that runs next after the last block.
        units: the units, in order.
        exits: the exits, one per unit.
        parts: what must still be in the model when a step runs.
        router_places: where the logits of the blocks' routers are.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        after_blocks: nn.Module,
        units: Sequence[Unit],
        exits: Sequence[Exit],
        parts: Parts,
        router_places: Sequence[RouterPlace],
    ) -> None:
        names = {id(module): name for name, module in model.named_modules()}
        self._blocks = [(names[id(block)], block) for block in blocks]
        self._units = [unit for unit in units for _ in unit.block_indices]
        self._exits = tuple(exits)
        self._parts = parts
        self._sharded = sharded_modules(model)
        self._graphs = unit_graphs(model, blocks, units)
        self._step: Step | None = None
        self._is_done = False
        self._num_skipped = 0
        self._checked: set[int] = set()
        self._first_inputs: set[Any] = set()
        # How many values each block returned when it last ran outside of training, None for a bare hidden.
        self._num_returned: dict[int, int | None] = {}
        # A compiled block must not trace what happens at an exit. Plain functions, so that a deep copy of these hooks
        # works on the copy.
        self._enter_block = torch.compiler.disable(BlockHooks._separate_inputs)
        self._leave_block = torch.compiler.disable(BlockHooks._run_exit)
        self._handles = [
            # Before other hooks on the block: sharding has one that wraps what has a graph.
            *(
                block.register_forward_pre_hook(functools.partial(self._before, index), with_kwargs=True, prepend=True)
                for index, block in enumerate(blocks)
            ),
            # Not at the end of the block itself: other hooks on it must run.
            *(module.register_forward_pre_hook(self._stop, prepend=True) for module in (*blocks, after_blocks)),
            *(
                block.register_forward_hook(functools.partial(self._after, index), with_kwargs=True)
                for index, block in enumerate(blocks)
            ),
            *(place.module.register_forward_hook(functools.partial(self._keep, place)) for place in router_places),
        ]

    @contextmanager
    def running(self, step: Step) -> Iterator[None]:
        """Send the hidden states of the forward inside to `step`, until its last exit.

        Raises:
            RuntimeError: another step is running, or the forward inside did not come to the last exit.
            ValueError: a part of the model was replaced.
        """
        if self._step is not None:
            raise RuntimeError("this model is in the middle of a forward; run one step after the other")
        self._parts.check()
        self._step, self._is_done = step, False
        try:
            yield
        except ForwardDone as done:
            # Its frames lead back to it (from Python 3.12 on), and would keep the step until a garbage collection.
            done.__traceback__ = None
        else:
            raise RuntimeError(
                f"the forward ended without running block {self._blocks[-1][0]!r}, so its exit has no loss; "
                f"blocks that are skipped at random (layer drop), or that ran compiled before attach(), do not "
                f"go together with exits: switch the former off, compile after attaching"
            )
        finally:
            self._step, self._is_done = None, False
            self._first_inputs.clear()
            for graph in self._graphs:
                graph.leave()
            if not step.is_training:
                reshard(self._sharded)

    @contextmanager
    def skipping(self, num_blocks: int, hidden: Tensor) -> Iterator[None]:
        """Do not run the first `num_blocks` blocks: a forward inside goes on from `hidden` after the last of them.

        What else these blocks return (attention weights, for one) is None in there: whether a model minds must be
        tried.

        Raises:
            ValueError: one of them has not run yet.
        """
        self._num_skipped = num_blocks
        with ExitStack() as stack:
            stack.callback(setattr, self, "_num_skipped", 0)
            for index, (name, block) in enumerate(self._blocks[:num_blocks]):
                if index not in self._num_returned:
                    raise ValueError(f"{name} has not run yet; run the model from its first block once")
                num = self._num_returned[index]
                output = hidden if num is None else (hidden, *[None] * (num - 1))
                stack.enter_context(_replaced_forward(block, output))
            yield

    def remove(self) -> None:
        """Take the hooks off the blocks."""
        for handle in self._handles:
            handle.remove()

    def _stop(self, _module: nn.Module, _args: Any) -> None:
        if self._is_done:
            raise ForwardDone

    def _before(self, index: int, _block: nn.Module, args: Any, kwargs: Any) -> Any:
        step = self._step
        if step is None or not step.is_training:
            return None
        return self._enter_block(self, step, index, args, kwargs)

    def _after(self, index: int, _block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return None if self._step is None else self._leave_block(self, self._step, index, args, kwargs, output)

    def _keep(self, place: RouterPlace, _router: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(self._step, TrainingStep):
            self._step.router_logits.append(place.logits_in(output))

    def _separate_inputs(self, step: Step, index: int, args: Any, kwargs: Any) -> Any:
        unit = self._units[index]
        self._refuse_recomputation(step)
        if unit.index == 0:
            if len(self._checked) < len(self._exits):
                self._first_inputs.update(map(origin, tensors_requiring_grad((args, kwargs))))
            return None
        if index < self._num_skipped:
            return None
        graph = self._graphs[unit.index]
        separate = graph.enter if index == unit.block_indices[0] else graph.keep_own
        return separate(args), separate(kwargs)

    def _run_exit(self, step: Step, index: int, args: Any, kwargs: Any, output: Any) -> Any:
        unit = self._units[index]
        graph = self._graphs[unit.index]
        if not step.is_training:
            self._num_returned[index] = None if isinstance(output, Tensor) else len(output)
        if index < self._num_skipped:
            return None
        if index != unit.block_indices[-1]:
            graph.add_outputs(tensors_requiring_grad(output))
            return None
        name, block = self._blocks[index]
        hidden = first_tensor(output, what=name)
        if step.is_training and unit.index not in self._checked:
            self._check(unit, hidden)
            self._checked.add(unit.index)
        step.at_exit(self._exits[unit.index], BlockCall(block=block, args=args, kwargs=kwargs, hidden=hidden))
        if isinstance(step, TrainingStep) and step.is_training and not step.batch.weights[unit.index]:
            # It sits the step out: no backward comes that would put shards back in the place of whole parameters.
            reshard(module for i in unit.block_indices for module in sharded_modules(self._blocks[i][1]))
        graph.leave()
        self._is_done = unit.index == step.last_exit
        return replace_tensors(output, detach_tensor) if step.is_training else None

    def _check(self, unit: Unit, hidden: Tensor) -> None:
        """In its first training step: does this unit's loss train its own blocks, and nothing else?"""
        graph = self._graphs[unit.index]
        graph.check(hidden, [self._blocks[index] for index in unit.block_indices])
        names = graph.untrained(self._first_inputs)
        if names:
            warnings.warn(
                f"{', '.join(names)} reach {self._blocks[unit.block_indices[0]][0]} or a later block of its unit by "
                f"tensors that the first unit does not get. What lies outside of the blocks belongs to the first "
                f"unit, so nothing trains it by this way; to train it here, move it into a block",
                UserWarning,
                stacklevel=2,
            )

    def _refuse_recomputation(self, step: Step) -> None:
        in_backward = isinstance(step, StreamStep) and step.is_in_backward
        if in_backward or not torch.is_grad_enabled():
            raise ValueError(
                "a block runs under activation checkpointing (no_grad in the forward, or once more in the "
                "backward); switch it off: every unit frees its activations before the next one starts"
            )


@contextmanager
def _replaced_forward(module: nn.Module, output: Any) -> Iterator[None]:
    """Let a module return `output` without computing anything, compiled or not."""
    attributes = module.__dict__
    own: dict[str, Any] = {name: attributes[name] for name in ("forward", "_compiled_call_impl") if name in attributes}
    attributes.update(forward=lambda *_, **__: output, _compiled_call_impl=None)
    try:
        yield
    finally:
        del attributes["forward"], attributes["_compiled_call_impl"]
        attributes.update(own)


def unit_graphs(model: nn.Module, blocks: Sequence[nn.Module], units: Sequence[Unit]) -> list[UnitGraph]:
    """One `UnitGraph` per unit.

    The first unit owns whatever is not in another unit's blocks; a later one owns its blocks and nothing else.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own = [{id(p) for index in unit.block_indices for p in blocks[index].parameters()} for unit in units]
    in_blocks = set().union(*own)
    foreign = [in_blocks - own[0], *(set(names) - mine for mine in own[1:])]
    return [
        UnitGraph(names=names, own=mine, in_blocks=in_blocks, foreign=other)
        for mine, other in zip(own, foreign, strict=True)
    ]
