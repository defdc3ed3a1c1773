"""A run of very many tiny steps, and what it takes: `python -m train.steps FOLDER`, see `make long-run` and `--help`.

Stop it when you like, best with Ctrl-C or SIGTERM; started again it goes on. Samples are in `FOLDER/samples.jsonl`, one
a hundred steps and one at the 50th of a process.
"""

from __future__ import annotations

import argparse
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
from torch._dynamo.utils import get_compilation_metrics

from localexit.train.config import TrainConfig
from localexit.train.folder import RunFolder
from localexit.train.loop import Outcome, train
from localexit.train.trainer import StepResult, Trainer
from train.small_runs import small_config, write_corpus

EVERY = 100
NUM_STEPS = 100_000
# Of a process, after which a GPU has all that it needs for steps.
SETTLED = 50
# What the goal allows.
MOST_GROWTH, MOST_RECOMPILATIONS, MOST_DRIFT = 0.01, 3, 1.05


@dataclass(kw_only=True)
class Watch:
    """Samples of one process, appended to a file."""

    path: Path
    durations: list[float] = field(default_factory=list)
    num_steps: int = 0

    def step(self, number: int, seconds: float) -> None:
        """After every step."""
        self.durations.append(seconds)
        self.num_steps += 1
        if number % EVERY == 0 or self.num_steps == SETTLED:
            has_gpu = torch.cuda.is_initialized()
            sample = {
                "process": os.getpid(),
                "step": number,
                "step_of_process": self.num_steps,
                "rss": resident_bytes(),
                "gpu": torch.cuda.memory_allocated() if has_gpu else 0,
                "gpu_reserved": torch.cuda.memory_reserved() if has_gpu else 0,
                "seconds": median(self.durations),
                "recompilations": sum(made.recompile_reason is not None for made in get_compilation_metrics()),
            }
            with self.path.open("a") as file:
                file.write(json.dumps(sample) + "\n")
            self.durations.clear()


def resident_bytes() -> int:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run_steps(config: TrainConfig, folder: Path, *, cache_dir: Path) -> Outcome:
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
            return train(config, run.path, resume=run.config.is_file(), console=Console(file=file), cache_dir=cache_dir)
    finally:
        Trainer.train_step = train_step  # type: ignore[method-assign]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the samples say.

    Attributes:
        num_steps: the last step.
        num_processes: how often it was started.
        growth: of resident memory between the first and the last tenth of the longest process, its warm-up left out.
        gpu_growth: the most bytes of a sample above those at the 50th step of its process.
        reserved_growth: bytes that PyTorch holds of the GPU, of the same; 0 where no process came to its 50th step.
        recompilations: the most of a process.
        drift: median step time of the last tenth of all steps over that of a tenth after the warm-up; what follows a
            start within the warm-up is left out.
    """

    num_steps: int
    num_processes: int
    growth: float
    gpu_growth: int
    reserved_growth: int
    recompilations: int
    drift: float


def read_figures(path: Path, *, warm_up: int) -> Figures:
    """Of a file of samples; `warm_up` is steps after each start that count for nothing."""
    samples: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    processes: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        processes.setdefault(sample["process"], []).append(sample)
    settled = [
        [sample for sample in process if sample["step"] - process[0]["step"] >= warm_up - EVERY]
        for process in processes.values()
    ]
    longest = max(settled, key=len)
    tenth = math.ceil(len(longest) / 10)
    num_steps = samples[-1]["step"]
    timed = [sample for process in settled for sample in process]
    early = [sample for sample in timed if sample["step"] <= warm_up + num_steps / 10]
    late = [sample for sample in timed if sample["step"] > num_steps * 0.9]

    def middle(part: list[dict[str, Any]], key: str) -> float:
        return median(sample[key] for sample in part)

    def most_growth(key: str) -> int:
        later = [[s[key] for s in process if s["step_of_process"] >= SETTLED] for process in processes.values()]
        return max((max(values) - values[0] for values in later if values), default=0)

    return Figures(
        num_steps=num_steps,
        num_processes=len(processes),
        growth=middle(longest[-tenth:], "rss") / middle(longest[:tenth], "rss") - 1,
        gpu_growth=most_growth("gpu"),
        reserved_growth=most_growth("gpu_reserved"),
        recompilations=max(sample["recompilations"] for sample in samples),
        drift=middle(late, "seconds") / middle(early, "seconds"),
    )


def many_steps(text: Path, num_steps: int, **changes: Any) -> TrainConfig:
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
        **changes,
    )


def main(folder: Path, *, num_steps: int, device: str, is_compiled: bool, is_replayed: bool) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text"
    if not text.exists():
        write_corpus(text)
    config = many_steps(text, num_steps, device=device, compile=is_compiled, cuda_graph=is_replayed)
    if run_steps(config, folder, cache_dir=(folder / "cache").resolve()).status == "interrupted":
        sys.stdout.write("stopped; the same command goes on\n")
        return 1
    figures = read_figures(folder / "samples.jsonl", warm_up=2000)
    sys.stdout.write(f"{figures}\n")
    gpu_growth = max(figures.gpu_growth, figures.reserved_growth)
    is_good = figures.growth < MOST_GROWTH and figures.drift <= MOST_DRIFT and gpu_growth == 0
    return 0 if is_good and figures.recompilations <= MOST_RECOMPILATIONS else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the run; one that is there goes on")
    parser.add_argument("num_steps", type=int, nargs="?", default=NUM_STEPS)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--compile", dest="is_compiled", action="store_true", help="train with compiled blocks")
    parser.add_argument("--cuda-graph", dest="is_replayed", action="store_true", help="replay recorded steps")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(**vars(parse_arguments())))
