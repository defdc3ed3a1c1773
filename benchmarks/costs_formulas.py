"""FLOPs of a training step by formula: local training against backprop, and where it breaks even."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """L blocks of width D over a vocabulary of V."""

    num_blocks: int
    hidden_size: int
    vocab_size: int

    def __str__(self) -> str:
        return f"L={self.num_blocks} D={self.hidden_size} V={self.vocab_size}"

    @property
    def forward(self) -> int:
        """FLOPs a token of a block's forward: two for each of its 12 D² parameters."""
        return 24 * self.hidden_size**2

    @property
    def block(self) -> int:
        """The same with the backward, which is twice as much."""
        return 3 * self.forward

    @property
    def product(self) -> int:
        """FLOPs a token of one product with the unembedding."""
        return 2 * self.vocab_size * self.hidden_size


def backprop(shape: Shape) -> float:
    return shape.num_blocks * shape.block + 3 * shape.product


def backprop_with_checkpoints(shape: Shape) -> float:
    return shape.num_blocks * (shape.block + shape.forward) + 3 * shape.product


def backprop_from_every_exit(shape: Shape) -> float:
    return shape.num_blocks * (shape.block + 3 * shape.product)


def local(shape: Shape, num_exits: float) -> float:
    """With so many exits of two products each, or so many exits' worth of tokens."""
    return shape.num_blocks * shape.block + num_exits * 2 * shape.product


def one_exit_a_step(shape: Shape) -> float:
    """The mean over exits: the forward up to it, one block's backward, one exit."""
    mean_depth = (shape.num_blocks + 1) / 2
    return mean_depth * shape.forward + 2 * shape.forward + 2 * shape.product


SHAPES = (
    Shape(num_blocks=12, hidden_size=768, vocab_size=50304),
    Shape(num_blocks=12, hidden_size=2048, vocab_size=32000),
    Shape(num_blocks=24, hidden_size=2048, vocab_size=32000),
    Shape(num_blocks=32, hidden_size=4096, vocab_size=128256),
)
ROWS: dict[str, Callable[[Shape], float]] = {
    "backprop, loss at the top": backprop,
    "backprop with checkpoints": backprop_with_checkpoints,
    "backprop, a loss at every block": backprop_from_every_exit,
    "local, an exit on every block": lambda shape: local(shape, shape.num_blocks),
    'local, `exits="every:6"`': lambda shape: local(shape, math.ceil(shape.num_blocks / 6)),
    "local, `token_share` of 1/L": lambda shape: local(shape, 1),
    "local, `exits_per_step=1`": one_exit_a_step,
}
LIMITS = (1.0, 1.05, 1.15, 1.5, 2.0)


def exits_within(shape: Shape, limit: float) -> int:
    """The most exits with which local training takes at most `limit` times backprop's FLOPs."""
    return math.floor((limit * backprop(shape) - shape.num_blocks * shape.block) / (2 * shape.product) + 1e-9)


def tables() -> str:
    """What a step takes in units of backprop, and the most exits within a limit."""
    head = "| | " + " | ".join(map(str, SHAPES)) + " |\n|---|" + "---|" * len(SHAPES) + "\n"
    costs = "".join(
        f"| {name} | " + " | ".join(f"{cost(shape) / backprop(shape):.2f}" for shape in SHAPES) + " |\n"
        for name, cost in ROWS.items()
    )
    exits = "".join(
        f"| {limit:g} × backprop | " + " | ".join(str(exits_within(shape, limit)) for shape in SHAPES) + " |\n"
        for limit in LIMITS
    )
    return (
        f"FLOPs of a step, in units of backprop with one loss at the top:\n\n{head}{costs}\n"
        f"The most exits that fit into a budget:\n\n{head}{exits.rstrip()}"
    )
