"""The exit on the CPU: loss and all gradients, every rule against what a user would take instead.

    python benchmarks/exit_cpu.py [--output benchmarks/results/exit_cpu.json] [--original PATH]

First a gate: nothing is timed unless every loss and every gradient is right. Then one interleaved run; with
`--patience SECONDS` it waits while other processes work, and repeats what they disturbed. Then the peak memory of each
contender, in a process of its own. The table comes last. `--original` takes the file of the heads this project started
from, which is not part of it, and times them too.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import memory
import record
import torch
import torch.nn.functional as F
from timing import Times, interleaved
from torch import Tensor

from localexit import Feedback, exit_cross_entropy, feedback_names, make_feedback
from localexit.exits.functional import Preset
from localexit.exits.reference import reference_exit

# A contender gives the loss and leaves gradients in hidden.grad and weight.grad.
Run = Callable[["Inputs"], Tensor]
SMALL = "anchors, preset='memory'"
EAGER, CHUNKED, PRODUCT = "F.cross_entropy(h @ W.T)", "F.linear_cross_entropy", "one product h @ W.T"
ORIGINALS = {
    "original dense": ("FactorizedExitHead", {"mode": "dense", "rank": 128}),
    "original hybrid": ("FactorizedExitHead", {"mode": "hybrid", "rank": 128}),
    "original parallel": ("ExactParallelExitHead", {"mode": "parallel_only"}),
    "original parallel_gold": ("ExactParallelExitHead", {"mode": "parallel_gold"}),
    "original parallel_topmass": ("ExactParallelExitHead", {"mode": "parallel_topmass"}),
}
# Why a rule may cost more than two products and a pass over the logits.
NOTES = {
    "hybrid": "top-8 of V per token",
    "parallel_topmass": "top-256 of V per token",
    "mirror": "third product; update included",
    "mirror_sampled": "top-16 and 16 draws of V per token; update included",
    SMALL: "third product, in the backward, by vocabulary tiles",
    "transport": "third product",
    "transport_sampled": "top-16 and 16 draws of V per token",
    PRODUCT: "for scale: no loss, no gradient",
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Tokens, width, vocabulary."""

    num_tokens: int = 2048
    hidden_size: int = 512
    vocab_size: int = 32768


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """hidden [N, D] and weight [V, D], leaves; target [N]."""

    hidden: Tensor
    weight: Tensor
    target: Tensor


