"""The benchmark as a command: what is measured, in which order, and what is shown of it."""

from __future__ import annotations

import sys
from typing import Any

import torch

from . import platforms, tables
from .config import BenchConfig
from .measure import measure
from .plans import Case
from .record import Results, environment, read_results
from .shapes import Shape
from .timing import Say


def run_bench(config: BenchConfig) -> str:
    """Measure what the configuration asks for and return the tables.

    Raises:
        ValueError: an option does not fit the machine or the file of results.
        GateError: a loss or a gradient is wrong; nothing was timed.
    """
    if config.show is not None:
        return shown(read_results(config.show))
    use_cpu = config.cpu or not torch.cuda.is_available()
    platform = platforms.cpu(threads=config.threads, patience=config.patience) if use_cpu else platforms.cuda()
    circumstances = environment(platform.device, threads=torch.get_num_threads(), commit=config.commit)
    results = Results(config.output, circumstances)
    measure_shapes(config, platform, results, say=_say)
    return shown(results.content)


def measure_shapes(config: BenchConfig, platform: platforms.Platform, results: Results, *, say: Say) -> None:
    """Every shape that is not in the results yet."""
    rounds = config.rounds or platform.rounds
    for name in config.shapes or platform.shapes:
        case = Case(
            shape=Shape.parse(name),
            plans=config.plans(platform.device.type),
            peers=config.peers,
            original=config.original,
        )
        if results.known("shapes", name, {**case.summary(), "rounds": rounds}) is not None:
            say(f"{case.shape}: measured before")
            continue
        results.add("shapes", name, measure(case, platform, rounds=rounds, say=say))
        platform.release()


def shown(content: dict[str, Any]) -> str:
    """The tables of a file of results."""
    machine = f"{content['device']}, {content['threads']} threads, torch {content['versions']['torch']}"
    parts = [machine]
    for name, measured in content.get("shapes", {}).items():
        shape = Shape(**measured["shape"])
        parts.append(f"{name} {shape} {measured['dtype']}, median of {measured['rounds']}")
        parts.append(tables.times_table(measured))
    return "\n\n".join(parts)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
