"""Exits whose unembedding is spread over ranks: every rule computes what it does with the whole one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from exits.test_ranks import NUM_ROWS, VOCAB, WIDTH, problem
from helpers.ranks import run_ranks
from localexit import (
    DataParallel,
    VocabParallel,
    WeightMirror,
    exit_cross_entropy,
    exit_step,
    feedback_names,
    make_feedback,
)
from localexit.exits.vocab import ShardedError
from localexit.feedback import Error

EXACT = {"rtol": 1e-9, "atol": 1e-12}
# What changes the loss, and the rules it goes with.
LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0},
}


def rule(name: str) -> Any:
    options: dict[str, Any] = {"num_anchors": 6} if name == "anchors" else {}
    made = make_feedback(name, WIDTH, VOCAB, seed=3, **options).double()
    if isinstance(made, WeightMirror):
        made.rows.normal_(generator=torch.Generator().manual_seed(2))
    return made


def one_exit(name: str, loss: str, *, is_autograd: bool, is_sharded: bool) -> dict[str, Tensor]:
    """Everything an exit gives, of this rank's rows; in several chunks."""
    hidden, weight, target = problem()
    bias = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)
    vocab = VocabParallel(vocab_size=VOCAB) if is_sharded else None
    made, rows = rule(name), slice(None)
    if vocab is not None:
        made, rows = vocab.shard(made), vocab.rows
    weight, bias = weight[rows].clone(), bias[rows].clone()
    weights = torch.linspace(-0.5, 2, NUM_ROWS, dtype=torch.float64)
    options = {"feedback": made, "vocab_parallel": vocab, "token_weight": weights, "chunk_bytes": 10 * 8 * VOCAB}
    if is_autograd:
        leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
        value, stats = exit_cross_entropy(
            hidden, weight, target, linear_bias=bias, return_stats=True, **options, **LOSSES[loss]
        )
        (2 * value).backward()
        feedback, *grads = (leaf.grad / 2 for leaf in leaves)
    else:
        grads = [torch.zeros_like(weight), torch.zeros_like(bias)]
        options |= {"grad_weight": grads[0], "grad_bias": grads[1], "return_stats": True}
        step = exit_step(hidden, weight, target, linear_bias=bias, **options, **LOSSES[loss])
        value, feedback, stats = step.loss, step.feedback, step.stats
    made.update()
    state = made.rows if isinstance(made, WeightMirror) else torch.empty(0)
    whole = {"loss": value.detach(), "feedback": feedback, "lse": stats.lse, "log_prob": stats.log_prob}
    whole |= {"entropy": stats.entropy, "argmax": stats.argmax}
    return {**whole, "rows:weight": grads[0], "rows:bias": grads[1], "rows:state": state}


def all_exits(is_sharded: bool) -> dict[tuple[str, str, bool], dict[str, Tensor]]:
    return {
        (name, loss, is_autograd): one_exit(name, loss, is_autograd=is_autograd, is_sharded=is_sharded)
        for name in feedback_names()
        for loss in LOSSES
        for is_autograd in (False, True)
    }


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_rule(num_ranks: int) -> None:
    whole, ranks = all_exits(False), run_ranks(all_exits, num_ranks, True)
    for key, expected in whole.items():
        for name, tensor in expected.items():
            parts = [rank[key][name] for rank in ranks]
            found = [torch.cat(parts)] if name.startswith("rows:") else parts
            for part in found:
                torch.testing.assert_close(part, tensor, **EXACT, msg=lambda text, at=(key, name): f"{at}: {text}")


@contextmanager
def counted() -> Iterator[list[int]]:
    """Numbers that each collective inside is given."""
    sizes: list[int] = []
    reduce, gather = dist.all_reduce, dist.all_gather

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    def all_gather(parts: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(sum(part.numel() for part in parts))
        return gather(parts, tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", all_reduce)
        patch.setattr(dist, "all_gather", all_gather)
        yield sizes


N, D, V, R, M, K = 16, 64, 512, 16, 12, 4


def numbers_sent(name: str, options: dict[str, Any]) -> list[int]:
    """Of one exit with N tokens."""
    vocab = VocabParallel(vocab_size=V)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, D, generator=generator) for size in (N, V))
    made = vocab.shard(make_feedback(name, D, V, **options))
    with counted() as sizes:
        exit_step(hidden, weight[vocab.rows], torch.arange(N), feedback=made, vocab_parallel=vocab)
    return sizes


