"""Local training of a plain `nn.Module` on the bytes of a file, with nothing but torch and localexit.

    python examples/plain_module.py FILE [--steps 200] [--feedback mirror_sampled]

Gradients are made during the forward (`backward="stream"`), one unit at a time. At the end every exit is evaluated and
writes a few bytes; the blocks after an exit are not run for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import localexit

VOCAB, WIDTH, NUM_BLOCKS, CONTEXT, BATCH = 256, 64, 3, 64, 8


class Decoder(nn.Module):
    """A causal transformer on bytes: token ids [B, T] to logits [B, T, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(NUM_BLOCKS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.unembed = nn.Linear(WIDTH, VOCAB, bias=False)
        nn.init.normal_(self.unembed.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.embed(tokens) + self.position(torch.arange(length))
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return self.unembed(self.norm(hidden))


def windows(data: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Random windows [num, CONTEXT] of the data."""
    starts = torch.randint(len(data) - CONTEXT + 1, (num,), generator=generator)
    return torch.stack([data[start : start + CONTEXT] for start in starts.tolist()])


def write(local: localexit.LocalModel, exit_index: int, prompt: bytes, num_bytes: int) -> bytes:
    """The prompt and the bytes that one exit finds most likely after it."""
    written = list(prompt)
    for _ in range(num_bytes):
        tokens = torch.tensor([written[-CONTEXT:]])
        written.append(int(local.exit_logits(exit_index, tokens, logits_to_keep=1).argmax()))
    return bytes(written)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path, help="text to train on; its last tenth is for validation")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--feedback", default="mirror_sampled", choices=localexit.feedback_names())
    options = parser.parse_args(arguments)

    data = torch.tensor(list(options.file.read_bytes()))
    train, valid = data[: -len(data) // 10], data[-len(data) // 10 :]
    if min(len(train), len(valid)) < CONTEXT:
        parser.error(f"file: expected at least {10 * CONTEXT} bytes, got {len(data)}; choose a longer one")
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    local = localexit.attach(Decoder(), feedback=options.feedback, backward="stream")
    optimizer = torch.optim.AdamW(local.parameters(), lr=3e-3)
    for step in range(1, options.steps + 1):
        tokens = windows(train, BATCH, generator)
        output = local(tokens, labels=tokens)
        local.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        local.update()
        if step % 50 == 0 or step == options.steps:
            print(f"step {step}: nats/byte by exit {[round(loss, 3) for loss in output.exit_losses.tolist()]}")

    local.eval()
    tokens = windows(valid, 64, generator)
    evaluation = local.evaluate(tokens, labels=tokens)
    for index in range(local.num_exits):
        text = write(local, index, bytes(valid[:16].tolist()), 48)
        print(f"exit {index}: validation {evaluation.loss[index]:.3f} nats/byte, writes {text!r}")


if __name__ == "__main__":
    main()
