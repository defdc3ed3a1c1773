"""Several GPUs of one machine: data parallel, vocabulary parallel, a pipeline of units against 1F1B; in one go.

    torchrun --nproc-per-node 2 benchmarks/distributed.py --output FILE [--tiny]

Nothing is timed before a gate has passed: gradients on ranks are those of one process, the exit with a spread
unembedding is the whole one's, stages of a pipeline have the losses of one process. Each part is timed against one GPU
in the same run. Without GPUs it runs on gloo; `--tiny` is for trying it. Written after each part, one JSON object.

data_parallel: tokens/s on one rank and on all, the same batch a rank; time of the all-reduces by themselves, and the
    part of it that a step does not hide.
vocab_parallel: ms of one exit, whole on one rank and spread over all, and MiB that a rank hands to collectives.
pipeline: tokens/s of the same blocks on one rank and as stages, trained unit by unit (exits on every few blocks) and by
    1F1B (`torch.distributed.pipelining`, one loss at the top). `bubble` is the share of idle time: 1 - (tokens/s) /
    (stages × tokens/s of one rank), each against its own way of training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from localexit import DataParallel, LocalModel, Pipeline, VocabParallel, attach, exit_step, make_feedback
from localexit.bench.record import environment
from localexit.train.devices import resolve_device
from localexit.train.ranks import joined

RULE = "mirror_sampled"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is timed.

    Attributes:
        width, heads, blocks, vocab: of the decoder.
        rows, context: of a batch, on each rank.
        exits: which blocks have one.
        exit_shape: N, D, V of the single exit.
        micro: micro-batches of a pipeline's batch, of `rows` rows each.
        rounds: timed steps.
    """

    width: int = 1024
    heads: int = 16
    blocks: int = 16
    vocab: int = 32768
    rows: int = 8
    context: int = 1024
    exits: str = "every:4"
    exit_shape: tuple[int, int, int] = (8192, 4096, 128256)
    micro: int = 8
    rounds: int = 5


TINY = Sizes(
    width=16,
    heads=2,
    blocks=8,
    vocab=64,
    rows=2,
    context=8,
    exits="every:2",
    exit_shape=(16, 8, 64),
    micro=4,
    rounds=1,
)


