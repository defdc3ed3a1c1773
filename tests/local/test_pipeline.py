"""A pipeline of units over ranks: every stage ends up with the parameters that one process would have given it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.ranks import run_ranks
from local.decoders import CONTEXT, build, count_hooks
from local.rules import RULES, attached
from local.test_data_parallel import EXACT, batches
from localexit import ExitSchedule, LocalModel, Pipeline

NUM_BLOCKS = 5


def made(name: str, *, decoder: str = "plain", num_frozen: int = 0, **options: Any) -> Any:
    """`num_frozen` units, from the first on, have nothing to learn; with any, the exits' norms have neither."""
    model = build(decoder, NUM_BLOCKS)
    if num_frozen:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        model.blocks[num_frozen:].requires_grad_(True)
    return attached(model, name, dtype=torch.float64, backward="stream", **options)


def optimizer_of(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, foreach=False)


def state_of(local: LocalModel) -> dict[str, Tensor]:
    """Parameters, and the rule's state."""
    tensors = dict(local.named_parameters()) | dict(local.feedback.named_buffers())
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


def alone(name: str, num_microbatches: int, num_steps: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """One process on the same micro-batches."""
    local = made(name, **options)
    optimizer = optimizer_of(list(local.parameters()))
    losses = torch.empty(0)
    for ids, labels in batches(num_steps):
        num_items = (labels[:, 1:] != -100).sum()
        parts = zip(ids.chunk(num_microbatches), labels.chunk(num_microbatches), strict=True)
        losses = sum(local(*part, num_items=num_items).exit_losses for part in parts)  # type: ignore[assignment]
        local.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        local.update()
    return {"losses": losses, **state_of(local)}


def on_stages(
    name: str, num_microbatches: int, num_steps: int, options: dict[str, Any], group: Any = None
) -> dict[str, Tensor]:
    stage = Pipeline(made(name, **options), group=group)
    optimizer = optimizer_of(stage.parameters())
    losses = torch.empty(0)
    for ids, labels in batches(num_steps):
        losses = stage.step_gradients(ids, labels, num_microbatches=num_microbatches)
        stage.local.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        stage.update()
    local = stage.gather()
    return {"losses": losses, **state_of(local)}


def check(name: str, num_ranks: int, *, num_microbatches: int = 4, num_steps: int = 3, **options: Any) -> None:
    expected = alone(name, num_microbatches, num_steps, options)
    for tensors in run_ranks(on_stages, num_ranks, name, num_microbatches, num_steps, options):
        for key, tensor in expected.items():
            torch.testing.assert_close(
                tensors[key], tensor, **EXACT, equal_nan=True, msg=lambda text, key=key: f"{key}: {text}"
            )


def test_two_stages_train_like_one_process() -> None:
    check("mirror_sampled", 2)


@pytest.mark.parametrize("name", ["mirror_sampled", "anchors_shared"])
def test_a_stage_may_have_no_exit_that_takes_part(name: str) -> None:
    """One exit a step: it is in one of the two stages, and the units of the other pass their hidden states on."""
    check(name, 2, num_steps=4, schedule=ExitSchedule(exits_per_step=1))


@pytest.mark.parametrize(("num_ranks", "num_frozen"), [(2, 0), (3, 1), (3, 3)])
def test_all_stages_share_what_the_first_that_learns_has_measured(num_ranks: int, num_frozen: int) -> None:
    """Of five units three stages have two, two and one: the first has nothing to learn, or none of the first three."""
    check("anchors_shared", num_ranks, num_frozen=num_frozen)


def measurements(is_shared: bool) -> list[Any]:
    """In a step of two batches: whether the second uses the first one's rows, an update drops them; their norm."""
    stage = Pipeline(made("anchors_shared"), is_shared=is_shared)
    rule, found = stage.local.feedback, []
    for ids, labels in batches(2):
        stage.step_gradients(ids, labels, num_microbatches=2)
        found.append(rule.measured.rows)
    is_kept = found[0] is found[1]
    stage.update()
    return [is_kept, rule.measured is None, float(found[0].norm())]


@pytest.mark.parametrize("is_shared", [True, False])
def test_anchors_are_shared_once_a_step_where_the_unembedding_is(is_shared: bool) -> None:
    first, second = run_ranks(measurements, 2, is_shared)
    assert first[:2] == second[:2] == [True, True]
    assert (first[2] == pytest.approx(second[2], rel=1e-12)) == is_shared


def on_the_last_two_ranks() -> dict[str, Tensor]:
    group = dist.new_group([1, 2])
    return {} if dist.get_rank() == 0 else on_stages("mirror_sampled", 4, 2, {}, group)


def test_a_pipeline_of_some_of_the_ranks() -> None:
    expected = alone("mirror_sampled", 4, 2, {})
    for tensors in run_ranks(on_the_last_two_ranks, 3)[1:]:
        for key, tensor in expected.items():
            torch.testing.assert_close(tensors[key], tensor, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("exit_body", ["mlp", "block"])
def test_exits_with_bodies(exit_body: str) -> None:
    check("transport", 2, decoder="llama", exit_body=exit_body)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", RULES)
def test_every_rule(name: str, num_ranks: int) -> None:
    check(name, num_ranks, num_steps=5)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["llama", "gpt2"])
def test_models_of_transformers(decoder: str) -> None:
    check("dense", 2, decoder=decoder)
    check("anchors", 2, decoder=decoder, exits="every:2")


def number_of_parameters() -> tuple[int, int, int]:
    """Numbers that this stage holds in its blocks, freed and gathered and freed again."""
    stage = Pipeline(made("dense"))
    blocks = stage.local.blocks

    def held() -> int:
        return sum(p.numel() for block in blocks for p in block.parameters())

    freed = held()
    stage.gather()
    whole = held()
    stage.free()
    return freed, whole, held()


def test_a_stage_holds_its_own_blocks() -> None:
    first, second = run_ranks(number_of_parameters, 2)
    whole = sum(p.numel() for block in made("dense").blocks for p in block.parameters())
    assert first == (3 * whole // 5, whole, 3 * whole // 5)
    assert second == (2 * whole // 5, whole, 2 * whole // 5)


def test_a_stage_may_follow_a_single_unit() -> None:
    check("dense", 2, num_steps=2, exits="every:4")


def sent_before_a_step() -> list[int]:
    """Numbers that are broadcast in a step without a mirror; the stage holds, and has on its blocks, what it needs."""
    local = made("dense")
    num_hooks = count_hooks(local.model)
    stage = Pipeline(local)
    assert count_hooks(local.model) == num_hooks
    assert not any(p.grad is not None and p.grad.any() for p in local.parameters())
    first, last = stage.units
    own = {id(p) for unit in local.units[first : last + 1] for p in unit.parameters()}
    assert {id(p) for p in stage.parameters()} == own | {id(p) for p in local.shared_parameters()}
    sizes = []

    def broadcast(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        sizes.append(tensor.numel())
        original(tensor, *args, **kwargs)

    original = dist.broadcast
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "broadcast", broadcast)
        stage.step_gradients(*next(batches(1)), num_microbatches=2)
    return sizes


def test_what_later_stages_use_of_the_first_is_all_that_they_are_sent() -> None:
    """Of the plain decoder that is one number, which all blocks are given."""
    assert run_ranks(sent_before_a_step, 2) == [[1], [1]]


def weights_apart() -> tuple[Tensor, Tensor, Tensor]:
    """The unembedding of each stage after two steps, not shared; its feedback's step counter; the gathered one."""
    stage = Pipeline(made("dense"), is_shared=False)
    optimizer = optimizer_of(stage.parameters())
    for ids, labels in batches(2):
        stage.step_gradients(ids, labels, num_microbatches=2)
        optimizer.step()
        stage.update()
    own = stage.local.unembedding.weight.detach().clone()
    return own, stage.local.feedback.step, stage.gather().unembedding.weight.detach()


def test_stages_may_have_their_own_unembedding() -> None:
    """The model that is gathered has the last stage's."""
    (first, step, gathered), (second, _, same) = run_ranks(weights_apart, 2)
    assert int(step) == 2
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(gathered, second)
    assert torch.equal(same, second)


def test_shared_anchors_are_those_of_the_first_stage() -> None:
    check("anchors_shared", 2, num_steps=2)


def test_a_pipeline_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match="start the script with torchrun"):
        Pipeline(made("dense"))


def order_of_events() -> list[str]:
    """What the stages do, in order: a hidden is sent before its unit learns, and nothing comes back."""
    events: list[str] = []
    stage = Pipeline(made("dense"))
    send, learn = stage._send, type(stage.local.feedback).forward

    def sent(hidden: Tensor) -> None:
        events.append("send")
        send(hidden)

    def learned(*args: Any) -> Tensor:
        events.append("learn")
        return learn(*args)

    stage._send = sent  # type: ignore[method-assign]
    type(stage.local.feedback).forward = learned  # type: ignore[method-assign]
    for ids, labels in batches(1):
        stage.step_gradients(ids, labels, num_microbatches=2)
    return events


def test_a_hidden_is_sent_before_its_unit_learns() -> None:
    first, second = run_ranks(order_of_events, 2)
    assert first == ["learn", "learn", "send", "learn"] * 2
    assert second == ["learn", "send", "learn"] * 2


def refused(num_microbatches: int) -> None:
    ids = torch.zeros(4, CONTEXT, dtype=torch.int64)
    with pytest.raises(ValueError, match="num_microbatches: expected a divisor of the 4 rows, got 3"):
        Pipeline(made("dense")).step_gradients(ids, ids, num_microbatches=num_microbatches)
    with pytest.raises(ValueError, match="backward='stream', without data_parallel"):
        Pipeline(attached(build("plain"), "dense"))
    with pytest.raises(ValueError, match="a pipeline of 2 stages needs as many units, and the model has 1"):
        Pipeline(made("dense", exits=[-1]))


def test_what_does_not_fit_is_refused() -> None:
    run_ranks(refused, 2, 3)
