"""Local training on several ranks: the parameters are those that one process reaches on the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from helpers.ranks import run_ranks
from local.decoders import VOCAB, WIDTH, build, gradients
from local.rules import RULES, attached
from localexit import DataParallel
from localexit.local import ExitSchedule, LocalModel, attach, compile_units
from localexit.local.sharding import clip_grad_norm_

ROWS, LENGTH = 8, 7
EVERY_EXIT = ExitSchedule()


def batches(num: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole batches; most labels of the first rows are left out, so that ranks have different numbers of them."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(num):
        ids = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
        labels = ids.clone()
        labels[: ROWS // 4, 2:] = -100
        yield ids, labels


def wrap_blocks(model: nn.Module, wrapper: str) -> None:
    (blocks,) = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    for index, block in enumerate(blocks):
        if wrapper == "fully_shard":
            fully_shard(block)
        elif wrapper == "DDP":
            blocks[index] = DistributedDataParallel(block)


def gradients_of(step: str, local: LocalModel, ids: Tensor, labels: Tensor, *, accumulate: int) -> Tensor:
    """Gradients of this rank's part of the batch, in micro-batches of which all ranks have a part; the losses."""
    ranks = local.data_parallel
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    num_items = (labels[:, 1:] != -100).sum() if accumulate > 1 else None
    total = torch.zeros(local.num_exits, dtype=torch.float64)
    for number, (some_ids, some_labels) in enumerate(zip(ids.chunk(accumulate), labels.chunk(accumulate), strict=True)):
        is_last = number == accumulate - 1
        with nullcontext() if is_last or step != "no_sync" else local.no_sync():
            output = local(some_ids.chunk(size)[rank], some_labels.chunk(size)[rank], num_items=num_items)
        if local.backward_mode == "deferred":
            output.loss.backward()
        total += output.exit_losses
    if local.backward_mode == "deferred":
        local.average_gradients()
    return total if ranks is None else ranks.mean(total)


def trained(
    name: str,
    *,
    num_steps: int,
    wrapper: str = "",
    backward: str = "stream",
    dtype: torch.dtype = torch.float64,
    accumulate: int = 1,
    step: str = "",
    is_alone: bool = False,
    decoder: str = "plain",
    schedule: ExitSchedule = EVERY_EXIT,
    exit_body: str = "norm",
    is_compiled: bool = False,
) -> dict[str, Tensor]:
    """Parameters, state and last losses after some steps; clipping included."""
    # Ranks start differently on purpose: attach() makes them equal.
    ranks = None if is_alone else DataParallel()
    model = build(decoder, seed=0 if ranks is None else ranks.rank).to(dtype)
    if wrapper:
        # What is sharded already is one model: it starts equal.
        model = build(decoder).to(dtype)
        wrap_blocks(model, wrapper)
    options = {"backward": backward, "data_parallel": ranks, "schedule": schedule, "exit_body": exit_body}
    local = attached(model, name, dtype=dtype, **options)
    if is_compiled:
        compile_units(local, backend="aot_eager")
    optimizer = torch.optim.SGD(local.parameters(), lr=0.02, momentum=0.9, foreach=False)
    losses = torch.empty(0)
    for ids, labels in batches(num_steps):
        losses = gradients_of(step, local, ids, labels, accumulate=accumulate)
        local.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        local.update()
        if wrapper == "fully_shard":
            # Nobody keeps the whole of what is spread, whether a backward came or not.
            assert all(isinstance(p, DTensor) for block in local.blocks for p in block.parameters())
    # An exit that sat the last step out has no loss.
    tensors = {"losses": losses.nan_to_num()} | dict(local.named_parameters()) | dict(local.feedback.named_buffers())
    return {key.replace("module.", ""): whole(tensor) for key, tensor in tensors.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def assert_same(ranks: list[dict[str, Tensor]], alone: dict[str, Tensor], **tolerance: float) -> None:
    for tensors in ranks:
        assert tensors.keys() == alone.keys()
        for key, expected in alone.items():
            torch.testing.assert_close(tensors[key], expected, **tolerance, msg=lambda text, key=key: f"{key}: {text}")


EXACT = {"rtol": 1e-9, "atol": 1e-12}


def on_ranks(rules: tuple[str, ...], options: dict[str, Any]) -> list[dict[str, Tensor]]:
    return [trained(name, **options) for name in rules]


def check(num_ranks: int, rules: tuple[str, ...], tolerance: dict[str, float], **options: Any) -> None:
    """Every rule with these options, on ranks and in one process."""
    by_rank = run_ranks(on_ranks, num_ranks, rules, options, timeout=240)
    alone = {key: value for key, value in options.items() if key not in ("wrapper", "is_compiled")}
    for index, name in enumerate(rules):
        expected = trained(name, is_alone=True, **alone)
        assert_same([results[index] for results in by_rank], expected, **tolerance)


def test_two_ranks_train_like_one_process() -> None:
    check(2, ("mirror_sampled", "anchors"), EXACT, num_steps=3)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "backward"), [(2, "stream"), (4, "stream"), (2, "deferred")])
