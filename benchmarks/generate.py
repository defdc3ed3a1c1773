"""Writing speed of a run's exits: full depth, one exit, the first exit that is sure, draft and verify, in one go.

    python benchmarks/generate.py RUN [--prompts 4] [--tokens 128] [--rounds 3] [--output FILE]

RUN is a folder that `localexit train` wrote; prompts are the beginning of the file that `--text` names, or random
tokens. Everything is greedy. Nothing is timed before a gate has passed: a verified draft must be the text of the last
exit, token by token (in fp32 and up to the first tie), and a sure exit must write what it writes without a cache.

Printed and recorded: tokens/s (median and range of the rounds), the share of each exit's tokens, blocks that read a
token (catching up included) against all blocks, and the speed against full depth in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from localexit import LocalModel
from localexit.inference.decoder import Decoder
from localexit.inference.sampling import Sampling
from localexit.inference.strategies import ConfidentExit, FixedExit, SelfSpeculative, Strategy, Token
from localexit.inference.text import generate_ids
from localexit.train.devices import device_name, resolve_device
from localexit.train.export import load_run
from localexit.train.folder import versions

FULL = "full depth"


def strategies(num_exits: int, thresholds: Sequence[float], draft_tokens: Sequence[int]) -> dict[str, Strategy]:
    """What is timed, by name; full depth first."""
    early = sorted({0, num_exits // 2} - {num_exits - 1})
    return {
        FULL: FixedExit(),
        **{f"exit {index}": FixedExit(exit_index=index) for index in early},
        **{f"sure at {threshold:g}": ConfidentExit(threshold=threshold) for threshold in thresholds},
        **{
            f"sure at {threshold:g}, exits {early}": ConfidentExit(threshold=threshold, exits=tuple(early))
            for threshold in thresholds
            if len(early) < num_exits - 1
        },
        **{
            f"draft {num} at exit {index}": SelfSpeculative(draft_exit=index, draft_tokens=num)
            for index in early
            for num in draft_tokens
        },
    }


def written(
    local: LocalModel, prompt: Sequence[int], strategy: Strategy, num: int, *, use_cache: bool = True
) -> tuple[list[Token], Decoder]:
    """The tokens a strategy writes after a prompt, greedily."""
    decoder = Decoder(local, prompt, use_cache=use_cache)
    sampling = Sampling(temperature=0.0, max_new_tokens=num)
    return list(generate_ids(decoder, strategy=strategy, sampling=sampling)), decoder


def gate(local: LocalModel, prompts: Sequence[Sequence[int]], named: dict[str, Strategy], num: int) -> list[str]:
    """What is wrong: strategies that do not write the text they promise."""
    wrong = []
    for name, strategy in named.items():
        strategy.check(local, Sampling(temperature=0.0))
        reference = FixedExit() if isinstance(strategy, SelfSpeculative) else strategy
        for prompt in prompts:
            expected, _ = written(local, prompt, reference, num, use_cache=False)
            found, _ = written(local, prompt, strategy, num)
            if [token.id for token in found] != [token.id for token in expected]:
                wrong.append(name)
                break
    return wrong


def measure(local: LocalModel, prompts: Sequence[Sequence[int]], strategy: Strategy, num: int) -> dict[str, Any]:
    """One round: seconds, tokens by exit, and how many blocks read how many tokens."""
    device = local.unembedding.weight.device
    by_exit: Counter[int] = Counter()
    num_read = num_block_tokens = 0
    _wait(device)
    start = time.perf_counter()
    for prompt in prompts:
        tokens, decoder = written(local, prompt, strategy, num)
        by_exit.update(token.exit_index for token in tokens)
        num_read += len(prompt) + num - 1
        num_block_tokens += decoder.num_block_tokens
    _wait(device)
    seconds = time.perf_counter() - start
    return {
        "tokens_per_second": by_exit.total() / seconds,
        "by_exit": [by_exit[index] / by_exit.total() for index in range(local.num_exits)],
        "blocks_a_token": num_block_tokens / num_read,
    }


def rounds_of(
    local: LocalModel, prompts: Sequence[Sequence[int]], named: dict[str, Strategy], num: int, num_rounds: int
) -> list[dict[str, Any]]:
    """All strategies in turn, round by round, so that a slow minute hits all; the first round warms up."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in named}
    for number in range(num_rounds + 1):
        for name, strategy in named.items():
            result = measure(local, prompts, strategy, num)
            if number:
                found[name].append(result)
    full = statistics.median(result["tokens_per_second"] for result in found[FULL])
    return [_row(name, results, full) for name, results in found.items()]


def _row(name: str, results: list[dict[str, Any]], full: float) -> dict[str, Any]:
    speeds = [result["tokens_per_second"] for result in results]
    median = statistics.median(speeds)
    return {
        **results[0],
        "name": name,
        "tokens_per_second": median,
        "range": [min(speeds), max(speeds)],
        "speedup": median / full,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_prompts(local: LocalModel, tokenizer: Any, text: Path | None, *, num: int, length: int) -> list[list[int]]:
    """Prompts [num, length] from a text, or of random tokens."""
    if text is None:
        vocab_size = local.unembedding.weight.shape[0]
        ids = torch.randint(vocab_size, (num * length,), generator=torch.Generator().manual_seed(0)).tolist()
    else:
        ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    return [ids[start : start + length] for start in range(0, num * length, length)]


def table(rows: Sequence[dict[str, Any]], num_blocks: int) -> str:
    """The rows for people."""
    lines = [f"{'':28} {'tokens/s':>9} {'range':>15} {'speed-up':>8} {'blocks a token':>15}  tokens by exit"]
    for row in rows:
        low, high = row["range"]
        shares = " ".join(f"{share:.0%}" for share in row["by_exit"])
        lines.append(
            f"{row['name']:28} {row['tokens_per_second']:9.1f} {f'{low:.0f}-{high:.0f}':>15} {row['speedup']:7.2f}x "
            f"{row['blocks_a_token']:8.2f} of {num_blocks:3d}  {shares}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--text", type=Path, help="file that the prompts come from; random tokens without it")
    parser.add_argument("--prompts", type=int, default=4, help="how many texts are written, one after the other")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96, help="tokens to write after each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.5, 0.9])
    parser.add_argument("--draft-tokens", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    options = parser.parse_args(arguments)

    device = resolve_device(options.device)
    local, tokenizer = load_run(options.run, device=device)
    prompts = read_prompts(local, tokenizer, options.text, num=options.prompts, length=options.prompt_tokens)
    named = strategies(local.num_exits, options.thresholds, options.draft_tokens)
    wrong = gate(local, prompts[:2], named, min(options.tokens, 48))
    if wrong:
        print(f"not timed, for these do not write what they must: {', '.join(wrong)}")
        return 1
    rows = rounds_of(local, prompts, named, options.tokens, options.rounds)
    num_blocks = len(local.blocks)
    print(table(rows, num_blocks))
    if options.output is not None:
        record = {
            "device": device_name(device),
            "versions": versions(),
            "num_blocks": num_blocks,
            "num_parameters": sum(parameter.numel() for parameter in local.model.parameters()),
            "settings": {key: value for key, value in vars(options).items() if key not in ("run", "text", "output")},
            "rows": rows,
        }
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
