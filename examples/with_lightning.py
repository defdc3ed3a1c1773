"""Local training of a small decoder on the bytes of a file, in a loop of Lightning.

    python examples/with_lightning.py FILE [--steps 200]

Lightning's own optimisation calls backward on the loss and steps; what a local model needs besides are two methods of
the module: clipping unit by unit, and `update()` after every optimiser step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import localexit

LENGTH, BATCH = 64, 8


def decoder() -> nn.Module:
    """A small decoder on bytes."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


class Local(lightning.LightningModule):
    """A model with exits, trained unit by unit."""

    def __init__(self, model: nn.Module, *, lr: float) -> None:
        super().__init__()
        self.local = localexit.attach(model.train())
        self.lr = lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.local.parameters(), lr=self.lr)

    def training_step(self, tokens: Tensor, _batch_index: int) -> Tensor:
        output = self.local(tokens, labels=tokens)
        self.log_dict({f"loss_{index}": loss for index, loss in enumerate(output.exit_losses)})
        return output.loss

    def validation_step(self, tokens: Tensor, _batch_index: int) -> None:
        evaluation = self.local.evaluate(tokens, labels=tokens)
        self.log_dict({f"valid_loss_{index}": loss for index, loss in enumerate(evaluation.loss)})

    def configure_gradient_clipping(self, _optimizer: object, **_: object) -> None:
        # Lightning's own clipping would take one norm over all units.
        self.local.clip_grad_norm_(1.0)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        self.local.update()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path, help="text to train on; its last tenth is for validation")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    options = parser.parse_args(arguments)

    data = torch.tensor(list(options.file.read_bytes()))
    windows = data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)
    num_valid = max(1, len(windows) // 10)
    lightning.seed_everything(0, verbose=False)
    module = Local(decoder(), lr=3e-3)
    trainer = lightning.Trainer(
        max_steps=options.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train = DataLoader(windows[:-num_valid], batch_size=BATCH, shuffle=True)  # type: ignore[arg-type]
    valid = DataLoader(windows[-num_valid:], batch_size=BATCH)  # type: ignore[arg-type]
    trainer.fit(module, train, valid)
    losses = [float(trainer.callback_metrics[f"valid_loss_{index}"]) for index in range(module.local.num_exits)]
    print(f"validation nats/byte by exit after {trainer.global_step} steps: {[round(loss, 3) for loss in losses]}")


if __name__ == "__main__":
    main()
