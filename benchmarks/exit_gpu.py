"""The exit on a GPU: loss, dW and feedback in bf16, every rule against the heads a user would take instead.

    python benchmarks/exit_gpu.py [--output benchmarks/results/exit_gpu.json] [--original PATH]

First a gate: nothing is timed unless loss and dW of every rule are right, within twice what plain PyTorch is off in the
same dtype (the peers' errors are shown). Then, shape by shape, one interleaved run, the peak memory above what was
allocated before the call, and the ratio to the forward product of the same run. The table comes last.

"step" is `exit_step`: dW is added to an accumulator that was there. "autograd" is `exit_cross_entropy(...).backward()`:
the gradients are also multiplied by what comes from above, and count as memory. "memory" is the same with the memory
preset. Peers that are not installed are listed as not available.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
import torch.nn.functional as F
from torch import Tensor

from localexit import Feedback, exit_cross_entropy, exit_step, make_feedback

RULES = ("anchors", "dense", "sketch", "hybrid", "mirror_sampled", "transport_sampled", "mirror", "transport")
SHAPES = {"llama": (8192, 4096, 128256), "gemma": (8192, 2304, 256000), "gpt2": (16384, 768, 50304)}
PRODUCT, EAGER, COMPILED = "h @ W.T", "F.cross_entropy", "torch.compile(F.cross_entropy)"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """hidden [N, D] and weight [V, D], bf16 leaves; target [N]; total fp32 [V, D], dW's accumulator for steps."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    total: Tensor


Run = Callable[[Inputs], Tensor | None]


def make_inputs(num_tokens: int, hidden_size: int, vocab_size: int) -> Inputs:
    """Logits peaked at the target, as in a model that has learned something."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(vocab_size, hidden_size, device="cuda")
    target = torch.randint(vocab_size, (num_tokens,), device="cuda")
    hidden = 0.7 * torch.randn(num_tokens, hidden_size, device="cuda") + 12 * weight[target]
    return Inputs(
        hidden=hidden.bfloat16().requires_grad_(),
        weight=weight.bfloat16().requires_grad_(),
        target=target,
        total=torch.zeros(vocab_size, hidden_size, device="cuda"),
    )


def run_step(rule: Feedback, inputs: Inputs) -> Tensor:
    return exit_step(inputs.hidden, inputs.weight, inputs.target, feedback=rule, grad_weight=inputs.total).loss


def run_autograd(rule: Feedback, inputs: Inputs) -> Tensor:
    loss = exit_cross_entropy(inputs.hidden, inputs.weight, inputs.target, feedback=rule)
    loss.backward()
    return loss


def run_memory(rule: Feedback, inputs: Inputs) -> Tensor:
    loss = exit_cross_entropy(inputs.hidden, inputs.weight, inputs.target, feedback=rule, preset="memory")
    loss.backward()
    return loss


def run_product(inputs: Inputs) -> None:
    with torch.no_grad():
        torch.mm(inputs.hidden, inputs.weight.T)


def plain_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), target)


def run_loss(function: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs) -> Tensor:
    loss = function(inputs.hidden, inputs.weight, inputs.target)
    loss.backward()
    return loss


def run_original(head: torch.nn.Module, inputs: Inputs) -> Tensor:
    logits = head(inputs.hidden[None], inputs.weight, inputs.target[None])
    loss = F.cross_entropy(logits[0].float(), inputs.target)
    loss.backward()
    return loss


def peers() -> dict[str, Run | None]:
    """Exact heads by name; None where the package is not installed."""
    runs: dict[str, Run | None] = {
        EAGER: partial(run_loss, plain_loss),
        COMPILED: partial(run_loss, torch.compile(plain_loss)),
        "cut-cross-entropy": None,
        "liger": None,
    }
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        runs["cut-cross-entropy"] = partial(run_loss, linear_cross_entropy)
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        runs["liger"] = partial(run_loss, lambda h, w, t: liger(w, h, t))
    return runs


def originals(path: Path | None, hidden_size: int, vocab_size: int) -> dict[str, Run]:
    """The heads this project started from, when their file is given."""
    if path is None:
        return {}
    spec = importlib.util.spec_from_file_location("original_heads", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    hybrid = module.FactorizedExitHead(hidden_size, vocab_size, mode="hybrid", rank=128, seed=0).cuda()
    dense = module.FactorizedExitHead(hidden_size, vocab_size, mode="dense", rank=128, seed=0).cuda()
    return {"original hybrid": partial(run_original, hybrid), "original dense": partial(run_original, dense)}


def exact(inputs: Inputs) -> tuple[float, Tensor]:
    """Loss and dW, from fp32 products in pieces."""
    weight, total, loss = inputs.weight.detach().float(), torch.zeros_like(inputs.total), 0.0
    for rows, target in zip(inputs.hidden.detach().float().split(512), inputs.target.split(512), strict=True):
        logits = (rows @ weight.T).requires_grad_()
        part = F.cross_entropy(logits, target, reduction="sum") / len(inputs.target)
        (error,) = torch.autograd.grad(part, logits)
        loss += float(part.detach())
        total += error.T @ rows
    return loss, total


def error_of(run: Run, inputs: Inputs, expected: tuple[float, Tensor]) -> float:
    """Relative error of dW, and of the loss where that is larger."""
    loss = clean_run(run, inputs)
    assert loss is not None
    gradient = inputs.total if inputs.weight.grad is None else inputs.weight.grad
    error = (gradient.float() - expected[1]).norm() / expected[1].norm()
    return max(float(error), abs(float(loss.detach()) - expected[0]) / expected[0])


def clean_run(run: Run, inputs: Inputs) -> Tensor | None:
    inputs.hidden.grad = inputs.weight.grad = None
    inputs.total.zero_()
    return run(inputs)


def timed(runs: dict[str, Run], inputs: Inputs, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each run, by events on the stream, `rounds` a contender.

    As in training, calls follow each other without waiting for the GPU, so that launching is hidden behind work; and
    each is timed after one of its own, so that all meet the GPU as warm as they make it.
    """
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            for is_counted in (False, True):
                inputs.hidden.grad = inputs.weight.grad = None
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run(inputs)
                end.record()
                if is_counted:
                    events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def peak_mib(run: Run, inputs: Inputs) -> float:
    inputs.hidden.grad = inputs.weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(inputs)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure_shape(shape: tuple[int, int, int], original: Path | None, rounds: int) -> dict[str, Any]:
    inputs = make_inputs(*shape)
    rules = {name: make_feedback(name, *shape[1:]).cuda() for name in RULES}
    # A mirror that learned: bf16 rows, as it would be stored beside a bf16 model.
    for name in ("mirror", "mirror_sampled"):
        rules[name].rows = inputs.weight.detach().clone()
    runs: dict[str, Run] = {f"{name} step": partial(run_step, rule) for name, rule in rules.items()}
    runs |= {f"{name} autograd": partial(run_autograd, rule) for name, rule in rules.items()}
    runs |= {f"{name} memory": partial(run_memory, rules[name]) for name in ("anchors", "dense", "mirror_sampled")}
    runs |= {name: run for name, run in peers().items() if run is not None}
    runs |= originals(original, *shape[1:])
    expected = exact(inputs)
    # Logits of size 20 in bf16 are rounded by 0.06, in every head: the budget is twice what plain PyTorch is off.
    budget = 2 * error_of(partial(run_loss, plain_loss), inputs, expected)
    failures: dict[str, str] = {}
    errors: dict[str, float] = {}
    for name, run in list(runs.items()):
        try:
            errors[name] = error_of(run, inputs, expected)
        except (torch.OutOfMemoryError, ImportError, RuntimeError) as error:
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            del runs[name]
            torch.cuda.empty_cache()
    del expected
    wrong = [name for name in errors if name.split()[0] in RULES and not errors[name] <= budget]
    if wrong:
        raise SystemExit(f"off by more than twice plain PyTorch: {', '.join(wrong)}; nothing is timed")
    runs[PRODUCT] = run_product
    peaks = {name: peak_mib(run, inputs) for name, run in runs.items()}
    times = timed(runs, inputs, rounds)
    forward = median(times[PRODUCT])
    missing = [name for name, run in peers().items() if run is None]
    return {
        "shape": dict(zip(("num_tokens", "hidden_size", "vocab_size"), shape, strict=True)),
        "not_available": failures | dict.fromkeys(missing, "not installed"),
        "results": [
            {
                "name": name,
                "median_ms": median(own),
                "min_ms": min(own),
                "max_ms": max(own),
                "products": median(own) / forward,
                "peak_mib": peaks[name],
                "error": errors.get(name),
            }
            for name, own in times.items()
        ],
    }


