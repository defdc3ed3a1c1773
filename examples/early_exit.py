"""How early could a trained model answer? For each exit: how often it is sure, and how often it is then right.

    python examples/early_exit.py RUN FILE [--sure 0.9]

RUN is a folder that `localexit train` wrote, FILE a text. A token leaves at the first exit that gives its most likely
successor at least the probability `--sure`; what no exit is sure of leaves at the last one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from localexit import LocalModel
from localexit.train.export import load_run


def contexts(ids: Sequence[int], length: int, most: int = 64) -> Tensor:
    """Windows [at most `most`, length] of a text, one after the other."""
    num = min(len(ids) // length, most)
    return torch.tensor(ids[: num * length]).view(num, length)


def best_at(local: LocalModel, exit_index: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and id of the most likely successor of every token but a window's last, at one exit: [B, T - 1]."""
    logits = local.exit_logits(exit_index, tokens)[:, :-1]
    best = logits.float().softmax(-1).max(-1)
    return best.values, best.indices


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("file", type=Path, help="text to read")
    parser.add_argument("--sure", type=float, default=0.9, help="probability at which a token leaves")
    options = parser.parse_args(arguments)

    local, tokenizer = load_run(options.run, device=torch.device("cpu"))
    ids = tokenizer.encode(options.file.read_text(encoding="utf-8"), add_special_tokens=False).ids
    length = local.model.config.max_position_embeddings
    tokens = contexts(ids, length)
    if not len(tokens):
        parser.error(f"file: expected at least {length} tokens, got {len(ids)}; choose a longer one")
    successors = tokens[:, 1:]
    is_waiting = torch.ones_like(successors, dtype=torch.bool)
    num_right = 0
    print(f"{'exit':>4} {'right':>7} {'leave here':>11} {'of them right':>14}")
    for index in range(local.num_exits):
        probability, best = best_at(local, index, tokens)
        is_right = best == successors
        leaves = is_waiting & ((probability >= options.sure) | (index == local.num_exits - 1))
        right = f"{is_right[leaves].float().mean():.1%}" if leaves.any() else "-"
        print(f"{index:>4} {is_right.float().mean():>7.1%} {leaves.float().mean():>11.1%} {right:>14}")
        num_right += int((is_right & leaves).sum())
        is_waiting &= ~leaves
    print(f"with early exits {num_right / successors.numel():.1%} right")


if __name__ == "__main__":
    main()
