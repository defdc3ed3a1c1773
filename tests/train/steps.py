"""A run of very many tiny steps, and what it takes: `python -m train.steps FOLDER [NUM_STEPS]`, see `make long-run`.

Stop it when you like; started again it goes on. Samples are in `FOLDER/samples.jsonl`, one a hundred steps.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch._dynamo.utils import counters

from localexit.train.config import TrainConfig
from localexit.train.folder import RunFolder
from localexit.train.loop import train
from localexit.train.trainer import StepResult, Trainer
from train.small_runs import small_config, write_corpus

EVERY = 100
NUM_STEPS = 100_000
# What the goal allows.
MOST_GROWTH, MOST_COMPILATIONS, MOST_DRIFT = 0.01, 3, 1.05


@dataclass(kw_only=True)
class Watch:
    """Samples of one process, appended to a file."""

    path: Path
    durations: list[float] = field(default_factory=list)

    def step(self, number: int, seconds: float) -> None:
        """After every step."""
        self.durations.append(seconds)
        if number % EVERY == 0:
            sample = {
                "process": os.getpid(),
                "step": number,
                "rss": resident_bytes(),
                "gpu": torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0,
                "seconds": median(self.durations),
                "compilations": counters["stats"]["unique_graphs"],
            }
            with self.path.open("a") as file:
                file.write(json.dumps(sample) + "\n")
            self.durations.clear()


def resident_bytes() -> int:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run_steps(config: TrainConfig, folder: Path, *, cache_dir: Path) -> None:
    """Train, or go on; samples go to `folder/samples.jsonl`."""
    run, watch, train_step = RunFolder(path=folder / "run"), Watch(path=folder / "samples.jsonl"), Trainer.train_step

    def watched(self: Trainer) -> StepResult:
        start = time.perf_counter()
        result = train_step(self)
        watch.step(result.step, time.perf_counter() - start)
        return result

    Trainer.train_step = watched  # type: ignore[method-assign]
    try:
        with (folder / "console.txt").open("a") as file:
            train(config, run.path, resume=run.config.is_file(), console=Console(file=file), cache_dir=cache_dir)
    finally:
        Trainer.train_step = train_step  # type: ignore[method-assign]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the samples say.

    Attributes:
        num_steps: the last step.
        num_processes: how often it was started.
        growth: of resident memory between the first and the last tenth of the longest process, its warm-up left out.
        gpu_growth: bytes, of the same.
        compilations: the most of a process.
        drift: median step time of the last tenth over that of the second to twelfth thousandth part.
    """

    num_steps: int
    num_processes: int
    growth: float
    gpu_growth: int
    compilations: int
    drift: float


def read_figures(path: Path, *, warm_up: int) -> Figures:
    """Of a file of samples; `warm_up` is steps after each start that count for nothing."""
    samples: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    processes: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        processes.setdefault(sample["process"], []).append(sample)
    longest = max(processes.values(), key=len)
    settled = [sample for sample in longest if sample["step"] - longest[0]["step"] >= warm_up - EVERY]
    tenth = math.ceil(len(settled) / 10)
    first, last = settled[:tenth], settled[-tenth:]

    def middle(part: list[dict[str, Any]], key: str) -> float:
        return median(sample[key] for sample in part)

    return Figures(
        num_steps=samples[-1]["step"],
        num_processes=len(processes),
        growth=middle(last, "rss") / middle(first, "rss") - 1,
        gpu_growth=int(middle(last, "gpu") - middle(first, "gpu")),
        compilations=max(sample["compilations"] for sample in samples),
        drift=middle(last, "seconds") / middle(first, "seconds"),
    )


def many_steps(text: Path, num_steps: int) -> TrainConfig:
    """The smallest steps, with everything that a run does now and then."""
    rare = max(num_steps // 20, 1)
    return small_config(
        text,
        steps=num_steps,
        warmup_steps=num_steps // 10,
        eval_every=rare,
        checkpoint_every=rare,
        log_every=10,
        track="tensorboard",
    )


def main(folder: Path, num_steps: int) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text"
    if not text.exists():
        write_corpus(text)
    run_steps(many_steps(text, num_steps), folder, cache_dir=(folder / "cache").resolve())
    figures = read_figures(folder / "samples.jsonl", warm_up=2000)
    sys.stdout.write(f"{figures}\n")
    is_good = figures.growth < MOST_GROWTH and figures.drift <= MOST_DRIFT and figures.gpu_growth <= 0
    return 0 if is_good and figures.compilations <= MOST_COMPILATIONS else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else NUM_STEPS))
