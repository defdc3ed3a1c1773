"""Which exits take part in a step, with which weight, and how many of the tokens each one sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from localexit import _checks
from localexit.feedback.draws import choose_exits


def checked_weights(weights: Sequence[float], num_exits: int) -> tuple[float, ...]:
    """What each exit's loss counts, as floats.

    Raises:
        ValueError: another number of weights than exits, or one that is not positive.
        TypeError: something else than numbers.
    """
    expected = f"exit_weights must be {num_exits} positive numbers, one per exit"
    try:
        values = tuple(float(weight) for weight in weights)
    except (TypeError, ValueError):
        raise TypeError(f"{expected}, got {weights!r}") from None
    if len(values) != num_exits or not all(0 < value < math.inf for value in values):
        raise ValueError(
            f"{expected}, got {list(values)}; leave an exit out with exits= instead of giving it no weight"
        )
    return values


@dataclass(frozen=True, kw_only=True)
class ExitSchedule:
    """What exits do from step to step. Two ways to make them cheaper, and a warm-up.

    Both ways are unbiased: over the draws, the mean of every gradient is that of all exits on all tokens. Draws are a
    pure function of the rule's seed and step, so a resumed run makes the same ones, and all ranks draw the same exits.
    Tokens each rank draws among its own: unbiased too, but not the tokens that one process would draw.

    Args:
        exits_per_step: so many exits take part in a step, drawn anew for each, and their losses count num_exits /
            exits_per_step times as much. The units of the others pass their hidden states on and do not learn in this
            step; behind the last exit that takes part nothing is run. None: all take part.
        token_share: the share of its tokens that an exit sees, in (0, 1], drawn anew for each exit and step. The rest
            costs nothing at the exit, and the loss is the mean over those it sees.
        warmup: in how many steps an exit's weight rises from zero to its full value, linearly; one number for all
            exits, or one each.

    Raises:
        ValueError: a number is out of range.
        TypeError: something else than numbers.
    """

    exits_per_step: int | None = None
    token_share: float = 1.0
    warmup: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        if self.exits_per_step is not None:
            _checks.count("exits_per_step", self.exits_per_step, minimum=1)
        _checks.fraction("token_share", self.token_share)
        for steps in self._warmups(1):
            _checks.count("warmup", steps, minimum=0)

    @property
    def depends_on_step(self) -> bool:
        """Whether the weights are others from step to step."""
        return self.exits_per_step is not None or any(self._warmups(1))

    def check(self, num_exits: int) -> None:
        """Whether the schedule fits a model with so many exits.

        Raises:
            ValueError: it does not.
        """
        if self.exits_per_step is not None and self.exits_per_step > num_exits:
            raise ValueError(
                f"exits_per_step must be at most {num_exits}, the number of exits, got {self.exits_per_step}"
            )
        if len(self._warmups(num_exits)) != num_exits:
            raise ValueError(
                f"warmup must be one number of steps or {num_exits}, one per exit, got {list(self._warmups(num_exits))}"
            )

    def weights(self, full: Sequence[float], *, seed: int, step: int) -> tuple[float, ...]:
        """What each exit's loss counts in a step; 0 for the exits that sit it out.

        Args:
            full: the exits' weights without a schedule.
            seed: of the draw.
            step: number of optimiser steps before this one.
        """
        num_exits = len(full)
        ramps = [min(1.0, (step + 1) / steps) if steps else 1.0 for steps in self._warmups(num_exits)]
        chosen, factor = tuple(range(num_exits)), 1.0
        if self.exits_per_step is not None:
            chosen = choose_exits(seed, step, self.exits_per_step, num_exits)
            factor = num_exits / self.exits_per_step
        return tuple(
            weight * ramp * factor if index in chosen else 0.0
            for index, (weight, ramp) in enumerate(zip(full, ramps, strict=True))
        )

    def _warmups(self, num_exits: int) -> tuple[int, ...]:
        return self.warmup if isinstance(self.warmup, tuple) else (self.warmup,) * num_exits
