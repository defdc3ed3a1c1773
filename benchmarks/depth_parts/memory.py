"""Peak of the activations in a step, over the number of blocks."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depth_parts.contenders import contender
from depth_parts.models import Machine, free
from depth_parts.shapes import Shape, Sizes, with_depth


class SavedBytes:
    """Bytes of the tensors that autograd keeps for a backward, parameters aside; shared memory counts once."""

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._live: dict[int, tuple[int, int]] = {}
        self.peak = 0

    def pack(self, tensor: Tensor) -> Held:
        held = self.Held(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._live[id(held)] = (storage.data_ptr(), storage.nbytes())
            weakref.finalize(held, self._live.pop, id(held))
            self.peak = max(self.peak, sum(dict(self._live.values()).values()))
        return held

    @contextmanager
    def watching(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor):
            yield


def activation_bytes(machine: Machine, shape: Shape, kind: str) -> int:
    """Peak of a step's activations, above parameters and gradients."""
    ids = machine.ids(shape)
    with contender(machine, machine.model(shape), kind) as made:
        if machine.device.type != "cuda":
            saved = SavedBytes(made.model)
            with saved.watching():
                made.gradients(ids)
            return saved.peak
        # Gradients of the first step stay, and are added to by the second.
        made.gradients(ids)
        machine.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        made.gradients(ids)
        return torch.cuda.max_memory_allocated() - before


MEMORY_KINDS = ("local, every block", "backprop, loss at the top", "backprop, checkpoints")


def measure_memory(machine: Machine, sizes: Sizes, kind: str) -> dict[str, Any]:
    """Peaks by depth, and what one more block adds."""
    peaks = {}
    for depth in sizes.depths:
        peaks[str(depth)] = activation_bytes(machine, with_depth(sizes.memory, depth), kind)
        free(machine)
    slope = np.polyfit(list(map(int, peaks)), list(peaks.values()), 1)[0]
    return {"shape": asdict(sizes.memory), "peak_bytes": peaks, "bytes_a_block": float(slope)}
