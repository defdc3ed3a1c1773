"""Write with early exits: how deep each token goes, and what the text becomes.

    python examples/early_exit.py RUN [--prompt "The "] [--threshold 0.5] [--tokens 60]

RUN is a folder that `localexit train` wrote. Three texts from one prompt, all greedy: by the last exit, by the first
exit that is sure, and by a draft of exit 0 that the last exit verifies. Upper case marks what an early exit wrote.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from localexit.inference.decoder import Decoder
from localexit.inference.sampling import Sampling
from localexit.inference.strategies import ConfidentExit, FixedExit, SelfSpeculative, Strategy
from localexit.inference.text import generate_ids
from localexit.train.export import load_run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run with at least two exits")
    parser.add_argument("--prompt", default="The ", help="what to continue")
    parser.add_argument("--threshold", type=float, default=0.5, help="probability at which an exit is sure")
    parser.add_argument("--tokens", type=int, default=60, help="tokens to write")
    options = parser.parse_args(arguments)

    local, tokenizer = load_run(options.run, device=torch.device("cpu"))
    prompt = tokenizer.encode(options.prompt, add_special_tokens=False).ids
    greedy = Sampling(temperature=0.0, max_new_tokens=options.tokens)
    last = local.num_exits - 1
    strategies: dict[str, Strategy] = {
        "last exit": FixedExit(),
        "first exit that is sure": ConfidentExit(threshold=options.threshold),
        "draft and verify": SelfSpeculative(draft_exit=0),
    }
    for name, strategy in strategies.items():
        strategy.check(local, greedy)
        decoder = Decoder(local, prompt)
        tokens = list(generate_ids(decoder, strategy=strategy, sampling=greedy))
        num_early = sum(token.exit_index < last for token in tokens)
        pieces = [(tokenizer.decode([token.id]), token.exit_index < last) for token in tokens]
        print(f"{name}: {num_early} of {len(tokens)} tokens by an early exit")
        print("  " + "".join(piece.upper() if is_early else piece.lower() for piece, is_early in pieces))


if __name__ == "__main__":
    main()
