"""Text, configurations and runs small enough for a test."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console

from localexit.train import loop
from localexit.train.config import TrainConfig
from localexit.train.loop import Outcome, train

SUBJECTS = ("the parser", "a token", "every block", "the reader", "one file", "that node", "the cache")
VERBS = ("returns", "holds", "writes", "drops", "counts", "keeps", "moves")
OBJECTS = ("a list", "the first line", "no value", "its own name", "the last error", "two numbers", "the text")


def write_corpus(folder: Path, *, num_files: int = 12, num_sentences: int = 120, seed: int = 0) -> Path:
    """Text with a grammar, so that something can be learned from it; the same for the same arguments."""
    random = Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_files):
        lines = [
            f"{random.choice(SUBJECTS)} {random.choice(VERBS)} {random.choice(OBJECTS)} {random.randrange(1000)} times."
            for _ in range(num_sentences)
        ]
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def small_config(text: Path, **changes: Any) -> TrainConfig:
    """Two blocks, a few steps, one thread."""
    options: dict[str, Any] = {
        "data": str(text),
        "model": "tiny",
        "vocab_size": 320,
        "steps": 6,
        "batch_size": 2,
        "context": 16,
        "lr": 3e-3,
        "warmup_steps": 2,
        "threads": 1,
        "eval_every": 3,
        "eval_tokens": 256,
        "checkpoint_every": 3,
        "sample_tokens": 4,
        "track": "none",
        "device": "cpu",
    }
    return TrainConfig(**{**options, **changes})


def quiet_console() -> Console:
    """A console that keeps what is printed: `console.file.getvalue()`."""
    return Console(file=io.StringIO(), width=200)


def train_quietly(config: TrainConfig, run_dir: Path, cache_dir: Path, *, resume: bool = False) -> Outcome:
    """`train` without output."""
    return train(config, run_dir, resume=resume, console=quiet_console(), cache_dir=cache_dir)


def die_in_save() -> None:
    """Have this process killed when its second checkpoint is on disk under a temporary name."""
    made = loop.save_checkpoint

    def save_checkpoint(folder: Path, snapshot: Any) -> Path:
        if snapshot.step == 6:
            (folder / ".unfinished-step-6").mkdir()
            os.kill(os.getpid(), signal.SIGKILL)
        return made(folder, snapshot)

    loop.save_checkpoint = save_checkpoint  # type: ignore[attr-defined]
