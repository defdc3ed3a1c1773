"""Early exits for a causal language model that stays as it is: only what the exits have of their own learns.

    python examples/frozen_model.py FOLDER FILE [--steps 300] [--body block]

FOLDER is a model that `save_pretrained` wrote, with its tokenizer; FILE a text, whose last tenth is for validation. The
exits go to FOLDER-exits; `localexit.load_exits` attaches them to the model again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import localexit

LENGTH, BATCH, EVERY = 64, 8, 100


def rounded(losses: torch.Tensor) -> list[float]:
    return [round(loss, 3) for loss in losses.tolist()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="folder of a model")
    parser.add_argument("file", type=Path, help="text to learn")
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps")
    parser.add_argument("--body", choices=("mlp", "block"), default="block", help="what each early exit gets")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    ids = torch.tensor(tokenizer(options.file.read_text(encoding="utf-8"))["input_ids"])
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    num_valid = max(1, len(windows) // 10)
    train, valid = windows[:-num_valid], windows[-num_valid:][:64]

    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).requires_grad_(False)
    bare = localexit.attach(model)
    print(f"nats/token by exit, as the model is: {rounded(bare.evaluate(valid, valid).loss)}")
    bare.remove()

    # A copy of a frozen block is frozen too, until it is told otherwise.
    local = localexit.attach(model.train(), exit_body=options.body, backward="stream")
    local.exit_bodies.requires_grad_(True)
    optimizer = torch.optim.AdamW(local.exit_bodies.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, options.steps + 1):
        batch = train[torch.randint(len(train), (BATCH,), generator=generator)]
        local(batch, labels=batch)
        local.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        local.update()
        if step % EVERY == 0 or step == options.steps:
            print(f"step {step}: nats/token by exit {rounded(local.evaluate(valid, valid).loss)}")

    saved = localexit.save_exits(local, f"{options.folder}-exits")
    print(f"saved to {saved}; the model is what it was")


if __name__ == "__main__":
    main()