def make_inputs(shape: Shape, dtype: torch.dtype = torch.float32) -> Inputs:
    """A model that has learned something: logits peaked at the target, loss about 0.9 nats at the default shape."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(shape.vocab_size, shape.hidden_size, generator=generator)
    target = torch.randint(shape.vocab_size, (shape.num_tokens,), generator=generator)
    hidden = 0.7 * torch.randn(shape.num_tokens, shape.hidden_size, generator=generator) + 50 * weight[target]
    return Inputs(hidden=hidden.to(dtype).requires_grad_(), weight=weight.to(dtype).requires_grad_(), target=target)


def run_rule(rule: Feedback, inputs: Inputs, preset: Preset = "fast") -> Tensor:
    loss = exit_cross_entropy(inputs.hidden, inputs.weight, inputs.target, feedback=rule, preset=preset)
    loss.backward()
    rule.update()
    return loss


def run_eager(inputs: Inputs) -> Tensor:
    loss = F.cross_entropy(inputs.hidden @ inputs.weight.T, inputs.target)
    loss.backward()
    return loss


def run_chunked(inputs: Inputs) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    loss = F.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.target, options=options)
    loss.backward()
    return loss


def run_original(head: torch.nn.Module, inputs: Inputs) -> Tensor:
    logits = head(inputs.hidden[None], inputs.weight, inputs.target[None])
    loss = F.cross_entropy(logits[0], inputs.target)
    loss.backward()
    return loss


def run_product(inputs: Inputs) -> Tensor:
    """The logits alone, in a buffer used again and again: the unit the others are counted in."""
    with torch.no_grad():
        buffer = torch.empty(256, inputs.weight.shape[0])
        for rows in inputs.hidden.split(256):
            torch.mm(rows, inputs.weight.T, out=buffer[: len(rows)])
    return buffer


def contenders(shape: Shape, original: Path | None) -> dict[str, Run]:
    """What is compared, by name; rules with their default options."""
    sizes = (shape.hidden_size, shape.vocab_size)
    runs: dict[str, Run] = {name: partial(run_rule, make_feedback(name, *sizes)) for name in feedback_names()}
    runs[SMALL] = partial(run_rule, make_feedback("anchors", *sizes), preset="memory")
    runs[EAGER] = run_eager
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        runs[CHUNKED] = run_chunked
    if original is not None:
        heads = load_original(original)
        for name, (kind, options) in ORIGINALS.items():
            runs[name] = partial(run_original, getattr(heads, kind)(*sizes, seed=0, **options))
    return runs


def load_original(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("original_heads", path)
    if spec is None or spec.loader is None or not path.exists():
        raise SystemExit(f"--original must be a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_small() -> None:
    """Every rule's loss, feedback and dW against the fp64 oracle; the whole [N, V] error fits at this size."""
    shape = Shape(num_tokens=48, hidden_size=64, vocab_size=1000)
    for name in feedback_names():
        inputs = make_inputs(shape)
        rule = make_feedback(name, shape.hidden_size, shape.vocab_size)
        if "mirror" in name:
            # From zero a mirror feeds nothing back: nothing to compare.
            rule.rows.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
        expected = reference_exit(inputs.hidden, inputs.weight, inputs.target, feedback=rule)
        loss = run_rule(rule, inputs)
        _gate(name, "loss", loss, expected.loss)
        _gate(name, "feedback", inputs.hidden.grad, expected.feedback)
        _gate(name, "dW", inputs.weight.grad, expected.weight_grad)


def check(runs: dict[str, Run], inputs: Inputs, expected: tuple[Tensor, Tensor, Tensor]) -> None:
    """Every contender's loss and dW against fp64 at the timed size, and dh of those that promise the exact one."""
    for name, run in runs.items():
        loss = clean_run(run, inputs)
        _gate(name, "loss", loss, expected[0])
        _gate(name, "dW", inputs.weight.grad, expected[1])
        if name in ("transport", EAGER, CHUNKED):
            _gate(name, "dh", inputs.hidden.grad, expected[2])


