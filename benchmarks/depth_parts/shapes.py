"""What is measured: stacks of blocks and their batches."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A stack of blocks and its batch."""

    num_blocks: int
    hidden_size: int
    vocab_size: int
    batch_size: int
    context: int


def with_depth(shape: Shape, depth: int) -> Shape:
    """The same stack with another number of blocks."""
    return Shape(**{**asdict(shape), "num_blocks": depth})


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured in each part.

    Attributes:
        memory, depths: the stack of the memory part, and its numbers of blocks.
        time: stacks of the time part, by name.
        largest, fitted_depths: the stack of the last part, and the depths from which the peak is extrapolated.
        rounds: of the time part.
    """

    memory: Shape
    depths: tuple[int, ...]
    time: dict[str, Shape]
    largest: Shape
    fitted_depths: tuple[int, ...] = (4, 8, 16)
    rounds: int = 7


def shape_of(num_blocks: int, hidden_size: int, vocab_size: int, batch_size: int, context: int) -> Shape:
    return Shape(
        num_blocks=num_blocks,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        batch_size=batch_size,
        context=context,
    )


SIZES = {
    "gpu": Sizes(
        memory=shape_of(4, 1024, 32768, 8, 1024),
        depths=(4, 8, 16, 32, 64),
        time={
            "large vocabulary": shape_of(12, 768, 50304, 16, 1024),
            "large width": shape_of(12, 2048, 32000, 8, 1024),
        },
        largest=shape_of(4, 2048, 32000, 4, 1024),
    ),
    "cpu": Sizes(
        memory=shape_of(4, 128, 2048, 4, 128),
        depths=(4, 8, 16, 32, 64),
        time={"small": shape_of(6, 128, 2048, 4, 128)},
        largest=shape_of(4, 128, 2048, 4, 128),
        rounds=3,
    ),
    "tiny": Sizes(
        memory=shape_of(2, 16, 40, 2, 8),
        depths=(2, 4, 8),
        time={"tiny": shape_of(2, 16, 40, 2, 8)},
        largest=shape_of(2, 16, 40, 2, 8),
        rounds=1,
    ),
}
