"""Write run directories as training would, without training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log
from pathlib import Path
from random import Random
from typing import Any

PROMPT = "def mean(values):\n"
SAMPLE = PROMPT + '    """Return the mean of values."""\n    if not values:\n        raise ValueError("empty")\n'


@dataclass(frozen=True, kw_only=True)
class FakeRun:
    """A run that looks real: losses fall with steps and depth, the first of them near ln V."""

    num_exits: int = 4
    num_steps: int = 120
    valid_every: int = 20
    vocab_size: int = 2048
    sha256: str = "5f" * 32
    seed: int = 0
    final_loss: float = 3.6
    config: Mapping[str, Any] = field(default_factory=dict)
    corpus: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[Mapping[str, Any]] = ()

    def write(self, path: Path) -> Path:
        """Write the directory `path`; `records` follow the made-up ones."""
        path.mkdir(parents=True)
        write_json(path / "config.json", {**self._config(), **self.config})
        write_json(path / "corpus.json", {**self._corpus(), **self.corpus})
        append_records(path, [*self._records(), *self.records])
        return path

    def _config(self) -> dict[str, Any]:
        return {
            "format": 1,
            "train": {
                "model": "small",
                "data": "stdlib",
                "feedback": "mirror_sampled",
                "exits": "every",
                "steps": self.num_steps,
                "batch_size": 8,
                "context": 128,
                "lr": 3e-3,
                "clip": 1.0,
                "seed": self.seed,
            },
            "model": {"model_type": "llama", "hidden_size": 128, "num_hidden_layers": self.num_exits},
            "versions": {"localexit": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
            "device": "cpu",
        }

    def _corpus(self) -> dict[str, Any]:
        return {
            "format": 1,
            "name": "stdlib",
            "sha256": self.sha256,
            "num_files": 512,
            "num_bytes": 9_876_543,
            "train_tokens": 2_345_678,
            "valid_tokens": 123_456,
            "vocab_size": self.vocab_size,
            "valid_bytes_per_token": 3.91,
        }

    def _records(self) -> list[dict[str, Any]]:
        random = Random(self.seed)
        records: list[dict[str, Any]] = [
            {
                "kind": "event",
                "step": 0,
                "event": "started",
                "detail": "feedback mirror_sampled, backend chunked",
            }
        ]
        for step in range(1, self.num_steps + 1):
            records.append(self._train(step, random))
            if step % self.valid_every == 0:
                records += [self._valid(step), self._sample(step)]
        if self.num_steps:
            records.append({"kind": "event", "step": self.num_steps, "event": "finished", "detail": ""})
        return records

    def _loss(self, step: int, exit_index: int) -> float:
        floor = self.final_loss + 0.9 * exp(-2.5 * (exit_index + 1) / self.num_exits)
        return floor + (log(self.vocab_size) - floor) * exp(-5 * step / max(self.num_steps, 1))

    def _train(self, step: int, random: Random) -> dict[str, Any]:
        return {
            "kind": "train",
            "step": step,
            "tokens": 1024 * step,
            "seconds": 0.21 * step,
            "lr": 3e-3 * min(1.0, 10 * step / self.num_steps) * (1 - 0.9 * step / self.num_steps),
            "loss": [self._loss(step, index) - 0.05 + random.gauss(0, 0.08) for index in range(self.num_exits)],
            "grad_norm": [exp(random.gauss(-0.4 * index / self.num_exits, 0.25)) for index in range(self.num_exits)]
            + [exp(random.gauss(0.9, 0.2))],
            "tokens_per_second": 4800 + random.gauss(0, 220),
        }

    def _valid(self, step: int) -> dict[str, Any]:
        losses = [self._loss(step, index) for index in range(self.num_exits)]
        return {
            "kind": "valid",
            "step": step,
            "tokens": 1024 * step,
            "loss": losses,
            "bits_per_byte": [loss / log(2) / 3.91 for loss in losses],
            "accuracy": [0.62 - 0.075 * loss for loss in losses],
        }

    def _sample(self, step: int) -> dict[str, Any]:
        return {"kind": "sample", "step": step, "prompt": PROMPT, "text": SAMPLE, "exit": self.num_exits - 1}


def write_json(path: Path, content: object) -> None:
    """Write `content` to `path`."""
    path.write_text(json.dumps(content), encoding="utf-8")


def append_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Append `records` to the metrics of the run directory `path`; NaN is written as JSON's `NaN`."""
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
