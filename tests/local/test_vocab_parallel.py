"""A model whose unembedding is spread over ranks by rows trains as one process would train it whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from helpers.ranks import run_ranks
from local.decoders import VOCAB, WIDTH, build
from local.rules import RULES, attached, rule
from local.test_data_parallel import EXACT, assert_same, batches
from localexit import DataParallel, ExitHead, Pipeline, save_exits
from localexit.local import LocalModel, attach
from localexit.measure import diagnose


def spread(model: nn.Module, mesh: DeviceMesh, how: str) -> nn.Module:
    """Unembedding by rows: "bare" tensors, by "parallelize", with the embedding too, or "tied" to it."""
    head: Any = model.head
    if how == "bare":
        for name, parameter in list(head.named_parameters()):
            setattr(head, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
        return model
    plan: dict[str, Any] = {"head": ColwiseParallel(output_layouts=Replicate())}
    if how in ("embedding", "tied"):
        plan["embed"] = RowwiseParallel(input_layouts=Replicate())
    parallelize_module(model, mesh, plan)
    if how == "tied":
        head.weight = model.embed.weight
    return model


def trained(name: str, options: dict[str, Any], mesh: DeviceMesh | None = None) -> dict[str, Tensor]:
    """Parameters and last losses after some steps, the rule's state of all rows, what every exit then predicts."""
    how, dtype = options.get("how", "parallelize"), options.get("dtype", torch.float64)
    seed = 0 if mesh is None else torch.distributed.get_rank()
    model = build("plain", is_tied=how == "tied", seed=seed).to(dtype)
    data = None
    if mesh is not None:
        vocab = mesh["vocab"] if mesh.ndim > 1 else mesh
        data = DataParallel(group=mesh.get_group("data")) if mesh.ndim > 1 else None
        spread(model, vocab, how)
    local = attached(model, name, dtype=dtype, backward=options.get("backward", "stream"), data_parallel=data)
    optimizer = torch.optim.SGD(local.parameters(), lr=0.02, momentum=0.9, foreach=False)
    accumulate = options.get("accumulate", 1)
    losses = torch.empty(0)
    for ids, labels in batches(options["num_steps"]):
        num_items = (labels[:, 1:] != -100).sum() if accumulate > 1 else None
        for some_ids, some_labels in zip(ids.chunk(accumulate), labels.chunk(accumulate), strict=True):
            rank, size = (0, 1) if data is None else (data.rank, data.size)
            output = local(some_ids.chunk(size)[rank], some_labels.chunk(size)[rank], num_items=num_items)
            if local.backward_mode == "deferred":
                output.loss.backward()
        if local.backward_mode == "deferred":
            local.average_gradients()
        losses = output.exit_losses if data is None else data.mean(output.exit_losses)
        local.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        local.update()
    return {"losses": losses, **state_of(local), **seen(local)}


def state_of(local: LocalModel) -> dict[str, Tensor]:
    vocab = local.vocab_parallel
    parts = set() if vocab is None else {id(part) for part in vocab.parts(local.feedback)}
    tensors = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in local.named_parameters()}
    for name, buffer in local.feedback.named_buffers():
        tensors[name] = buffer
        if vocab is not None and id(buffer) in parts:
            missing = vocab.largest_shard - len(buffer)
            padded = torch.cat([buffer, buffer.new_zeros(missing, *buffer.shape[1:])])
            tensors[name] = vocab.gather(padded).flatten(0, 1)[: vocab.vocab_size]
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def seen(local: LocalModel) -> dict[str, Tensor]:
    """What is computed outside of training."""
    ids, labels = next(batches(1))
    evaluation, predictions = local.evaluate(ids, labels), local.predictions(ids, labels)
    found = {"evaluated": evaluation.loss, "accuracy": evaluation.accuracy, "log_prob": predictions.log_prob}
    return {**found, "logits": local.exit_logits(0, ids)}


