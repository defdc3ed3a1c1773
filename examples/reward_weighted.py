"""A loss on whole sequences: make a model prefer what a reward prefers, by weights on its own samples.

    python examples/reward_weighted.py RUN [--steps 30] [--word the]

RUN is a folder that `localexit train` wrote. Every step writes a few texts with the last exit, rewards each by how
often the word occurs in it, and trains all exits on them with `token_weight` = its advantage over the batch:
the policy gradient of REINFORCE, unit by unit. It is on-policy, so the weights are plain numbers; a method whose
weights depend on log-probabilities computes these in a forward of their own first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from localexit import LocalModel
from localexit.inference.decoder import Decoder
from localexit.inference.sampling import Sampling
from localexit.inference.strategies import FixedExit
from localexit.inference.text import generate_ids
from localexit.local.trace import eval_mode
from localexit.train.export import load_run

NUM_TEXTS, LENGTH = 8, 24


def sample(local: LocalModel, prompt: int, *, seed: int) -> Tensor:
    """Texts of the last exit after one token: [NUM_TEXTS, 1 + LENGTH]."""
    texts = []
    with eval_mode(local):
        for index in range(NUM_TEXTS):
            sampling = Sampling(max_new_tokens=LENGTH, temperature=1.0, top_k=None, seed=seed * NUM_TEXTS + index)
            tokens = generate_ids(Decoder(local, [prompt]), strategy=FixedExit(), sampling=sampling)
            texts.append([prompt, *(token.id for token in tokens)])
    return torch.tensor(texts)


def rewards_of(texts: Tensor, tokenizer: Tokenizer, word: str) -> Tensor:
    """How often the word occurs in each text: [NUM_TEXTS]."""
    return torch.tensor([float(tokenizer.decode(ids).count(word)) for ids in texts.tolist()])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--steps", type=int, default=30, help="optimiser steps")
    parser.add_argument("--word", default="the", help="what is rewarded")
    options = parser.parse_args(arguments)

    local, tokenizer = load_run(options.run, device=torch.device("cpu"))
    local.train()
    optimizer = torch.optim.AdamW(local.parameters(), lr=1e-3, weight_decay=0.0)
    prompt = local.model.config.eos_token_id
    for step in range(1, options.steps + 1):
        texts = sample(local, prompt, seed=step)
        rewards = rewards_of(texts, tokenizer, options.word)
        advantages = rewards - rewards.mean()
        output = local(texts, labels=texts, token_weight=advantages[:, None].expand(texts.shape))
        if local.backward_mode == "deferred":
            output.loss.backward()
        local.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        local.update()
        if step % 10 == 0 or step == options.steps:
            print(f"step {step}: mean reward {rewards.mean():.2f}")


if __name__ == "__main__":
    main()
