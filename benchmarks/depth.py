"""What depth costs: memory and time of local training against backprop, on one plain decoder.

    python benchmarks/depth.py [--parts memory time largest] [--output FILE] [--size gpu|cpu|tiny] [--plot FILE.svg]

Nothing is measured before a gate has passed: with exact feedback and one exit at the top, local training must make
backprop's gradients, and with an exit on every block every rule must make the gradient of the unembedding that
backprop makes from the same losses.

- memory: peak of the activations in a step, over the number of blocks. On a GPU what the allocator holds above
  parameters and gradients that were there before; on a CPU what autograd keeps for the backward.
- time: whole optimiser steps of a stack of blocks, in rounds that take turns. Blocks are compiled one by one for all
  contenders, and backprop's loss is compiled too.
- largest: how many blocks train in 12, 24 and 80 GiB, from the peaks at three depths; what fits into the smaller two
  is then tried with the allocator held to that size. Only on a GPU.

Cells that are in FILE already, measured on the same device and commit, are kept. --plot draws FILE without measuring.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from localexit import ExitSchedule, LocalModel, StepInBackward, attach, feedback_names
from localexit.bench.record import environment
from localexit.bench.tables import aligned

GIB = 2**30
PARTS = ("memory", "time", "largest")
RULE = "anchors"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A stack of blocks and its batch."""

    num_blocks: int
    hidden_size: int
    vocab_size: int
    batch_size: int
    context: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured in each part.

    Attributes:
        memory, depths: the stack of the memory part, and its numbers of blocks.
        time: stacks of the time part, by name.
        largest, fitted_depths: the stack of the last part, and the depths from which the peak is extrapolated.
        rounds: of the time part.
    """

    memory: Shape
    depths: tuple[int, ...]
    time: dict[str, Shape]
    largest: Shape
    fitted_depths: tuple[int, ...] = (4, 8, 16)
    rounds: int = 7


def _shape(num_blocks: int, hidden_size: int, vocab_size: int, batch_size: int, context: int) -> Shape:
    return Shape(
        num_blocks=num_blocks,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        batch_size=batch_size,
        context=context,
    )


SIZES = {
    "gpu": Sizes(
        memory=_shape(4, 1024, 32768, 8, 1024),
        depths=(4, 8, 16, 32, 64),
        time={
            "large vocabulary": _shape(12, 768, 50304, 16, 1024),
            "large width": _shape(12, 2048, 32000, 8, 1024),
        },
        largest=_shape(4, 2048, 32000, 4, 1024),
    ),
    "cpu": Sizes(
        memory=_shape(4, 128, 2048, 4, 128),
        depths=(4, 8, 16, 32, 64),
        time={"small": _shape(6, 128, 2048, 4, 128)},
        largest=_shape(4, 128, 2048, 4, 128),
        rounds=3,
    ),
    "tiny": Sizes(
        memory=_shape(2, 16, 40, 2, 8),
        depths=(2, 4, 8),
        time={"tiny": _shape(2, 16, 40, 2, 8)},
        largest=_shape(2, 16, 40, 2, 8),
        rounds=1,
    ),
}


class Block(nn.Module):
    """Causal attention and a gated MLP, both behind a norm and residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = max(1, width // 64)
        inner = -(-width * 8 // 3 // 64) * 64
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        heads = self.qkv(self.attention_norm(hidden)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """Embedding, blocks, norm, unembedding; position is left to the causal mask."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(shape.hidden_size) for _ in range(shape.num_blocks))
        self.norm = nn.RMSNorm(shape.hidden_size)
        self.unembed = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.unembed(self.norm(hidden))


def top_loss(hidden: Tensor, norm: nn.Module, weight: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of one exit by autograd."""
    logits = F.linear(norm(hidden), weight)
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())


@dataclass(kw_only=True)
class Contender:
    """A way to train: makes all gradients of a step when called with token ids, and steps its optimiser."""

    model: Decoder
    gradients: Callable[[Tensor], object]
    optimizer: torch.optim.Optimizer | StepInBackward | None = None
    local: LocalModel | None = None

    def step(self, ids: Tensor) -> None:
        self.gradients(ids)
        if self.optimizer is not None:
            self.optimizer.step()
        if isinstance(self.optimizer, torch.optim.Optimizer):
            self.optimizer.zero_grad()
        if self.local is not None:
            self.local.update()


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it runs: the device, and whether products are in bf16 and blocks are compiled."""

    device: torch.device
    is_fast: bool

    def model(self, shape: Shape, *, is_compiled: bool = False) -> Decoder:
        torch.manual_seed(0)
        with torch.device(self.device):
            model = Decoder(shape).train()
        if is_compiled and self.is_fast:
            for block in model.blocks:
                block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]
        return model

    def ids(self, shape: Shape, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(shape.vocab_size, (shape.batch_size, shape.context), generator=generator).to(self.device)

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.is_fast else nullcontext()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def shifted(ids: Tensor) -> Tensor:
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)


def backprop(
    machine: Machine, model: Decoder, *, at_every_block: bool = False, with_checkpoints: bool = False
) -> Callable[[Tensor], object]:
    """Gradients from end to end, of one loss at the top or of one at every block."""
    loss_of = torch.compile(top_loss, dynamic=False) if machine.is_fast else top_loss

    def gradients(ids: Tensor) -> Tensor:
        with machine.autocast():
            hidden, target, losses = model.embed(ids), shifted(ids), []
            for block in model.blocks:
                hidden = checkpoint(block, hidden, use_reentrant=False) if with_checkpoints else block(hidden)
                if at_every_block:
                    losses.append(loss_of(hidden, model.norm, model.unembed.weight, target))
            losses = losses or [loss_of(hidden, model.norm, model.unembed.weight, target)]
            loss = torch.stack(losses).sum()
        loss.backward()
        return loss

    return gradients


def local_steps(machine: Machine, local: LocalModel) -> Callable[[Tensor], object]:
    """Gradients unit by unit, in the forward."""

    def gradients(ids: Tensor) -> object:
        with machine.autocast():
            return local(ids, ids)

    return gradients


def adamw(parameters: Iterator[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


@contextmanager
def contender(
    machine: Machine, model: Decoder, kind: str, *, optimizer: torch.optim.Optimizer | None = None, rule: str = RULE
) -> Iterator[Contender]:
    """A contender by its name, on a model that it leaves as it was but for what it learned."""
    if kind.startswith("backprop"):
        gradients = backprop(
            machine, model, at_every_block="every exit" in kind, with_checkpoints="checkpoints" in kind
        )
        if "in backward" in kind:
            step_in_hooks(model)
            optimizer = None
        yield Contender(model=model, gradients=gradients, optimizer=optimizer)
        return
    num_blocks = len(model.blocks)
    options_of: dict[str, dict[str, Any]] = {
        "local, every block": {},
        "local, in backward": {},
        "local, one exit a step": {"schedule": ExitSchedule(exits_per_step=1)},
        "local, one exit's worth of tokens": {"schedule": ExitSchedule(token_share=1 / num_blocks)},
        "local, every:6": {"exits": f"every:{min(6, num_blocks)}"},
    }
    local = attach(model, feedback=rule, backward="stream", **options_of[kind])
    stepping = StepInBackward(local, optimizer) if "in backward" in kind and optimizer is not None else optimizer
    yield Contender(model=model, gradients=local_steps(machine, local), optimizer=stepping, local=local)
    local.remove()


def step_in_hooks(model: Decoder) -> None:
    """AdamW for each parameter by itself, as soon as backprop has made its gradient, which is then freed."""
    for parameter in model.parameters():
        optimizer = adamw(iter([parameter]))

        def step(_: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)


# The gate


def gate(machine: Machine) -> None:
    """Stop unless local training makes the gradients it should.

    Raises:
        SystemExit: it does not.
    """
    exact = Machine(device=machine.device, is_fast=False)
    shape = _shape(3, 64, 211, 2, 24)
    ids = exact.ids(shape)
    whole = exact.model(shape)
    backprop(exact, whole)(ids)
    model = exact.model(shape)
    attach(model, feedback="transport", exits=[-1], backward="stream", example=ids)(ids, ids)
    for (name, parameter), reference in zip(model.named_parameters(), whole.parameters(), strict=True):
        _check(f"one exit at the top, {name}", parameter.grad, reference.grad)
    whole.zero_grad()
    backprop(exact, whole, at_every_block=True)(ids)
    for rule in feedback_names():
        if rule.startswith("parallel"):
            # They warn of the norm in front of the exits, which removes what they feed back.
            continue
        model = exact.model(shape)
        attach(model, feedback=rule, backward="stream", example=ids)(ids, ids)
        _check(f"{rule}, unembedding", model.unembed.weight.grad, whole.unembed.weight.grad)


def _check(what: str, found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None
    assert expected is not None
    error = float((found - expected).norm() / expected.norm())
    # fp32, or TF32 where a GPU is allowed to.
    if not error < 2e-3:
        raise SystemExit(f"{what}: gradient is off by {error:.1e}; nothing is measured")


# Peak memory over depth


class SavedBytes:
    """Bytes of the tensors that autograd keeps for a backward, parameters aside; shared memory counts once."""

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._live: dict[int, tuple[int, int]] = {}
        self.peak = 0

    def pack(self, tensor: Tensor) -> Held:
        held = self.Held(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._live[id(held)] = (storage.data_ptr(), storage.nbytes())
            weakref.finalize(held, self._live.pop, id(held))
            self.peak = max(self.peak, sum(dict(self._live.values()).values()))
        return held

    @contextmanager
    def watching(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor):
            yield


def activation_bytes(machine: Machine, shape: Shape, kind: str) -> int:
    """Peak of a step's activations, above parameters and gradients."""
    ids = machine.ids(shape)
    with contender(machine, machine.model(shape), kind) as made:
        if machine.device.type != "cuda":
            saved = SavedBytes(made.model)
            with saved.watching():
                made.gradients(ids)
            return saved.peak
        # Gradients of the first step stay, and are added to by the second.
        made.gradients(ids)
        machine.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        made.gradients(ids)
        return torch.cuda.max_memory_allocated() - before


MEMORY_KINDS = ("local, every block", "backprop, loss at the top", "backprop, checkpoints")


def measure_memory(machine: Machine, sizes: Sizes, kind: str) -> dict[str, Any]:
    """Peaks by depth, and what one more block adds."""
    peaks = {}
    for depth in sizes.depths:
        peaks[str(depth)] = activation_bytes(machine, _with_depth(sizes.memory, depth), kind)
        _free(machine)
    slope = np.polyfit(list(map(int, peaks)), list(peaks.values()), 1)[0]
    return {"shape": asdict(sizes.memory), "peak_bytes": peaks, "bytes_a_block": float(slope)}


def _with_depth(shape: Shape, depth: int) -> Shape:
    return Shape(**{**asdict(shape), "num_blocks": depth})


def _free(machine: Machine) -> None:
    # Models and their hooks refer to each other.
    gc.collect()
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()


# Time of a step

TIME_KINDS = (
    "backprop, loss at the top",
    "backprop, loss at every exit",
    "local, every block",
    "local, every:6",
    "local, one exit a step",
    "local, one exit's worth of tokens",
)


def measure_time(machine: Machine, shape: Shape, rounds: int, rule: str) -> dict[str, Any]:
    """Milliseconds of a whole step of every contender, in rounds that take turns after two that warm up.

    All train one model with one optimiser, so that any number of contenders fits.
    """
    model = machine.model(shape, is_compiled=True)
    optimizer = adamw(model.parameters())
    taken: dict[str, list[float]] = {kind: [] for kind in TIME_KINDS}
    ids = machine.ids(shape)
    for number in range(rounds + 2):
        for kind in TIME_KINDS:
            # A step with one exit costs as much as the exit is deep: the mean over many steps is what counts.
            num_steps = 4 * shape.num_blocks if "one exit a step" in kind and number > 1 else 2
            with contender(machine, model, kind, optimizer=optimizer, rule=rule) as made:
                made.step(ids)
                machine.wait()
                start = time.perf_counter()
                for _ in range(num_steps):
                    made.step(ids)
                machine.wait()
            if number > 1:
                taken[kind].append(1e3 * (time.perf_counter() - start) / num_steps)
    top, every = (statistics.median(taken[kind]) for kind in TIME_KINDS[:2])
    return {
        "shape": asdict(shape),
        "rule": rule,
        "rounds": rounds,
        "results": [
            {
                "name": kind,
                "median_ms": statistics.median(own),
                "min_ms": min(own),
                "max_ms": max(own),
                "of_top": statistics.median(own) / top,
                "faster_than_every_exit": every / statistics.median(own),
            }
            for kind, own in taken.items()
        ],
    }


# The largest model

LARGEST_KINDS = (
    "local, in backward",
    "local, every block",
    "backprop, loss at the top",
    "backprop, checkpoints",
    "backprop, checkpoints, in backward",
)
BUDGETS = (12, 24, 80)


def training_peak(machine: Machine, shape: Shape, kind: str) -> int:
    """Peak memory of everything in two steps: parameters, gradients, AdamW's state, activations, temporaries."""
    _free(machine)
    torch.cuda.reset_peak_memory_stats()
    model = machine.model(shape)
    with contender(machine, model, kind, optimizer=adamw(model.parameters())) as made:
        for seed in range(2):
            made.step(machine.ids(shape, seed))
    machine.wait()
    return torch.cuda.max_memory_reserved()


def measure_largest(machine: Machine, sizes: Sizes, kind: str) -> dict[str, Any]:
    """How many blocks fit into each budget, and whether that many do where the allocator is held to it."""
    peaks = {depth: training_peak(machine, _with_depth(sizes.largest, depth), kind) for depth in sizes.fitted_depths}
    slope, intercept = np.polyfit(list(peaks), list(peaks.values()), 1)
    total = torch.cuda.get_device_properties(machine.device).total_memory
    blocks, fits = {}, {}
    for budget in BUDGETS:
        # What the driver and CUDA's libraries take is not the allocator's: half a GiB.
        blocks[str(budget)] = int(((budget - 0.5) * GIB - intercept) // slope)
        if budget * GIB < total // 2:
            fits[str(budget)] = _fits(machine, _with_depth(sizes.largest, blocks[str(budget)]), kind, budget - 0.5)
    parameters = {budget: _num_parameters(_with_depth(sizes.largest, num)) for budget, num in blocks.items()}
    return {
        "shape": asdict(sizes.largest),
        "peak_bytes": {str(depth): peak for depth, peak in peaks.items()},
        "bytes_a_block": float(slope),
        "blocks": blocks,
        "parameters": parameters,
        "fits": fits,
    }


def _num_parameters(shape: Shape) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(shape).parameters())


def _fits(machine: Machine, shape: Shape, kind: str, gib: float) -> bool:
    total = torch.cuda.get_device_properties(machine.device).total_memory
    _free(machine)
    torch.cuda.set_per_process_memory_fraction(gib * GIB / total)
    try:
        training_peak(machine, shape, kind)
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        _free(machine)
    return True


# Results


Cell = tuple[str, str, Callable[[], dict[str, Any]]]


def cells(machine: Machine, sizes: Sizes, parts: Sequence[str], rule: str) -> Iterator[Cell]:
    """Part, name and measurement of everything there is to measure."""
    if "memory" in parts:
        for kind in MEMORY_KINDS:
            yield "memory", kind, partial(measure_memory, machine, sizes, kind)
    if "time" in parts:
        for name, shape in sizes.time.items():
            yield "time", f"{name}, {rule}", partial(measure_time, machine, shape, sizes.rounds, rule)
    if "largest" in parts and machine.device.type == "cuda":
        for kind in LARGEST_KINDS:
            yield "largest", kind, partial(measure_largest, machine, sizes, kind)


def kept(path: Path | None, start: dict[str, Any]) -> dict[str, Any]:
    """What the file has of the same device, versions and commit; else only the description of this run."""
    if path is None or not path.exists():
        return start
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content if all(content.get(key) == value for key, value in start.items()) else start


def shown(content: dict[str, Any]) -> str:
    """The results as tables."""
    parts = [f"{content['device']}, torch {content['versions']['torch']}"]
    memory = content.get("memory", {})
    if memory:
        depths = list(next(iter(memory.values()))["peak_bytes"])
        reference = memory.get("backprop, loss at the top", {}).get("bytes_a_block")
        rows = [
            (
                kind,
                *(f"{cell['peak_bytes'][depth] / 2**20:.1f}" for depth in depths),
                f"{cell['bytes_a_block'] / 2**20:.3f}",
                f"{cell['bytes_a_block'] / reference:.1%}" if reference else "",
            )
            for kind, cell in memory.items()
        ]
        parts.append(aligned(("activations, MiB at blocks:", *depths, "a block", "of backprop's"), rows))
    for name, cell in content.get("time", {}).items():
        rows = [
            (
                row["name"],
                f"{row['median_ms']:.2f}",
                f"{row['min_ms']:.1f}-{row['max_ms']:.1f}",
                f"{row['of_top']:.2f}",
                f"{row['faster_than_every_exit']:.2f}",
                "",
            )
            for row in cell["results"]
        ]
        sizes = " ".join(f"{key}={value}" for key, value in cell["shape"].items())
        parts.append(f"{name}: {sizes}")
        head = ("", "ms a step", "min-max", "× backprop", "faster than every exit", "")
        parts.append(aligned(head, rows))
    largest = content.get("largest", {})
    if largest:
        rows = [
            (
                kind,
                *(
                    f"{cell['blocks'][str(b)]} ({cell['parameters'][str(b)] / 1e9:.2f}B)"
                    + {True: " ran", False: " did not run", None: ""}[cell["fits"].get(str(b))]
                    for b in BUDGETS
                ),
                f"{cell['bytes_a_block'] / 2**20:.0f} MiB a block",
            )
            for kind, cell in largest.items()
        ]
        parts.append(aligned(("most blocks in", *(f"{b} GiB" for b in BUDGETS), ""), rows))
    return "\n\n".join(parts)


def plot(content: dict[str, Any], path: Path) -> None:
    """Peak of the activations over depth."""
    from localexit.report.drawing import WIDE, Curve, draw, label_ends, rendered, scale_log
    from localexit.report.theme import canvas, drawable, figure_style, run_style

    curves = [
        Curve(
            x=np.array(list(map(int, cell["peak_bytes"]))),
            y=np.array(list(cell["peak_bytes"].values())) / 2**20,
            color=run_style(index)[0],
            label=kind,
        )
        for index, (kind, cell) in enumerate(content["memory"].items())
    ]
    shape = content["memory"][MEMORY_KINDS[0]]["shape"]
    sizes = f"D={shape['hidden_size']} {shape['batch_size']}×{shape['context']} tokens"
    with figure_style():
        figure, axes = canvas(*WIDE, right=1.9)
        draw(axes, curves)
        axes.set_xlabel("blocks")
        scale_log(axes, curves)
        label_ends(axes, curves)
        chart = rendered(
            figure,
            curves,
            name="depth",
            title=f"Peak of the activations in MiB over depth; {sizes}; {drawable(content['device'], 40)}",
            caption="",
            alt=f"Line chart of the activations' peak over the number of blocks, {len(curves)} ways to train.",
        )
    path.write_bytes(chart.standalone_svg())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", choices=SIZES, help="sizes to measure; those of the device by default")
    parser.add_argument("--rule", default=RULE, help="feedback rule of the time part")
    parser.add_argument("--output", type=Path, help="write the results there as JSON, and continue what is there")
    parser.add_argument("--plot", type=Path, help="draw the memory part of --output there; measures nothing")
    parser.add_argument("--commit", help="commit of the sources, where git cannot be asked")
    options = parser.parse_args(arguments)
    if options.plot is not None:
        plot(json.loads(options.output.read_text(encoding="utf-8")), options.plot)
        return
    has_gpu = torch.cuda.is_available()
    machine = Machine(device=torch.device("cuda" if has_gpu else "cpu"), is_fast=has_gpu)
    size = options.size or ("gpu" if has_gpu else "cpu")
    described = environment(machine.device, threads=torch.get_num_threads(), commit=options.commit)
    content = kept(options.output, {**described, "benchmark": "depth", "size": size})
    # A block is compiled for each shape, for inputs with and without a graph, and for the traced forward of attach().
    torch._dynamo.config.recompile_limit = 64
    gate(machine)
    for part, name, measure in cells(machine, SIZES[size], options.parts, options.rule):
        if name in content.get(part, {}):
            continue
        content.setdefault(part, {})[name] = measure()
        _free(machine)
        if options.output is not None:
            options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(shown(content))


if __name__ == "__main__":
    main()