def test_every_rule(num_ranks: int, backward: str) -> None:
    check(num_ranks, RULES, EXACT, num_steps=20, backward=backward)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_rule_in_single_precision(num_ranks: int) -> None:
    check(num_ranks, RULES, {"rtol": 1e-5, "atol": 1e-6}, num_steps=20, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["DDP", "fully_shard"])
@pytest.mark.parametrize("backward", ["stream", "deferred"])
def test_blocks_wrapped_one_by_one(wrapper: str, backward: str) -> None:
    check(2, ("mirror_sampled", "dense"), EXACT, num_steps=5, wrapper=wrapper, backward=backward)
    check(2, ("mirror",), EXACT, num_steps=5, wrapper=wrapper, backward=backward, accumulate=2)


# The compiler looks at the gradients of all tensors it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["", "DDP", "fully_shard"])
@pytest.mark.parametrize("backward", ["stream", "deferred"])
def test_compiled_units(wrapper: str, backward: str) -> None:
    options: dict[str, Any] = {"wrapper": wrapper, "backward": backward, "num_steps": 3, "is_compiled": True}
    check(2, ("mirror_sampled",), EXACT, **options)
    check(2, ("transport",), EXACT, schedule=ExitSchedule(exits_per_step=1), **options)


def gradients_in_and_after_no_sync() -> tuple[Tensor, Tensor]:
    ranks = DataParallel()
    local = attached(build("plain"), backward="stream", data_parallel=ranks)
    ((ids, labels),) = batches(1)
    mine = ids.chunk(ranks.size)[ranks.rank], labels.chunk(ranks.size)[ranks.rank]
    parameter = next(local.blocks[0].parameters())
    with local.no_sync():
        local(*mine)
    inside = parameter.grad.clone()
    local(*mine)
    return inside, parameter.grad


def test_no_sync_leaves_gradients_as_they_are() -> None:
    (first, first_after), (second, second_after) = run_ranks(gradients_in_and_after_no_sync, 2)
    assert not torch.allclose(first, second)
    assert torch.equal(first_after, second_after)
    torch.testing.assert_close(first_after, first + second)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["", "no_sync"])
@pytest.mark.parametrize("backward", ["stream", "deferred"])
def test_accumulation(step: str, backward: str) -> None:
    check(2, ("anchors", "transport_sampled"), EXACT, num_steps=4, backward=backward, accumulate=4, step=step)


@pytest.mark.slow
@pytest.mark.parametrize("backward", ["stream", "deferred"])
def test_exits_that_sit_out(backward: str) -> None:
    schedule = ExitSchedule(exits_per_step=1)
    check(2, ("mirror_sampled",), EXACT, num_steps=5, backward=backward, schedule=schedule)
    check(2, ("transport",), EXACT, num_steps=5, wrapper="DDP", backward=backward, schedule=schedule)


