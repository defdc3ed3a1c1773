"""Reading the autograd graph: which parameters a tensor depends on, and whether a unit's graph is its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from localexit.local.trees import detach_tensor, replace_tensors


def reached(tensors: Iterable[Tensor], *, stop: Collection[Any] = ()) -> tuple[list[Tensor], bool]:
    """The leaves a gradient of these tensors would arrive at.

    Args:
        tensors: where the walk starts.
        stop: graph nodes to stop at.

    Returns:
        The leaves that require a gradient, and whether a node of `stop` was met.
    """
    starts = [tensor for tensor in tensors if tensor.requires_grad]
    leaves = {id(tensor): tensor for tensor in starts if tensor.grad_fn is None}
    todo: list[Any] = [tensor.grad_fn for tensor in starts if tensor.grad_fn is not None]
    seen: set[Any] = set()
    meets_stop = False
    while todo:
        node = todo.pop()
        if node in stop:
            meets_stop = True
        elif node is not None and node not in seen:
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None:
                leaves[id(variable)] = variable
            todo += [parent for parent, _ in node.next_functions]
    return list(leaves.values()), meets_stop


def origin(tensor: Tensor) -> Any:
    """What tells a tensor in a graph from others, whether it is a leaf or computed."""
    return id(tensor) if tensor.grad_fn is None else tensor.grad_fn


class UnitGraph:
    """Keeps the autograd graph of one unit's forward apart from everything that other units train.

    Args:
        names: name of each of the model's parameters by `id`, for the messages.
        own: `id` of the parameters in the unit's blocks.
        in_blocks: `id` of the parameters in any block.
        foreign: `id` of the parameters that this unit's loss must not reach.
    """

    def __init__(self, *, names: Mapping[int, str], own: set[int], in_blocks: set[int], foreign: set[int]) -> None:
        self.names = names
        self.own = own
        self.in_blocks = in_blocks
        self.foreign = foreign
        self._outputs: set[Any] = set()
        self._cut_off: list[Tensor] = []

    def enter(self, value: Any) -> Any:
        """Arguments of the unit's first block: nothing with a graph belongs to the unit, so all of it is detached."""
        return replace_tensors(value, self._cut)

    def keep_own(self, value: Any) -> Any:
        """Arguments of a later block of the unit: what its own blocks made stays, the rest is detached.

        Raises:
            ValueError: one tensor depends on both.
        """
        return replace_tensors(value, self._cut_foreign)

    def add_outputs(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that a block of the unit returned."""
        self._outputs.update(tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None)

    def leave(self) -> None:
        """Forget the unit's graph, so that its activations can be freed."""
        self._outputs.clear()
        self._cut_off.clear()

    def untrained(self, first_inputs: Collection[Any]) -> list[str]:
        """Parameters that reach this unit from outside of the blocks by tensors which the first unit does not get.

        Args:
            first_inputs: `origin` of the first unit's arguments.
        """
        leaves, _ = reached(tensor for tensor in self._cut_off if origin(tensor) not in first_inputs)
        return [self.names[id(leaf)] for leaf in leaves if id(leaf) in self.names and id(leaf) not in self.in_blocks]

    def check(self, hidden: Tensor, blocks: Sequence[tuple[str, nn.Module]]) -> None:
        """Check that the unit's hidden depends on the unit's parameters, on some of every block, and on no others.

        Raises:
            ValueError: the loss of this unit would train another one's parameters, or leave its own blocks untrained.
        """
        leaves, _ = reached([hidden])
        foreign = [self.names[id(leaf)] for leaf in leaves if id(leaf) in self.foreign]
        if foreign:
            raise ValueError(
                f"the hidden after {blocks[-1][0]} depends on parameters of another unit "
                f"({_shortened(foreign)}) by a way that does not pass through the block's arguments; pass "
                f"what blocks share as arguments, or put them into one unit with exits="
            )
        is_known = all(id(leaf) in self.names for leaf in leaves)
        found = {id(leaf) for leaf in leaves}
        for name, block in blocks:
            trainable = {id(parameter) for parameter in block.parameters() if parameter.requires_grad}
            # Parameters swapped in for the forward (sharding does that) cannot be told apart here.
            if is_known and trainable and not trainable & found:
                raise ValueError(
                    f"the exit after {blocks[-1][0]} would not train {name}: its hidden does not depend on "
                    f"the block's parameters; is the block run under no_grad or reentrant checkpointing, or "
                    f"its output replaced?"
                )

    def _cut_foreign(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad or tensor.grad_fn in self._outputs:
            return tensor
        leaves, meets_own = reached([tensor], stop=self._outputs)
        outside = [leaf for leaf in leaves if id(leaf) not in self.own]
        if outside and (meets_own or len(outside) < len(leaves)):
            names = [self.names.get(id(leaf), "an input") for leaf in outside]
            raise ValueError(
                f"a block receives a tensor that depends both on its own unit and on {_shortened(names)}, "
                f"which belongs to another one; pass the two as separate arguments, or put an exit on every "
                f"block with exits='every'"
            )
        return self._cut(tensor) if outside else tensor

    def _cut(self, tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            self._cut_off.append(tensor)
        return detach_tensor(tensor)


def _shortened(names: Sequence[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
