"""How close is each rule's feedback to the gradient it replaces, and what does it make of a block's parameters?

    python examples/compare_rules.py [--vocab-size 500] [--steps 100]

One block and one exit learn to continue sequences of a noisy rule. After some steps this prints, for every rule, two
cosines with the exact gradient: of the feedback token by token, and of the block's parameters. The second one matters;
see "What to trust" in docs/maths.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from localexit import ExitHead, feedback_names, make_feedback

WIDTH = 64
# As in a larger model, where the anchors are fewer than the hidden state is wide; with more they are exact.
OPTIONS = {"anchors": {"num_anchors": 32}}


def batch(vocab_size: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and their successors: 3 t + 1 most of the time, any token else."""
    tokens = torch.randint(vocab_size, (size,), generator=generator)
    noise = torch.randint(vocab_size, (size,), generator=generator)
    is_noise = torch.rand(size, generator=generator) < 0.2
    return tokens, torch.where(is_noise, noise, (3 * tokens + 1) % vocab_size)


class Block(nn.Module):
    """Embedding and a residual MLP: what learns from the feedback."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        return self.norm(hidden + self.mlp(hidden))


def gradients(block: Block, head: ExitHead, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, float]:
    """What reached the hidden state, the gradient of the MLP's parameters, and the loss."""
    hidden = block(tokens)
    hidden.retain_grad()
    loss = head(hidden, targets)
    parameters = list(block.mlp.parameters())
    reached, *grads = torch.autograd.grad(loss, [hidden, *parameters])
    return reached, torch.cat([grad.flatten() for grad in grads]), loss.item()


def train(name: str, vocab_size: int, num_steps: int) -> tuple[float, float, float]:
    """Train with a rule; return its loss and its two cosines with exact gradients at the end."""
    torch.manual_seed(0)
    block = Block(vocab_size)
    rule = make_feedback(name, WIDTH, vocab_size, **OPTIONS.get(name, {}))
    head = ExitHead(WIDTH, vocab_size, feedback=rule)
    exact = ExitHead(WIDTH, vocab_size, feedback=make_feedback("transport", WIDTH, vocab_size), weight=head.weight)
    optimizer = torch.optim.AdamW([*block.parameters(), *head.parameters()], lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        tokens, targets = batch(vocab_size, 256, generator)
        optimizer.zero_grad()
        head(block(tokens), targets).backward()
        optimizer.step()
        head.update()
    tokens, targets = batch(vocab_size, 1024, generator)
    ours, ours_block, loss = gradients(block, head, tokens, targets)
    theirs, theirs_block, _ = gradients(block, exact, tokens, targets)
    by_token = torch.cosine_similarity(ours, theirs, dim=-1).mean().item()
    return loss, by_token, torch.cosine_similarity(ours_block, theirs_block, dim=0).item()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--vocab-size", type=int, default=500, help="tokens")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps for each rule")
    options = parser.parse_args(arguments)
    print(f"{'rule':<18} {'loss':>7} {'cos token':>10} {'cos block':>10}")
    for name in feedback_names():
        loss, by_token, by_block = train(name, options.vocab_size, options.steps)
        print(f"{name:<18} {loss:>7.3f} {by_token:>10.3f} {by_block:>10.3f}")


if __name__ == "__main__":
    main()
