"""Time of whole optimiser steps."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import Any

from depth_parts.contenders import adamw, contender
from depth_parts.models import Machine
from depth_parts.shapes import Shape

TIME_KINDS = (
    "backprop, loss at the top",
    "backprop, loss at every exit",
    "local, every block",
    "local, every:6",
    "local, one exit a step",
    "local, one exit's worth of tokens",
)


def measure_time(machine: Machine, shape: Shape, rounds: int, rule: str) -> dict[str, Any]:
    """Milliseconds of a whole step of every contender, in rounds that take turns after two that warm up.

    All train one model with one optimiser, so that any number of contenders fits.
    """
    model = machine.model(shape, is_compiled=True)
    optimizer = adamw(model.parameters())
    taken: dict[str, list[float]] = {kind: [] for kind in TIME_KINDS}
    ids = machine.ids(shape)
    for number in range(rounds + 2):
        for kind in TIME_KINDS:
            # A step with one exit costs as much as the exit is deep: the mean over many steps is what counts.
            num_steps = 4 * shape.num_blocks if "one exit a step" in kind and number > 1 else 2
            with contender(machine, model, kind, optimizer=optimizer, rule=rule) as made:
                made.step(ids)
                machine.wait()
                start = time.perf_counter()
                for _ in range(num_steps):
                    made.step(ids)
                machine.wait()
            if number > 1:
                taken[kind].append(1e3 * (time.perf_counter() - start) / num_steps)
    top, every = (statistics.median(taken[kind]) for kind in TIME_KINDS[:2])
    return {
        "shape": asdict(shape),
        "rule": rule,
        "rounds": rounds,
        "results": [
            {
                "name": kind,
                "median_ms": statistics.median(own),
                "min_ms": min(own),
                "max_ms": max(own),
                "of_top": statistics.median(own) / top,
                "faster_than_every_exit": every / statistics.median(own),
            }
            for kind, own in taken.items()
        ],
    }