@pytest.mark.parametrize("backward", ["stream", "deferred"])
def test_exits_of_sharded_blocks_that_sit_out(backward: str) -> None:
    """No backward comes to a block whose exit sits out: it must give up its whole parameters without one."""
    options = {"wrapper": "fully_shard", "backward": backward, "num_steps": 6}
    check(2, ("mirror_sampled",), EXACT, schedule=ExitSchedule(exits_per_step=1), **options)
    check(2, ("transport",), EXACT, schedule=ExitSchedule(exits_per_step=2), accumulate=2, **options)


def seed_of_the_rule() -> int:
    ranks = DataParallel()
    return attach(build("plain").float(), feedback="anchors", seed=5 + ranks.rank, data_parallel=ranks).feedback.seed


def test_all_ranks_draw_with_the_seed_of_the_first() -> None:
    assert run_ranks(seed_of_the_rule, 2) == [5, 5]


def sharded_after_a_look() -> None:
    """Forwards without a backward: of all exits, and of the first one, which ends after its block."""
    model = build("plain")
    wrap_blocks(model, "fully_shard")
    local = attached(model)
    ((ids, labels),) = batches(1)
    for look in (lambda: local.evaluate(ids, labels), lambda: local.exit_logits(0, ids)):
        look()
        assert all(isinstance(p, DTensor) for block in local.blocks for p in block.parameters())


def test_nothing_stays_whole_after_a_forward_without_a_backward() -> None:
    run_ranks(sharded_after_a_look, 1)


def clipped_as_torch_does(max_norm: float) -> None:
    """Gradients so short that the summand in the denominator shows."""
    mesh = init_device_mesh("cpu", (1,))
    grads = [1e-6 * torch.linspace(-1, 1, 8, dtype=torch.float64), torch.full((3,), 1e-6, dtype=torch.float64)]
    plain, mixed = ([nn.Parameter(torch.zeros_like(grad)) for grad in grads] for _ in range(2))
    mixed[0] = nn.Parameter(distribute_tensor(mixed[0].detach(), mesh, [Shard(0)]))
    for parameters in (plain, mixed):
        for parameter, grad in zip(parameters, grads, strict=True):
            is_spread = isinstance(parameter, DTensor)
            parameter.grad = distribute_tensor(grad.clone(), mesh, [Shard(0)]) if is_spread else grad.clone()
    expected, norm = nn.utils.clip_grad_norm_(plain, max_norm), clip_grad_norm_(mixed, max_norm)
    torch.testing.assert_close(norm, expected)
    for parameter, ours in zip(plain, mixed, strict=True):
        torch.testing.assert_close(whole(ours.grad), parameter.grad, rtol=1e-9, atol=0)


@pytest.mark.parametrize("max_norm", [1e-6, 1.0])
def test_sharded_gradients_are_clipped_as_torch_clips_others(max_norm: float) -> None:
    run_ranks(clipped_as_torch_does, 1, max_norm)


def losses_by_draw(num_draws: int) -> Tensor:
    """The exits' losses on one batch at fixed parameters, one row for each draw of tokens: the mean over ranks."""
    ranks = DataParallel()
    schedule = ExitSchedule(token_share=0.3)
    local = attached(build("plain"), dtype=torch.float64, backward="stream", data_parallel=ranks, schedule=schedule)
    ((ids, labels),) = batches(1)
    found = []
    for _ in range(num_draws):
        found.append(gradients_of("", local, ids, labels, accumulate=1))
        local.update()
    return torch.stack(found)


