"""The largest model that trains in a given memory."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from depth_parts.contenders import STEPPED_IN_HOOKS, adamw, contender
from depth_parts.models import Decoder, Machine, free
from depth_parts.shapes import Shape, Sizes, with_depth

GIB = 2**30
LARGEST_KINDS = (
    "local, in backward",
    "local, every block",
    "backprop, loss at the top",
    "backprop, checkpoints",
    STEPPED_IN_HOOKS,
)
BUDGETS = (12, 24, 80)


def training_peak(machine: Machine, shape: Shape, kind: str) -> int:
    """Peak memory of everything in two steps: parameters, gradients, AdamW's state, activations, temporaries."""
    free(machine)
    torch.cuda.reset_peak_memory_stats()
    model = machine.model(shape)
    optimizer = None if kind == STEPPED_IN_HOOKS else adamw(model.parameters(), has_state=True)
    with contender(machine, model, kind, optimizer=optimizer) as made:
        for seed in range(2):
            made.step(machine.ids(shape, seed))
    machine.wait()
    return torch.cuda.max_memory_reserved()


def measure_largest(machine: Machine, sizes: Sizes, kind: str) -> dict[str, Any]:
    """How many blocks fit into each budget, and whether that many do where the allocator is held to it."""
    peaks = {depth: training_peak(machine, with_depth(sizes.largest, depth), kind) for depth in sizes.fitted_depths}
    slope, intercept = np.polyfit(list(peaks), list(peaks.values()), 1)
    total = torch.cuda.get_device_properties(machine.device).total_memory
    blocks, fits = {}, {}
    for budget in BUDGETS:
        # What the driver and CUDA's libraries take is not the allocator's: half a GiB.
        blocks[str(budget)] = int(((budget - 0.5) * GIB - intercept) // slope)
        if budget * GIB < total // 2:
            fits[str(budget)] = _fits(machine, with_depth(sizes.largest, blocks[str(budget)]), kind, budget - 0.5)
    parameters = {budget: _num_parameters(with_depth(sizes.largest, num)) for budget, num in blocks.items()}
    return {
        "shape": asdict(sizes.largest),
        "peak_bytes": {str(depth): peak for depth, peak in peaks.items()},
        "bytes_a_block": float(slope),
        "blocks": blocks,
        "parameters": parameters,
        "fits": fits,
    }


def _num_parameters(shape: Shape) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(shape).parameters())


def _fits(machine: Machine, shape: Shape, kind: str, gib: float) -> bool:
    total = torch.cuda.get_device_properties(machine.device).total_memory
    free(machine)
    torch.cuda.set_per_process_memory_fraction(gib * GIB / total)
    try:
        training_peak(machine, shape, kind)
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        free(machine)
    return True