def show(measured: dict[str, Any]) -> str:
    head = ("", "median ms", "min-max ms", "products", "peak MiB", "error")
    rows = [
        (
            r["name"],
            f"{r['median_ms']:.2f}",
            f"{r['min_ms']:.1f}-{r['max_ms']:.1f}",
            f"{r['products']:.2f}",
            f"{r['peak_mib']:.0f}",
            "" if r["error"] is None else f"{r['error']:.1e}",
        )
        for r in measured["results"]
    ]
    notes = [f"{name}: {reason}" for name, reason in measured["not_available"].items()]
    return "\n".join([record.table(head, rows), *notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    parser.add_argument("--original", type=Path, help="Python file of the original heads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--commit", default=record.commit(), help="commit of the sources, where git cannot be asked")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device; the CPU benchmark is benchmarks/exit_cpu.py")
    content: dict[str, Any] = {"format": 1, "benchmark": "exit_gpu", **record.environment(torch.get_num_threads())}
    content["commit"] = arguments.commit
    content |= {"device": torch.cuda.get_device_name(), "dtype": "bfloat16", "rounds": arguments.rounds, "shapes": {}}
    for name in arguments.shapes:
        torch.cuda.empty_cache()
        content["shapes"][name] = measure_shape(SHAPES[name], arguments.original, arguments.rounds)
        if arguments.output is not None:
            record.write_json(arguments.output, content)
    for name in arguments.shapes:
        print(f"\n{name} N={SHAPES[name][0]} D={SHAPES[name][1]} V={SHAPES[name][2]}, {content['device']}, bf16")
        print(show(content["shapes"][name]))


if __name__ == "__main__":
    main()
