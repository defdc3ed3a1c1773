"""The exits of a model: which norm stands in front of the unembedding, and how hidden states become logits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from localexit.local.bodies import BlockBody, BlockCall
from localexit.local.discover import Anatomy, apply_tail, capped
from localexit.local.sharding import replicating, whole

EXIT_NORMS = ("shared", "copy", "none")


@dataclass(frozen=True, kw_only=True)
class Exit:
    """One exit.

    Attributes:
        index: position among the exits, from 0.
        block_index: position of its block among the model's blocks.
        norm: modules between the block's hidden and the unembedding, in order.
        body: modules of the exit's own in front of its norm, which work token by token.
        block: a copy of its block in front of these, or None.
    """

    index: int
    block_index: int
    norm: tuple[nn.Module, ...]
    body: tuple[nn.Module, ...] = ()
    block: BlockBody | None = None

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Everything between the block's hidden and the unembedding, in order."""
        copied = () if self.block is None else (self.block.module,)
        return (*copied, *self.body, *self.norm)

    @property
    def num_own_blocks(self) -> int:
        """Blocks that are run for this exit alone."""
        return 0 if self.block is None else 1

    def reads(self, call: BlockCall) -> Tensor:
        """What the exit computes from, [B, T, D']: the block's hidden, through the exit's own block if it has one."""
        return call.hidden if self.block is None else self.block(call)

    def normed(self, hidden: Tensor) -> Tensor:
        """What it reads [..., D'] through body and norm: [..., D]."""
        return apply_tail((*self.body, *self.norm), hidden)


@dataclass(frozen=True, kw_only=True)
class Readout:
    """From a hidden to logits: `softcap(normed @ W.T + bias)` with `normed = scale * norm(hidden)`.

    The model's constant factor of the logits sits in `normed` and in `bias`, so that the exit computes exactly the
    model's logits from plain (normed, W, bias).
    """

    unembedding: nn.Linear
    scale: float
    softcap: float | None

    @property
    def weight(self) -> Tensor:
        """W [V, D]."""
        return self.unembedding.weight

    def normed(self, exit_: Exit, hidden: Tensor) -> Tensor:
        """What the exit's loss is computed from: [..., D]."""
        normed = exit_.normed(hidden)
        return normed if self.scale == 1.0 else normed * self.scale

    def bias(self) -> Tensor | None:
        """The logits' bias [V], with its graph."""
        bias = self.unembedding.bias
        return bias if bias is None or self.scale == 1.0 else bias * self.scale

    def logits(self, exit_: Exit, hidden: Tensor) -> Tensor:
        """Logits [..., V], by the operations of the model's own forward in their order."""
        normed = exit_.normed(hidden)
        with replicating():
            logits = whole(self.unembedding(normed))
        return capped(logits if self.scale == 1.0 else logits * self.scale, self.softcap)


def make_exits(
    exits_at: Sequence[int], anatomy: Anatomy, exit_norm: str | nn.Module
) -> tuple[tuple[Exit, ...], nn.ModuleList]:
    """The exits, and the norms among theirs that the model does not have.

    The last exit always has the model's own tail: there, exit and model are the same thing.

    Args:
        exits_at: ascending block indices, the last block's included.
        anatomy: the model's parts.
        exit_norm: "shared" (the model's tail at every exit), "copy" (a copy of it each), "none", or one module for all
            exits but the last.

    Raises:
        ValueError: unknown name, the norm's output does not fit the unembedding, or no exit would use the module.
        TypeError: neither a name nor a module.
    """
    early = len(exits_at) - 1
    if isinstance(exit_norm, nn.Module) and early == 0:
        raise ValueError(
            "exit_norm is a module for all exits but the last, and the last is the only exit; leave exit_norm "
            "out, or give more blocks an exit with exits="
        )
    norms, added = _early_norms(exit_norm, anatomy.tail, early)
    exits = tuple(
        Exit(index=i, block_index=block, norm=norm)
        for i, (block, norm) in enumerate(zip(exits_at, (*norms, anatomy.tail), strict=True))
    )
    if early:
        # One for all: their norms are of one kind.
        _check_width(exits[0], anatomy)
    return exits, added


def _early_norms(
    exit_norm: str | nn.Module, tail: tuple[nn.Module, ...], num_early: int
) -> tuple[list[tuple[nn.Module, ...]], nn.ModuleList]:
    if isinstance(exit_norm, nn.Module):
        return [(exit_norm,)] * num_early, nn.ModuleList([exit_norm])
    if not isinstance(exit_norm, str):
        raise TypeError(
            f"exit_norm must be one of {', '.join(EXIT_NORMS)}, or a module, got {type(exit_norm).__name__}"
        )
    if exit_norm not in EXIT_NORMS:
        raise ValueError(f"exit_norm must be one of {', '.join(EXIT_NORMS)}, or a module, got {exit_norm!r}")
    if exit_norm == "copy":
        copies = nn.ModuleList(nn.ModuleList(copy.deepcopy(tail)) for _ in range(num_early))
        return [tuple(modules) for modules in copies], copies  # type: ignore[arg-type]
    return [tail if exit_norm == "shared" else ()] * num_early, nn.ModuleList()


def _check_width(exit_: Exit, anatomy: Anatomy) -> None:
    width = anatomy.unembedding.weight.shape[1]
    with torch.no_grad():
        normed = apply_tail(exit_.norm, anatomy.example_hidden)
    if normed.shape[-1] != width:
        raise ValueError(
            f"exit_norm gives D={normed.shape[-1]} from the blocks' hidden of "
            f"{anatomy.example_hidden.shape[-1]}, but the unembedding is [V, "
            f"D]={list(anatomy.unembedding.weight.shape)}; pass exit_norm='shared', or a module that "
            f"returns D={width}"
        )


def warn_if_scale_invariant(exits: Sequence[Exit], hidden: Tensor, rule: str) -> None:
    """Warn when an exit's norm removes what the `parallel` rules feed back: the part along the normed hidden.

    Args:
        exits: the exits.
        hidden: [B, T, D'], a hidden state to try.
        rule: name of the feedback rule.
    """
    if not rule.startswith("parallel"):
        return
    with torch.no_grad():
        invariant = [exit_.index for exit_ in exits if _is_scale_invariant(exit_.norm, hidden)]
    if invariant:
        warnings.warn(
            f"feedback {rule!r} works along the normed hidden, and the norm of exits {invariant} does not "
            f"depend on the scale of its input: it removes that part of the feedback, and little or nothing "
            f"reaches the blocks. Choose another rule, or exit_norm='none'",
            UserWarning,
            stacklevel=3,
        )


def _is_scale_invariant(norm: Sequence[nn.Module], hidden: Tensor) -> bool:
    once, twice = apply_tail(norm, hidden), apply_tail(norm, 2 * hidden)
    # The norm's epsilon keeps the two from being equal; a norm that depends on the scale changes by the order of one.
    return bool((twice - once).norm() <= 0.05 * once.norm())