def exact(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dW and dh in fp64."""
    weight = inputs.weight.detach().double()
    loss, weight_grad, hidden_grad = torch.zeros((), dtype=torch.float64), torch.zeros_like(weight), []
    for rows, target in zip(inputs.hidden.detach().double().split(128), inputs.target.split(128), strict=True):
        logits = (rows @ weight.T).requires_grad_()
        part = F.cross_entropy(logits, target, reduction="sum") / len(inputs.target)
        (error,) = torch.autograd.grad(part, logits)
        loss += part.detach()
        weight_grad += error.T @ rows
        hidden_grad.append(error @ weight)
    return loss, weight_grad, torch.cat(hidden_grad)


def _gate(name: str, what: str, actual: Tensor, expected: Tensor) -> None:
    error = float((actual.detach().double() - expected).norm() / expected.norm())
    # fp32 sums over V = 32768 terms: a few 1e-7 each, more where large terms cancel.
    if not error < 1e-5:
        raise SystemExit(f"{name}: {what} is off by {error:.1e} of its norm; nothing is timed")


def clean_run(run: Run, inputs: Inputs) -> Tensor:
    """Run from no gradients, as after zero_grad()."""
    inputs.hidden.grad = inputs.weight.grad = None
    return run(inputs)


def measure_memory(name: str, arguments: argparse.Namespace) -> float | None:
    """MiB above weights and gradients at the peak, from a child process."""
    if not memory.is_measurable():
        return None
    command = [sys.executable, __file__, "--memory-of", name, "--threads", str(arguments.threads)]
    if arguments.original is not None:
        command += ["--original", str(arguments.original)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def print_memory(name: str, original: Path | None) -> None:
    """The child's part: warm up on a small shape, so that code and work space are there, then measure once."""
    small = Shape(num_tokens=64, hidden_size=512, vocab_size=512)
    clean_run(contenders(small, original)[name], make_inputs(small))
    shape = Shape()
    run, inputs = contenders(shape, original)[name], make_inputs(shape)
    peak = memory.peak_bytes(lambda: clean_run(run, inputs))
    gradients = 4 * (inputs.hidden.numel() + inputs.weight.numel())
    print(json.dumps((peak - gradients) / 2**20))


def result(name: str, times: dict[str, Times], peak: float | None) -> dict[str, Any]:
    own = times[name]
    return {
        "name": name,
        "kind": "rule" if name in (*feedback_names(), SMALL) else "baseline",
        "median_s": own.median,
        "min_s": min(own.seconds),
        "max_s": max(own.seconds),
        "times_s": own.seconds,
        "cores_used_by_others": own.others,
        "faster_than_eager": own.ratio_to(times[EAGER]),
        "products": 1 / own.ratio_to(times[PRODUCT]),
        "peak_mib": peak,
        "note": NOTES.get(name, ""),
    }


def show(results: list[dict[str, Any]]) -> str:
    head = ("", "median s", "min-max s", "vs eager", "products", "peak MiB", "")
    rows = [
        (
            r["name"],
            f"{r['median_s']:.3f}",
            f"{r['min_s']:.2f}-{r['max_s']:.2f}",
            f"{r['faster_than_eager']:.2f}x",
            f"{r['products']:.2f}",
            "" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}",
            r["note"],
        )
        for r in results
    ]
    return record.table(head, rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    parser.add_argument("--original", type=Path, help="Python file of the original heads")
    parser.add_argument("--rounds", type=int, default=7, help="rounds timed, at least 5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to spend on waiting for a quiet machine")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 5:
        parser.error(f"--rounds must be at least 5, got {arguments.rounds}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    # The rule with the longest nucleus is timed with the nucleus it has by default.
    warnings.filterwarnings("ignore", message="the nucleus of some tokens")
    if arguments.memory_of is not None:
        print_memory(arguments.memory_of, arguments.original)
        return
    shape, inputs = Shape(), make_inputs(Shape())
    content = {"format": 1, "benchmark": "exit_cpu", **record.environment(arguments.threads)}
    runs = contenders(shape, arguments.original)
    print("gate: losses and gradients against fp64 ...", flush=True)
    check_small()
    check(runs, inputs, exact(inputs))
    print(f"timing: {len(runs)} contenders, {arguments.rounds} rounds ...", flush=True)
    runs[PRODUCT] = run_product
    timed = {name: partial(clean_run, run, inputs) for name, run in runs.items()}
    times = interleaved(timed, rounds=arguments.rounds, patience=arguments.patience)
    print("memory: one process each ...", flush=True)
    peaks = {name: None if name == PRODUCT else measure_memory(name, arguments) for name in runs}
    results = [result(name, times, peaks[name]) for name in runs]
    content |= {
        "load_average_after": [round(load, 2) for load in os.getloadavg()],
        "shape": vars(shape),
        "dtype": "float32",
        "rounds": arguments.rounds,
        "original_sha256": hashlib.sha256(arguments.original.read_bytes()).hexdigest() if arguments.original else None,
        "results": results,
    }
    if arguments.output is not None:
        record.write_json(arguments.output, content)
    sizes = " ".join(f"{letter}={size}" for letter, size in zip("NDV", vars(shape).values(), strict=True))
    print(f"\n{content['device']}, {arguments.threads} threads, torch {torch.__version__}")
    print(f"{sizes} fp32, loss and all gradients, median of {arguments.rounds}")
    if CHUNKED not in runs:
        print("F.linear_cross_entropy in chunks: not available in this torch")
    print(show(results))


if __name__ == "__main__":
    main()
