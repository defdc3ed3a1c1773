"""Time of a training step of `localexit train`: plain, with compiled blocks, replayed from CUDA graphs, and both.

    python benchmarks/steps.py [--only NAME ...] [--steps 60] [--device cuda] [--output FILE]

Nothing is timed before a gate has passed: replayed steps must have the losses of the steps that they replay. Each way
trains from the beginning on the same batches; the time is the median of steps, each of which ends when the host knows
its losses. On a CPU, which has no graphs, only plain and compiled are timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from localexit.bench.record import environment
from localexit.train.config import FeedbackSpec, TrainConfig
from localexit.train.data import load_data
from localexit.train.devices import resolve_device, resolve_precision
from localexit.train.loop import make_trainer

# What compiles, is recorded or allocates does so before.
NUM_WARM_UP = 10
# Relative, of a loss after as many steps as the gate looks at: rates that the optimiser reads in fp32 round otherwise.
TOLERANCE = 2e-3
WAYS = {
    "plain": {},
    "compiled": {"compile": True},
    "graph": {"cuda_graph": True},
    "compiled, graph": {"compile": True, "cuda_graph": True},
}


# As many as Python's standard library fills.
MEDIUM_VOCAB = 32000


def settings_of(model: str, batch_size: int, context: int, feedback: str, **more: Any) -> TrainConfig:
    rule = FeedbackSpec.parse(feedback)
    return TrainConfig(model=model, batch_size=batch_size, context=context, feedback=rule, **more)


def small(feedback: str = "mirror_sampled", batch_size: int = 64, **more: Any) -> TrainConfig:
    return settings_of("small", batch_size, 256, feedback, **more)


def medium(feedback: str = "transport_sampled", **more: Any) -> TrainConfig:
    return settings_of("medium", 16, 1024, feedback, vocab_size=MEDIUM_VOCAB, **more)


SETTINGS = {
    "tiny, 2×16": settings_of("tiny", 2, 16, "mirror"),
    "demo, 8×128": settings_of("demo", 8, 128, "mirror"),
    "small, 8×256": small(batch_size=8),
    "small, 64×256": small(),
    "small, 64×256, a sixth of the tokens": small(token_share=1 / 6),
    "small, 64×256, every:3": small(exits="every:3"),
    "small, 64×256, backprop": small("transport", exits="-1"),
    "medium, 16×1024": medium(),
    "medium, 16×1024, a twelfth": medium(token_share=1 / 12),
    "medium, 16×1024, every:6": medium(exits="every:6"),
    "medium, 16×1024, backprop": medium("transport", exits="-1"),
}


def measure(config: TrainConfig, device: torch.device, num_steps: int) -> dict[str, Any]:
    """Time of a step in ms, the losses of the first steps for the gate, and on a GPU the peak of what PyTorch holds."""
    torch.compiler.reset()
    has_gpu = device.type == "cuda"
    if has_gpu:
        # The trainer before is a cycle.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    precision = resolve_precision(config.precision, device)
    trainer = make_trainer(config, load_data(config), device=device, precision=precision)
    losses = [trainer.train_step().losses for _ in range(NUM_WARM_UP)]
    durations = []
    for _ in range(num_steps):
        start = time.perf_counter()
        trainer.train_step()
        durations.append(time.perf_counter() - start)
    return {
        "median_ms": median(durations) * 1e3,
        "min_ms": min(durations) * 1e3,
        "max_ms": max(durations) * 1e3,
        "tokens_per_second": config.batch_size * config.context / median(durations),
        "peak_bytes": torch.cuda.max_memory_reserved(device) if has_gpu else None,
        "losses": losses,
    }


def check_same_losses(name: str, ways: dict[str, dict[str, Any]]) -> None:
    """The gate.

    Raises:
        RuntimeError: replayed steps have other losses than the steps that they replay.
    """
    for plain, graph in (("plain", "graph"), ("compiled", "compiled, graph")):
        for mine, theirs in zip(ways[plain]["losses"], ways[graph]["losses"], strict=True):
            if not all(math.isclose(one, two, rel_tol=TOLERANCE) for one, two in zip(mine, theirs, strict=True)):
                raise RuntimeError(f"{name}: expected the losses {mine} of {plain!r} for {graph!r}, got {theirs}")


def shown(content: dict[str, Any]) -> Table:
    """A line a setting."""
    table = Table(title=f"{content['device']}, torch {content['versions']['torch']}: ms a step, tokens/s")
    table.add_column("")
    for way in WAYS:
        table.add_column(way, justify="right")
    for name, ways in content["settings"].items():
        cells = [f"{ways[w]['median_ms']:.2f} {ways[w]['tokens_per_second']:,.0f}" if w in ways else "" for w in WAYS]
        table.add_row(name, *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="settings to measure")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument("--output", type=Path, help="write the results there as JSON, after each setting")
    parser.add_argument("--commit", help="commit of the sources, where git cannot be asked")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    described = environment(device, threads=torch.get_num_threads(), commit=options.commit)
    content: dict[str, Any] = {**described, "benchmark": "steps", "steps": options.steps, "settings": {}}
    for name in options.only:
        ways = {
            way: measure(TrainConfig.from_json({**SETTINGS[name].to_json(), **changes}), device, options.steps)
            for way, changes in WAYS.items()
            if device.type == "cuda" or "cuda_graph" not in changes
        }
        if device.type == "cuda":
            check_same_losses(name, ways)
        for measured in ways.values():
            del measured["losses"]
        content["settings"][name] = ways
        if options.output is not None:
            options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    Console().print(shown(content))


if __name__ == "__main__":
    main()