# For the loss: the ranks' highest logits; gold logit, sum of logits and of exponentials.
FOR_LOSS = [2 * N, 3 * N]
SENT: dict[str, tuple[dict[str, Any], list[int]]] = {
    "dense": ({"rank": R}, [N * R]),
    "sketch": ({"rank": R}, [N * R]),
    # Tail; the ranks' largest entries and their tokens; entries; head; what the chosen put into the tail.
    "hybrid": (
        {"rank": R, "rank_exact": 4, "topk": K},
        [N * 12, 2 * N * K, 2 * N * K, N * (K + 1), N * 4, N * 12],
    ),
    "parallel": ({}, [N]),
    "parallel_gold": ({"residual_rank": R}, [N, N, N * R]),
    "anchors": ({"num_anchors": M}, [N * M]),
    "mirror": ({}, [N * D]),
    "transport": ({}, [N * D]),
}


@pytest.mark.parametrize("name", SENT)
def test_what_is_sent(name: str) -> None:
    options, expected = SENT[name]
    for sizes in run_ranks(numbers_sent, 2, name, options):
        assert sizes == FOR_LOSS + expected
        assert max(sizes) < N * V
        if name not in ("mirror", "transport"):
            assert max(sizes) < N * D


def with_data_parallel() -> dict[str, Tensor]:
    """Two by two ranks: two share the batch, and each of them its unembedding with another."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocab"))
    data = DataParallel(group=mesh.get_group("data"))
    vocab = VocabParallel(vocab_size=VOCAB, group=mesh.get_group("vocab"))
    hidden, weight, target = problem()
    rows = slice(data.rank * NUM_ROWS // 2, (data.rank + 1) * NUM_ROWS // 2)
    made = vocab.shard(rule("anchors"))
    grad = torch.zeros_like(weight[vocab.rows])
    step = exit_step(
        hidden[rows],
        weight[vocab.rows],
        target[rows],
        feedback=made,
        grad_weight=grad,
        first_row=rows.start,
        data_parallel=data,
        vocab_parallel=vocab,
    )
    assert step.feedback is not None
    return {"loss": data.mean(step.loss), "feedback": step.feedback / 2, "grad": data.mean(grad)}


def test_together_with_data_parallel() -> None:
    hidden, weight, target = problem()
    grad = torch.zeros_like(weight)
    step = exit_step(hidden, weight, target, feedback=rule("anchors"), grad_weight=grad)
    ranks = run_ranks(with_data_parallel, 4)
    for rank in ranks:
        torch.testing.assert_close(rank["loss"], step.loss, **EXACT)
    torch.testing.assert_close(torch.cat([ranks[0]["feedback"], ranks[2]["feedback"]]), step.feedback, **EXACT)
    torch.testing.assert_close(torch.cat([ranks[0]["grad"], ranks[1]["grad"]]), grad, **EXACT)


def in_an_autocast_region(is_sharded: bool) -> dict[str, Tensor]:
    """The gradients of one exit in a region of bf16, of this rank's rows."""
    hidden, weight, target = (tensor.float() if tensor.is_floating_point() else tensor for tensor in problem())
    vocab = VocabParallel(vocab_size=VOCAB) if is_sharded else None
    made, rows = make_feedback("dense", WIDTH, VOCAB), slice(None)
    if vocab is not None:
        made, rows = vocab.shard(made), vocab.rows
    leaves = [hidden.requires_grad_(), weight[rows].clone().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        exit_cross_entropy(*leaves, target, feedback=made, vocab_parallel=vocab).backward()
    return {"feedback": leaves[0].grad, "rows": leaves[1].grad}


def test_autocast_decides_the_dtype_of_the_products_with_the_weight_alone() -> None:
    whole, ranks = in_an_autocast_region(False), run_ranks(in_an_autocast_region, 2, True)
    for rank in ranks:
        torch.testing.assert_close(rank["feedback"], whole["feedback"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.cat([rank["rows"] for rank in ranks]), whole["rows"], rtol=1e-5, atol=1e-7)


def views_of_an_error() -> None:
    """One rank has all columns: its view of an error in bf16, and the plain one."""
    generator = torch.Generator().manual_seed(0)
    values = (0.3 * torch.randn(6, 1001, generator=generator)).bfloat16()
    uniforms, codes = torch.rand(6, 5, generator=generator), torch.randn(1001, 3, generator=generator).bfloat16()
    gold = torch.randint(1001, (6,), generator=generator)
    known = {"values": values, "scale": torch.linspace(-1, 2, 6)}
    plain, sharded = Error(**known), ShardedError(**known, vocab=VocabParallel(vocab_size=1001))
    assert torch.equal(sharded.topk(4, gold), plain.topk(4, gold))
    for ours, theirs in zip(sharded.select(4, uniforms, gold), plain.select(4, uniforms, gold), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    torch.testing.assert_close(sharded.matmul(codes), plain.matmul(codes))


def test_a_rank_with_all_columns_sees_what_is_seen_without_ranks() -> None:
    run_ranks(views_of_an_error, 1)


def with_dtensor() -> tuple[Tensor, Tensor]:
    """Loss, and this rank's rows of dW."""
    hidden, weight, target = problem()
    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    made = VocabParallel(vocab_size=VOCAB).shard(rule("dense"))
    loss = exit_cross_entropy(hidden, sharded, target, feedback=made)
    loss.backward()
    with pytest.raises(ValueError, match="sharded by rows over a mesh of one dimension"):
        exit_cross_entropy(hidden, distribute_tensor(weight, mesh, [Shard(1)]), target, feedback=made)
    replicated = distribute_tensor(weight, mesh, [Replicate()])
    with pytest.raises(ValueError, match="grad_weight is a DTensor with placements .* distribute it with"):
        exit_step(hidden, sharded, target, feedback=made, grad_weight=torch.zeros_like(replicated))
    torch.testing.assert_close(exit_cross_entropy(hidden, replicated, target, feedback=rule("dense")), loss.detach())
    return loss.detach(), sharded.grad.to_local()


def test_a_dtensor_says_how_it_is_sharded() -> None:
    hidden, weight, target = problem()
    loss = exit_cross_entropy(hidden, weight.requires_grad_(), target, feedback=rule("dense"))
    loss.backward()
    ranks = run_ranks(with_dtensor, 2)
    torch.testing.assert_close(ranks[0][0], loss.detach(), **EXACT)
    torch.testing.assert_close(torch.cat([grad for _, grad in ranks]), weight.grad, **EXACT)


def on_a_mesh_of_two_dimensions() -> tuple[Tensor, Tensor]:
    """Loss and this rank's rows of db, the unembedding spread over two of four ranks."""
    hidden, weight, target = problem()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocab"))["vocab"]
    sharded, bias = (distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (weight, weight.sum(1)))
    made = VocabParallel(vocab_size=VOCAB, group=mesh.get_group()).shard(rule("dense"))
    loss = exit_cross_entropy(hidden, sharded, target, feedback=made, linear_bias=bias)
    loss.backward()
    with pytest.raises(ValueError, match="linear_bias is a DTensor with placements .* distribute it with"):
        whole = distribute_tensor(weight.sum(1), mesh, [Replicate()])
        exit_cross_entropy(hidden, sharded, target, feedback=made, linear_bias=whole)
    return loss.detach(), bias.grad.to_local()


def test_a_dtensor_of_some_of_the_ranks() -> None:
    hidden, weight, target = problem()
    bias = weight.sum(1).requires_grad_()
    loss = exit_cross_entropy(hidden, weight, target, feedback=rule("dense"), linear_bias=bias)
    loss.backward()
    ranks = run_ranks(on_a_mesh_of_two_dimensions, 4)
    for rank in ranks:
        torch.testing.assert_close(rank[0], loss.detach(), **EXACT)
    torch.testing.assert_close(torch.cat([ranks[0][1], ranks[1][1]]), bias.grad, **EXACT)


def refused() -> None:
    hidden, weight, target = problem()
    vocab = VocabParallel(vocab_size=VOCAB)
    made = vocab.shard(rule("dense"))
    mine = weight[vocab.rows]
    with pytest.raises(ValueError, match="pass weight\\[vocab_parallel.rows\\]"):
        exit_step(hidden, weight, target, feedback=rule("dense"), vocab_parallel=vocab)
    for option, value in (("preset", "memory"), ("backend", "triton"), ("reduction", "none")):
        with pytest.raises(ValueError, match=option):
            exit_cross_entropy(hidden, mine, target, feedback=made, vocab_parallel=vocab, **{option: value})
    with pytest.raises(ValueError, match=f"target has 1 values outside 0..{VOCAB - 1}"):
        exit_step(hidden[:1], mine, torch.tensor([VOCAB]), feedback=made, vocab_parallel=vocab)
    with pytest.raises(ValueError, match="leaves the last of 2 ranks without a row"):
        VocabParallel(vocab_size=1)


def test_what_does_not_go_together_is_refused() -> None:
    run_ranks(refused, 2)
