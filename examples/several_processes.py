"""Local training on the bytes of a file, its batches shared by the processes that torchrun starts.

    torchrun --nproc-per-node 2 examples/several_processes.py FILE [--steps 50] [--feedback mirror_sampled]

What is printed does not depend on the number of processes, but for rounding: every process takes its part of the same
batches, and `DataParallel` makes normaliser, anchors, draws and gradients those of the whole batch. Without torchrun it
is one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

import localexit

CONTEXT, BATCH = 32, 8


@contextmanager
def joined() -> Iterator[localexit.DataParallel | None]:
    """The processes that torchrun started; None for a process by itself."""
    if not dist.is_torchelastic_launched():
        yield None
        return
    dist.init_process_group("gloo")
    try:
        yield localexit.DataParallel()
    finally:
        dist.destroy_process_group()


def train(data: torch.Tensor, ranks: localexit.DataParallel | None, *, feedback: str, num_steps: int) -> list[float]:
    """Train a small GPT-2, and return the exits' losses on the last batch, nats/byte."""
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    torch.manual_seed(0)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=32, n_layer=3, n_head=2, **no_dropout)
    model = GPT2LMHeadModel(config).train()
    local = localexit.attach(model, feedback=feedback, backward="stream", data_parallel=ranks)
    optimizer = torch.optim.AdamW(local.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = torch.empty(0)
    for _ in range(num_steps):
        starts = torch.randint(len(data) - CONTEXT + 1, (BATCH,), generator=generator)
        # All processes draw the same batch, and each takes its part, in order.
        mine = torch.stack([data[start : start + CONTEXT] for start in starts.chunk(size)[rank].tolist()])
        losses = local(input_ids=mine, labels=mine).exit_losses
        optimizer.step()
        optimizer.zero_grad()
        local.update()
    return (losses if ranks is None else ranks.mean(losses)).tolist()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="text to train on")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--feedback", default="mirror_sampled", choices=localexit.feedback_names())
    options = parser.parse_args(arguments)
    data = torch.frombuffer(bytearray(options.file.read_bytes()), dtype=torch.uint8).long()
    if len(data) < CONTEXT:
        parser.error(f"file: expected at least {CONTEXT} bytes, got {len(data)}")
    with joined() as ranks:
        losses = train(data, ranks, feedback=options.feedback, num_steps=options.steps)
        if ranks is None or ranks.rank == 0:
            print("nats/byte by exit after", options.steps, "steps:", " ".join(f"{loss:.3f}" for loss in losses))


if __name__ == "__main__":
    main()