class Block(nn.Module):
    """Causal attention and an MLP, both residual, behind RMSNorms."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleDict({name: nn.RMSNorm(width) for name in ("attention", "mlp")})
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        split = self.qkv(self.norms["attention"](hidden)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*split, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        return hidden + self.down(F.gelu(self.up(self.norms["mlp"](hidden))))


class Decoder(nn.Module):
    """A decoder, or the stage of one: embedding first, norm and unembedding last."""

    def __init__(self, sizes: Sizes, first: int = 0, last: int | None = None) -> None:
        super().__init__()
        last = sizes.blocks if last is None else last
        self.embed = nn.Embedding(sizes.vocab, sizes.width) if first == 0 else None
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.heads) for _ in range(first, last))
        is_end = last == sizes.blocks
        self.norm = nn.RMSNorm(sizes.width) if is_end else None
        self.head = nn.Linear(sizes.width, sizes.vocab, bias=False) if is_end else None

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden if self.embed is None else self.embed(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden if self.head is None or self.norm is None else self.head(self.norm(hidden))


class Bench:
    """One rank of the benchmark.

    Args:
        sizes: what is timed.
        device: of this rank.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def decoder(self, sizes: Sizes, *parts: int, dtype: torch.dtype | None = None) -> Decoder:
        """The same weights on every rank."""
        torch.manual_seed(0)
        return Decoder(sizes, *parts).to(self.device, dtype or self.dtype).train()

    def tokens(self, sizes: Sizes, rows: int, seed: int = 1) -> Tensor:
        """Token ids [rows, context]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(sizes.vocab, (rows, sizes.context), generator=generator).to(self.device)

    def seconds(self, step: Callable[[], object]) -> float:
        """Median time of a step, over rounds that all ranks begin together; the slowest rank's."""
        step()
        times = []
        for _ in range(self.sizes.rounds):
            self.wait()
            start = time.perf_counter()
            step()
            self.wait(barrier=False)
            times.append(time.perf_counter() - start)
        median = torch.tensor(statistics.median(times), device=self.device)
        dist.all_reduce(median, op=dist.ReduceOp.MAX)
        return float(median)

    def wait(self, *, barrier: bool = True) -> None:
        """Until this device, and by default every rank, has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if barrier:
            dist.barrier()

    def gate(self) -> None:
        """Nothing is timed that is not right.

        Raises:
            RuntimeError: something is not.
        """
        self._gate_data_parallel()
        self._gate_vocab_parallel()
        self._gate_pipeline()

    def data_parallel(self) -> dict[str, Any]:
        """One rank against all, and what averaging costs."""
        ids = self.tokens(self.sizes, self.sizes.rows, seed=self.rank)
        alone = self.seconds(_stepper(self._attached(None), ids))
        local = self._attached(DataParallel())
        step = _stepper(local, ids)
        together = self.seconds(step)

        def unsynced() -> None:
            with local.no_sync():
                step()

        without = self.seconds(unsynced)
        local(ids, labels=ids)
        averaging = self.seconds(local.average_gradients)
        return {
            "tokens_per_second": {"1": ids.numel() / alone, str(self.size): self.size * ids.numel() / together},
            "efficiency": alone / together,
            "averaging_ms": 1e3 * averaging,
            "exposed_ms": 1e3 * (together - without),
            # Of the averaging. Negative: the step takes longer by more than the averaging takes by itself.
            "hidden_share": 1 - (together - without) / averaging,
        }

    def vocab_parallel(self) -> dict[str, Any]:
        """One exit, whole and spread, by rule."""
        num_rows, width, vocab_size = self.sizes.exit_shape
        vocab = VocabParallel(vocab_size=vocab_size)
        hidden, weight, target = self._exit_inputs(num_rows, width, vocab_size, self.dtype)
        found = {}
        for name in ("dense", "anchors", "mirror_sampled", "transport"):
            rule = make_feedback(name, width, vocab_size, seed=0).to(self.device)
            found[name] = {
                "whole_ms": 1e3 * self.seconds(_exit(hidden, weight, target, feedback=rule, backend="torch")),
                **self._spread(hidden, weight, target, rule, vocab),
            }
            del rule
        return found

    def pipeline(self) -> dict[str, Any]:
        """Units and 1F1B, each on one rank and as stages."""
        sizes = self.sizes
        ids = self.tokens(sizes, sizes.rows * sizes.micro)
        found: dict[str, Any] = {}
        for name, steps in (("units", self._units), ("1f1b", self._one_forward_one_backward)):
            with steps(ids) as (one, stages):
                alone, staged = ids.numel() / self.seconds(one), ids.numel() / self.seconds(stages)
            found[name] = {
                "tokens_per_second": {"1": alone, str(self.size): staged},
                "bubble": 1 - staged / (self.size * alone),
            }
        return found

    def _attached(self, ranks: DataParallel | None) -> LocalModel:
        model = self.decoder(self.sizes)
        example = self.tokens(self.sizes, 1)[:, :4]
        return attach(
            model, feedback=RULE, exits=self.sizes.exits, backward="stream", example=example, data_parallel=ranks
        )

    def _exit_inputs(self, num: int, width: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        weight = torch.randn(vocab_size, width, device=self.device, generator=generator).mul_(0.02)
        target = torch.randint(vocab_size, (num,), device=self.device, generator=generator)
        hidden = 0.7 * torch.randn(num, width, device=self.device, generator=generator) + 12 * weight[target]
        return hidden.to(dtype), weight.to(dtype), target

    def _spread(
        self, hidden: Tensor, weight: Tensor, target: Tensor, rule: Any, vocab: VocabParallel
    ) -> dict[str, Any]:
        mine, part = weight[vocab.rows].clone(), vocab.shard(rule)
        run = _exit(hidden, mine, target, feedback=part, vocab_parallel=vocab)
        with _counted() as sizes:
            run()
        return {"spread_ms": 1e3 * self.seconds(run), "sent_mib": sum(sizes) / 2**20, "ranks": self.size}

    @contextmanager
    def _units(self, ids: Tensor) -> Iterator[tuple[Callable[[], object], Callable[[], object]]]:
        local = self._attached(None)
        optimizer = torch.optim.SGD(local.parameters(), lr=1e-3)

        def one() -> None:
            for part in ids.chunk(self.sizes.micro):
                local(part, labels=part, num_items=ids[:, 1:].numel())
            _finish(optimizer, local.update)

        stage = Pipeline(self._attached(None))
        own = torch.optim.SGD(stage.parameters(), lr=1e-3)

        def stages() -> None:
            stage.step_gradients(ids, ids, num_microbatches=self.sizes.micro)
            _finish(own, stage.update)

        yield one, stages

    @contextmanager
    def _one_forward_one_backward(self, ids: Tensor) -> Iterator[tuple[Callable[[], object], Callable[[], object]]]:
        sizes, micro = self.sizes, self.sizes.micro
        whole = self.decoder(sizes)
        optimizer = torch.optim.SGD(whole.parameters(), lr=1e-3)

        def one() -> None:
            for part in ids.chunk(micro):
                (_next_token_loss(whole(part), part) / micro).backward()
            _finish(optimizer)

        first, last = (sizes.blocks * place // self.size for place in (self.rank, self.rank + 1))
        part = self.decoder(sizes, first, last)
        own = torch.optim.SGD(part.parameters(), lr=1e-3)
        schedule = Schedule1F1B(
            PipelineStage(part, self.rank, self.size, self.device), n_microbatches=micro, loss_fn=_next_token_loss
        )

        def stages() -> None:
            given = (ids,) if self.rank == 0 else ()
            schedule.step(*given, **({"target": ids} if self.rank == self.size - 1 else {}))
            _finish(own)

        yield one, stages

    def _gate_data_parallel(self) -> None:
        rows = 2 * self.size
        ids = self.tokens(TINY, rows)
        grads = []
        for ranks, mine in ((None, ids), (DataParallel(), ids.chunk(self.size)[self.rank])):
            model = self.decoder(TINY, dtype=torch.float64)
            local = attach(model, feedback=RULE, backward="stream", example=ids[:1], data_parallel=ranks)
            local(mine, labels=mine)
            grads.append([p.grad for p in local.parameters()])
        _same("data parallel gradients", *grads)

    def _gate_vocab_parallel(self) -> None:
        hidden, weight, target = self._exit_inputs(32, 16, 500, torch.float64)
        vocab = VocabParallel(vocab_size=500)
        for name in ("dense", "anchors", "mirror_sampled", "transport"):
            rule = make_feedback(name, 16, 500, seed=0).to(self.device, torch.float64)
            whole = exit_step(hidden, weight, target, feedback=rule, backend="torch")
            part = exit_step(
                hidden, weight[vocab.rows].clone(), target, feedback=vocab.shard(rule), vocab_parallel=vocab
            )
            _same(f"{name} with a spread unembedding", [whole.loss, whole.feedback], [part.loss, part.feedback])

    def _gate_pipeline(self) -> None:
        ids = self.tokens(TINY, 4)
        made = [
            attach(self.decoder(TINY, dtype=torch.float64), feedback=RULE, backward="stream", example=ids[:1])
            for _ in range(2)
        ]
        alone = sum(made[0](part, labels=part, num_items=ids[:, 1:].numel()).exit_losses for part in ids.chunk(2))
        _same("losses of the pipeline", [alone], [Pipeline(made[1]).step_gradients(ids, ids, num_microbatches=2)])


def _stepper(local: LocalModel, ids: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(local.parameters(), lr=1e-3)

    def step() -> None:
        local(ids, labels=ids)
        _finish(optimizer, local.update)

    return step


def _finish(optimizer: torch.optim.Optimizer, update: Callable[[], None] = lambda: None) -> None:
    optimizer.step()
    optimizer.zero_grad()
    update()


def _exit(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Callable[[], object]:
    grad = torch.zeros(weight.shape, device=weight.device)
    return lambda: exit_step(hidden, weight, target, grad_weight=grad, **options)


def _next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _same(what: str, found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None or not torch.allclose(a, b.to(a.dtype), rtol=1e-8, atol=1e-11):
            raise RuntimeError(f"gate: {what} differ from those of one process; nothing was timed")


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Bytes that each collective inside hands over."""
    sizes: list[int] = []
    reduce, gather = dist.all_reduce, dist.all_gather

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.nbytes)
        return reduce(tensor, *args, **kwargs)

    def all_gather(parts: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.nbytes)
        return gather(parts, tensor, *args, **kwargs)

    dist.all_reduce, dist.all_gather = all_reduce, all_gather
    try:
        yield sizes
    finally:
        dist.all_reduce, dist.all_gather = reduce, gather


def run(sizes: Sizes, device: torch.device, output: Path | None, parts: Sequence[str]) -> dict[str, Any]:
    """All parts after the gate; the main rank writes and prints."""
    with joined(device, needs_group=True) as ranks:
        bench = Bench(sizes, ranks.device)
        bench.gate()
        found = {
            **environment(ranks.device, threads=torch.get_num_threads(), commit=None),
            "benchmark": "distributed",
            "ranks": ranks.size,
            "sizes": vars(sizes),
            "rule": RULE,
        }
        for part in parts:
            found[part] = getattr(bench, part)()
            if ranks.is_main:
                print(json.dumps({part: found[part]}, indent=1), flush=True)
                if output is not None:
                    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return found


PARTS = ("data_parallel", "vocab_parallel", "pipeline")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for the numbers")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to time; all by default")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes to try it with")
    options = parser.parse_args(arguments)
    return run(TINY if options.tiny else Sizes(), resolve_device(options.device), options.output, options.parts)


if __name__ == "__main__":
    main()
