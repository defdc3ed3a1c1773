"""Which blocks learn together, and whose a parameter is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The run of blocks up to an exit: what learns together, from the loss of that exit alone.

    Attributes:
        index: position among the units, from 0; also the index of its exit.
        block_indices: its blocks' positions among the model's blocks.
    """

    index: int
    block_indices: tuple[int, ...]
    _parameters: tuple[nn.Parameter, ...]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that no other unit's loss reaches, frozen ones included.

        The first unit has everything before block 1 as well, and an exit norm of its own belongs to its unit.
        """
        return list(self._parameters)


def exit_blocks(exits: str | Iterable[int], num_blocks: int) -> tuple[int, ...]:
    """The blocks that have an exit: their indices, ascending, the last block always among them.

    Args:
        exits: "every", "every:k" for every k-th block, or block indices (negative ones count from the end).
        num_blocks: how many blocks the model has.

    Raises:
        ValueError: unknown form, or an index outside the model.
        TypeError: not a string and not integers.
    """
    last = num_blocks - 1
    if isinstance(exits, str):
        step = _every(exits, num_blocks)
        return tuple(sorted({*range(step - 1, num_blocks, step), last}))
    if not isinstance(exits, Iterable):
        raise TypeError(f"exits must be 'every', 'every:k' or block indices, got {exits!r}")
    indices = list(exits)
    for index in indices:
        if not isinstance(index, Integral) or isinstance(index, bool):
            raise TypeError(f"exits must hold block indices, got {index!r}; pass integers in {-num_blocks}..{last}")
        if not -num_blocks <= index < num_blocks:
            raise ValueError(
                f"exits has block {index}, but the model has {num_blocks} blocks; pass {-num_blocks}..{last}"
            )
    return tuple(sorted({*(int(index) % num_blocks for index in indices), last}))


def _every(exits: str, num_blocks: int) -> int:
    form, _, number = exits.partition(":")
    if form != "every" or (number and not number.isdecimal()) or exits.endswith(":"):
        raise ValueError(
            f"exits must be 'every', 'every:k' with k in 1..{num_blocks}, or block indices in "
            f"0..{num_blocks - 1}, got {exits!r}"
        )
    step = int(number or 1)
    if not 1 <= step <= num_blocks:
        raise ValueError(
            f"exits={exits!r}, but the model has {num_blocks} blocks; pass 'every:k' with k in 1..{num_blocks}"
        )
    return step


def make_units(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    exits_at: Sequence[int],
    *,
    shared: Sequence[nn.Parameter],
    modules: Sequence[Sequence[nn.Module]],
) -> tuple[tuple[Unit, ...], tuple[nn.Parameter, ...]]:
    """Split a model's parameters into units and what the units share.

    Args:
        model: the model.
        blocks: its blocks in order.
        exits_at: ascending block indices of the exits.
        shared: what the exits share: the unembedding, a shared exit norm.
        modules: per exit those between its block and the unembedding.

    Returns:
        The units, and the shared parameters: `shared` and every parameter that blocks of several units have in common.
    """
    runs = [tuple(range(first + 1, last + 1)) for first, last in zip((-1, *exits_at), exits_at)]  # noqa: B905
    in_units = [_unique(p for block in run for p in blocks[block].parameters()) for run in runs]
    uses = Counter(id(parameter) for parameters in in_units for parameter in parameters)
    common = [p for parameters in in_units for p in parameters if uses[id(p)] > 1]
    all_shared = _unique([*shared, *common])
    taken = {id(parameter) for parameter in all_shared}
    for parameters, of_exit in zip(in_units, modules, strict=True):
        parameters += [p for module in of_exit for p in module.parameters()]
    placed = {id(parameter) for parameters in in_units for parameter in parameters}
    in_units[0] = [*(p for p in model.parameters() if id(p) not in placed), *in_units[0]]
    units = [
        Unit(index=i, block_indices=run, _parameters=tuple(p for p in _unique(parameters) if id(p) not in taken))
        for i, (run, parameters) in enumerate(zip(runs, in_units, strict=True))
    ]
    return tuple(units), tuple(all_shared)


def _unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(parameter): parameter for parameter in parameters}.values())
