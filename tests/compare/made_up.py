"""Cells as a comparison would write them, without training."""

from __future__ import annotations

from typing import Any

from localexit.compare.cells import Cell, Validation
from localexit.compare.methods import Method
from localexit.train.config import TrainConfig

BASE = TrainConfig(model="mini", steps=40, warmup_steps=4, batch_size=2, context=16)


def cell(method: str, seed: int, loss: float, *, config: TrainConfig = BASE, **changes: Any) -> Cell:
    """A cell whose last exit ends at `loss`, its first 0.1 above."""
    parsed = Method.parse(method)
    run = parsed.config(TrainConfig(**{**vars(config), "seed": seed}), {})
    valid = tuple(
        Validation(step=step, tokens=32 * step, loss=(loss + 0.1 + drop, loss + drop))
        for step, drop in ((run.steps // 2, 0.5), (run.steps, 0.0))
    )
    values: dict[str, Any] = {
        "method": str(parsed),
        "config": run.to_json(),
        "status": "finished",
        "valid": valid,
        "step_seconds": 0.02,
        "wall_seconds": 3.0,
        "flops_per_token": 8e6,
        "exit_flops_per_token": 2e6,
        "peak_bytes": None,
        "feedback_bytes": 4096,
        "num_parameters": 1000,
        "corpus": {
            "sha256": "5f" * 32,
            "name": "stdlib",
            "vocab_size": 2048,
            "num_files": 1200,
            "num_bytes": 4_500_000,
            "train_tokens": 1_500_000,
        },
        "versions": {"torch": "2.13.0"},
        "device": "cpu (1 threads)",
        "commit": "unknown",
        "load_average": (1.0, 1.0),
    }
    return Cell(**{**values, **changes})