def on_ranks(rules: tuple[str, ...], options: dict[str, Any], shape: tuple[int, ...]) -> list[dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "vocab")[-len(shape) :])
    return [trained(name, options, mesh) for name in rules]


def check(shape: tuple[int, ...], rules: tuple[str, ...], tolerance: dict[str, float], **options: Any) -> None:
    by_rank = run_ranks(on_ranks, torch.Size(shape).numel(), rules, options, shape, timeout=240)
    for index, name in enumerate(rules):
        assert_same([results[index] for results in by_rank], trained(name, options), **tolerance)


def test_two_ranks_share_the_unembedding() -> None:
    check((2,), ("mirror_sampled", "anchors"), EXACT, num_steps=3)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "backward"), [((2,), "stream"), ((2,), "deferred"), ((2, 2), "stream")])
def test_every_rule(shape: tuple[int, ...], backward: str) -> None:
    check(shape, RULES, EXACT, num_steps=5, backward=backward)


# They cut a running sum over the vocabulary: where rounding decides, another token is chosen.
CUTTING = ("mirror_sampled", "parallel_topmass")


@pytest.mark.slow
def test_every_rule_in_single_precision() -> None:
    others = tuple(name for name in RULES if name not in CUTTING)
    check((2,), others, {"rtol": 1e-5, "atol": 1e-6}, num_steps=20, dtype=torch.float32)
    check((2,), CUTTING, {"rtol": 1e-3, "atol": 1e-3}, num_steps=20, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["bare", "embedding", "tied"])
@pytest.mark.parametrize("backward", ["stream", "deferred"])
def test_ways_of_spreading(how: str, backward: str) -> None:
    check((2,), ("mirror", "dense"), EXACT, num_steps=3, how=how, backward=backward, accumulate=2)


def refused() -> None:
    mesh = init_device_mesh("cpu", (2,))
    columns = build("plain")
    columns.head.weight = nn.Parameter(distribute_tensor(columns.head.weight.detach(), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match="head.weight is a DTensor with placements.*sharded by rows.*full_tensor"):
        attach(columns)
    with pytest.raises(ValueError, match="the unembedding's bias is whole"):
        half = spread(build("plain"), mesh, "bare")
        half.head.bias = nn.Parameter(half.head.bias.full_tensor())
        attach(half)
    with pytest.raises(ValueError, match="logits of this rank's 1[89] tokens only.*output_layouts=Replicate"):
        attach(parallelize_module(build("plain"), mesh, {"head": ColwiseParallel()}))
    local = attached(spread(build("plain"), mesh, "parallelize"), "dense", dtype=torch.float64, backward="stream")
    ids, _ = next(batches(1))
    for act in (lambda: save_exits(local, "nowhere"), lambda: Pipeline(local), lambda: diagnose(local, ids)):
        with pytest.raises(ValueError, match="is not there for an unembedding that is spread over ranks"):
            act()


def test_what_is_not_understood_is_refused() -> None:
    run_ranks(refused, 2)


def of_a_head() -> tuple[Tensor, Tensor]:
    """Loss of an `ExitHead`, and dW."""
    weight = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if torch.distributed.is_initialized():
        weight = distribute_tensor(weight, init_device_mesh("cpu", (2,)), [Shard(0)])
    head = ExitHead(WIDTH, VOCAB, feedback=rule("mirror").double(), weight=nn.Parameter(weight), bias=True)
    hidden = torch.linspace(-1, 1, 5 * WIDTH, dtype=torch.float64).view(5, WIDTH)
    loss = head(hidden, torch.arange(5))
    loss.backward()
    grad = head.weight.grad
    return loss.detach(), grad.full_tensor() if isinstance(grad, DTensor) else grad


def test_a_head_of_its_own() -> None:
    expected = of_a_head()
    for found in run_ranks(of_a_head, 2):
        torch.testing.assert_close(found, expected, **EXACT)