@pytest.mark.slow
def test_shares_of_tokens_on_ranks_are_unbiased() -> None:
    """Ranks with very different numbers of labels, each drawing among its own tokens."""
    local = attached(build("plain"), dtype=torch.float64, backward="stream")
    ((ids, labels),) = batches(1)
    expected = local(ids, labels).exit_losses
    first, second = run_ranks(losses_by_draw, 2, 400)
    assert torch.equal(first, second)
    deviation = first.std(0) / len(first) ** 0.5
    assert (deviation > 0).all()
    assert ((first.mean(0) - expected).abs() < 4 * deviation).all()


@pytest.mark.slow
def test_a_sharded_model_of_transformers() -> None:
    check(2, ("mirror_sampled",), EXACT, num_steps=3, wrapper="fully_shard", decoder="llama")


@pytest.mark.slow
@pytest.mark.parametrize("backward", ["stream", "deferred"])
def test_exits_with_a_block_of_their_own(backward: str) -> None:
    check(2, ("mirror_sampled",), EXACT, num_steps=4, backward=backward, exit_body="block", decoder="llama")


def ddp_around(backward: str) -> dict[str, Tensor]:
    ranks = DataParallel()
    local = attached(build("plain"), "anchors", dtype=torch.float64, backward=backward, data_parallel=ranks)
    wrapped = DistributedDataParallel(local)
    for ids, labels in batches(1):
        wrapped(ids.chunk(2)[ranks.rank], labels.chunk(2)[ranks.rank]).loss.backward()
    return gradients(local)


def refused_ddp() -> None:
    with pytest.raises(ValueError, match="ranks would train apart. Pass data_parallel="):
        ddp_around("stream")


def test_one_ddp_around_a_streaming_model_is_refused() -> None:
    run_ranks(refused_ddp, 2)


@pytest.mark.slow
def test_one_ddp_around_a_deferred_model() -> None:
    local = attached(build("plain"), "anchors", dtype=torch.float64)
    for ids, labels in batches(1):
        local(ids, labels).loss.backward()
    assert_same(run_ranks(ddp_around, 2, "deferred"), gradients(local), **EXACT)


class Choosy(nn.Module):
    """A block with one matrix for even and one for odd batches: a rank's tokens reach only one of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.even, self.odd = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + (self.odd if dist.get_rank() else self.even)(hidden)


class ChoosyDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Choosy(WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def refused_sharding() -> None:
    model = ChoosyDecoder()
    fully_shard(model)
    with pytest.raises(ValueError, match="call fully_shard\\(\\) on its blocks one by one"):
        attach(model, data_parallel=DataParallel())


def test_a_model_sharded_as_a_whole_is_refused() -> None:
    run_ranks(refused_sharding, 1)


def loss_in_bf16() -> Tensor:
    """Losses after two steps under autocast, with sharded blocks."""
    ranks = DataParallel() if dist.is_initialized() else None
    model = build("plain").float()
    if ranks is not None:
        wrap_blocks(model, "fully_shard")
    local = attached(model, "mirror", backward="stream", data_parallel=ranks)
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1, foreach=False)
    losses = torch.empty(0)
    for ids, labels in batches(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = gradients_of("", local, ids, labels, accumulate=1)
        optimizer.step()
        local.update()
    return losses


@pytest.mark.slow
def test_bf16_autocast() -> None:
    alone = loss_in_bf16()
    for losses in run_ranks(loss_in_bf16, 2):
        torch.testing.assert_close(losses, alone, rtol=0.01, atol=0.0)


def gradients_of_unreached() -> dict[str, Tensor]:
    local = attach(ChoosyDecoder(), feedback="transport", backward="stream", data_parallel=DataParallel())
    for ids, labels in batches(1):
        local(ids, labels)
    return gradients(local)


def test_parameters_that_one_rank_does_not_reach() -> None:
    first, second = run_ranks(gradients_of_unreached, 2)
    assert first.keys() == second.keys() == dict(ChoosyDecoder().named_parameters(prefix="model")).keys()
    assert all(first[name].any() for name in first)
    assert_same([first], second, rtol=0, atol=0)
