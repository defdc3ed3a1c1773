"""A pipeline of units on the bytes of a file: each process that torchrun starts holds some of a model's blocks.

    torchrun --nproc-per-node 2 examples/pipeline_of_units.py FILE OUTPUT [--steps 50] [--feedback dense]

Hidden states go from stage to stage and nothing comes back. At the end every stage gets the whole model, and the first
one saves it in OUTPUT, with its exits. What is printed does not depend on the number of processes, but for rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

import localexit

CONTEXT, BATCH, MICROBATCHES = 32, 8, 4


def train(data: torch.Tensor, output: Path, *, feedback: str, num_steps: int) -> list[float]:
    """Train a small GPT-2, save it, and return the exits' losses on the last batch, nats/byte."""
    torch.manual_seed(0)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    no_special = {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=32, n_layer=4, n_head=2, **no_dropout, **no_special)
    model = GPT2LMHeadModel(config).train()
    stage = localexit.Pipeline(localexit.attach(model, feedback=feedback, backward="stream"))
    optimizer = torch.optim.AdamW(stage.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = torch.empty(0)
    for _ in range(num_steps):
        # All stages draw the same batch.
        starts = torch.randint(len(data) - CONTEXT + 1, (BATCH,), generator=generator)
        ids = torch.stack([data[start : start + CONTEXT] for start in starts.tolist()])
        losses = stage.step_gradients(ids, ids, num_microbatches=MICROBATCHES)
        optimizer.step()
        optimizer.zero_grad()
        stage.update()
    local = stage.gather()
    if stage.rank == 0:
        model.save_pretrained(output)
        localexit.save_exits(local, output)
    return losses.tolist()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="text to train on")
    parser.add_argument("output", type=Path, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--feedback", default="dense", choices=localexit.feedback_names())
    options = parser.parse_args(arguments)
    data = torch.frombuffer(bytearray(options.file.read_bytes()), dtype=torch.uint8).long()
    if len(data) < CONTEXT:
        parser.error(f"file: expected at least {CONTEXT} bytes, got {len(data)}")
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        losses = train(data, options.output, feedback=options.feedback, num_steps=options.steps)
        if dist.get_rank() == 0:
            print("nats/byte by exit after", options.steps, "steps:", " ".join(f"{loss:.3f}" for loss in losses))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
