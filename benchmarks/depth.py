"""What depth costs: memory and time of local training against backprop, on one plain decoder.

    python benchmarks/depth.py [--parts memory time largest] [--output FILE] [--size gpu|cpu|tiny] [--plot FILE.svg]

Nothing is measured before a gate has passed: with exact feedback and one exit at the top, local training must make
backprop's gradients, and with an exit on every block every rule must make the gradient of the unembedding that
backprop makes from the same losses.

- memory: peak of the activations in a step, over the number of blocks. On a GPU what the allocator holds above
  parameters and gradients that were there before; on a CPU what autograd keeps for the backward.
- time: whole optimiser steps of a stack of blocks, in rounds that take turns. Blocks are compiled one by one for all
  contenders, and backprop's loss is compiled too.
- largest: how many blocks train in 12, 24 and 80 GiB, from the peaks at three depths; what fits into the smaller two
  is then tried with the allocator held to that size. Only on a GPU. AdamW's state is there before the first step. The
  strongest baseline, backprop with checkpoints that is stepped in the backward, has an optimiser for each block and a
  loss without [N, V] logits (this library's exit with the exact gradient).

Cells that are in FILE already, measured on the same device and commit, are kept; so a run that was interrupted is
continued by the same command. --plot draws FILE without measuring. How the allocator of the GPU works is the
environment's choice (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True keeps it from fragmenting), and recorded.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from depth_parts.contenders import RULE
from depth_parts.gate import gate
from depth_parts.largest import LARGEST_KINDS, measure_largest
from depth_parts.memory import MEMORY_KINDS, measure_memory
from depth_parts.models import Machine, free
from depth_parts.shapes import SIZES, Sizes
from depth_parts.show import plot, shown
from depth_parts.times import measure_time
from localexit.bench.record import environment

PARTS = ("memory", "time", "largest")
Cell = tuple[str, str, Callable[[], dict[str, Any]]]


def cells(machine: Machine, sizes: Sizes, parts: Sequence[str], rule: str) -> Iterator[Cell]:
    """Part, name and measurement of everything there is to measure."""
    if "memory" in parts:
        for kind in MEMORY_KINDS:
            yield "memory", kind, partial(measure_memory, machine, sizes, kind)
    if "time" in parts:
        for name, shape in sizes.time.items():
            yield "time", f"{name}, {rule}", partial(measure_time, machine, shape, sizes.rounds, rule)
    if "largest" in parts and machine.device.type == "cuda":
        for kind in LARGEST_KINDS:
            yield "largest", kind, partial(measure_largest, machine, sizes, kind)


def kept(path: Path | None, start: dict[str, Any]) -> dict[str, Any]:
    """What the file has of the same device, versions and commit; else only the description of this run."""
    if path is None or not path.exists():
        return start
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content if all(content.get(key) == value for key, value in start.items()) else start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", choices=SIZES, help="sizes to measure; those of the device by default")
    parser.add_argument("--rule", default=RULE, help="feedback rule of the time part")
    parser.add_argument("--output", type=Path, help="write the results there as JSON, and continue what is there")
    parser.add_argument("--plot", type=Path, help="draw the memory part of --output there; measures nothing")
    parser.add_argument("--commit", help="commit of the sources, where git cannot be asked")
    options = parser.parse_args(arguments)
    if options.plot is not None:
        plot(json.loads(options.output.read_text(encoding="utf-8")), options.plot)
        return
    has_gpu = torch.cuda.is_available()
    machine = Machine(device=torch.device("cuda" if has_gpu else "cpu"), is_fast=has_gpu)
    size = options.size or ("gpu" if has_gpu else "cpu")
    described = environment(machine.device, threads=torch.get_num_threads(), commit=options.commit)
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    content = kept(options.output, {**described, "benchmark": "depth", "size": size, "allocator": allocator})
    # A block is compiled for each shape, for inputs with and without a graph, and for the traced forward of attach().
    torch._dynamo.config.recompile_limit = 64
    gate(machine)
    for part, name, measure in cells(machine, SIZES[size], options.parts, options.rule):
        if name in content.get(part, {}):
            continue
        content.setdefault(part, {})[name] = measure()
        free(machine)
        if options.output is not None:
            options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(shown(content))


if __name__ == "__main__":
    main()
