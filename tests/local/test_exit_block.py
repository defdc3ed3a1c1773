"""Exits with a copy of their block: called with what the block is called with, part of the unit, with its own cache."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from helpers.ranks import run_ranks
from local.decoders import DECODERS, PlainDecoder, batch, build, gradients
from local.explicit import explicit_step, parts_of
from local.families import tiny_model, token_ids
from local.rules import attached, rule
from local.test_data_parallel import wrap_blocks
from local.test_gradients import assert_same, train_step
from localexit import DataParallel
from localexit.inference.cache import TextCache
from localexit.local import ExitSchedule, LocalModel, StepInBackward, attach, load_exits, save_exits
from localexit.local.trace import cache_argument

MODES = ("deferred", "stream")


def with_blocks(name: str = "llama", **options: object) -> LocalModel:
    """An attached decoder whose copies are no longer the blocks."""
    local = attached(build(name), exit_body="block", **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in local.exit_bodies.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.1)
    return local


def test_exits_count_the_blocks_that_are_run_for_them_alone() -> None:
    assert [exit_.num_own_blocks for exit_ in with_blocks().exits] == [1, 1, 0]


@torch.no_grad()
def explicit_logits(name: str, local: LocalModel, ids: Tensor) -> list[Tensor]:
    """Logits at every exit of a decoder with an exit on every block, the copies run by hand."""
    parts = parts_of(name, local.model)
    hidden, extras = parts.embed(ids)
    logits = []
    for index, block in enumerate(parts.blocks):
        hidden = parts.run(block, hidden, *extras)
        is_early = index < len(local.exit_bodies)
        read = parts.run(local.exit_bodies[index], hidden, *extras) if is_early else hidden
        logits.append(parts.head(parts.norm(read)))
    return logits


@pytest.mark.parametrize("name", DECODERS)
def test_a_copy_starts_as_its_block_and_reads_what_the_block_returned(name: str) -> None:
    ids, _ = batch()
    model = build(name).eval()
    local = attached(model, exit_body="block")
    blocks = parts_of(name, model).blocks
    for block, body in zip(blocks, local.exit_bodies, strict=False):
        assert all(torch.equal(p, q) for p, q in zip(block.parameters(), body.parameters(), strict=True))
        assert not {p.data_ptr() for p in block.parameters()} & {p.data_ptr() for p in body.parameters()}
    expected = explicit_logits(name, local, ids)
    for index in range(3):
        torch.testing.assert_close(local.exit_logits(index, ids), expected[index], rtol=1e-12, atol=1e-12)
    # With gradients some processors multiply in another order.
    with torch.no_grad():
        logits = model(ids)
    assert torch.equal(local.exit_logits(2, ids), getattr(logits, "logits", logits))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DECODERS)
def test_gradients_equal_an_explicit_loop(name: str, mode: str) -> None:
    ids, labels = batch()
    reference, local = build(name), with_blocks(name, backward=mode)
    bodies = copy.deepcopy(local.exit_bodies)
    losses = explicit_step(parts_of(name, reference), ids, labels, rule("transport"), bodies=list(bodies))
    torch.testing.assert_close(train_step(local, mode, ids, labels), torch.stack(losses), rtol=1e-10, atol=0)
    assert_same(gradients(local.model), gradients(reference))
    assert_same(gradients(local.exit_bodies), gradients(bodies))
    assert len(gradients(bodies)) == len(list(bodies.parameters()))


# The compiler looks at the gradients of all tensors it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_copies_give_the_same_gradients() -> None:
    ids, labels = batch()
    plain, compiled = with_blocks("plain", backward="stream"), with_blocks("plain", backward="stream")
    for block in (*compiled.blocks, *compiled.exit_bodies):
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    for local in (plain, compiled):
        local(ids, labels)
    assert_same(gradients(compiled), gradients(plain))


def test_units_of_several_blocks_copy_their_last_one() -> None:
    ids, labels = batch()
    local = attached(build("llama", 4), exit_body="block", exits="every:2", backward="stream")
    reference = build("llama", 4)
    bodies = nn.ModuleList([copy.deepcopy(reference.model.layers[1])])
    explicit_step(parts_of("llama", reference), ids, labels, rule("transport"), exits_at=(1, 3), bodies=list(bodies))
    local(ids, labels)
    assert_same(gradients(local.model), gradients(reference))
    assert_same(gradients(local.exit_bodies), gradients(bodies))


def test_masks_and_positions_reach_the_copy() -> None:
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    local = attach(tiny_model("llama"), feedback="transport", exit_body="block").eval()
    seen: list[dict[str, object]] = []
    for module in (local.blocks[0], local.exit_bodies[0]):
        module.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True)
    local.exit_logits(0, ids, attention_mask=mask)
    of_block, of_copy = seen
    assert of_block["attention_mask"] is of_copy["attention_mask"] is not None
    assert of_block["position_embeddings"] is of_copy["position_embeddings"]


def test_a_copy_belongs_to_its_unit_and_is_stepped_with_it() -> None:
    local = with_blocks(backward="stream")
    for unit, body in zip(local.units[:-1], local.exit_bodies, strict=True):
        assert {id(p) for p in body.parameters()} <= {id(p) for p in unit.parameters()}
    before = [p.clone() for p in local.exit_bodies.parameters()]
    stepper = StepInBackward(local, torch.optim.SGD(local.parameters(), lr=0.1))
    local(*batch())
    assert all(not torch.equal(p, q) for p, q in zip(local.exit_bodies.parameters(), before, strict=True))
    stepper.step()


def test_a_copy_reads_all_tokens_and_only_where_its_exit_takes_part() -> None:
    local = with_blocks(backward="stream", schedule=ExitSchedule(token_share=0.5, exits_per_step=1))
    seen: list[tuple[int, int]] = []
    for index, body in enumerate(local.exit_bodies):
        body.register_forward_pre_hook(lambda _m, args, index=index: seen.append((index, args[0].shape[1])))
    for _ in range(12):
        is_there = ~local(*batch()).exit_losses.isnan()
        assert seen == [(index, 7) for index in range(2) if is_there[index]]
        seen.clear()
        local.update()


def test_the_model_decides_whether_a_copy_trains() -> None:
    local = attached(build("gpt2"), exit_body="block").train()
    local.model.eval()
    local.exit_logits(0, batch()[0])
    assert not any(module.training for module in local.exit_bodies[0].modules())
    local.model.train()
    local.exit_logits(0, batch()[0])
    assert all(module.training for module in local.exit_bodies[0].modules())


def test_frozen_blocks_have_frozen_copies() -> None:
    model = build("llama")
    model.model.layers[0].requires_grad_(False)
    local = attached(model, exit_body="block", backward="stream")
    local(*batch())
    assert not gradients(local.exit_bodies[0])
    assert gradients(local.exit_bodies[1])


def test_copies_are_saved_with_the_exits(tmp_path: Path) -> None:
    ids, labels = batch()
    local = with_blocks(backward="stream")
    save_exits(local, tmp_path)
    again = load_exits(build("llama"), tmp_path, backward="stream")
    assert torch.equal(again.exit_logits(0, ids), local.exit_logits(0, ids))
    torch.testing.assert_close(again(ids, labels).exit_losses, local(ids, labels).exit_losses, rtol=0, atol=0)


@pytest.mark.parametrize("exits", ["every", "every:2"])
@torch.no_grad()
def test_evaluation_and_predictions_read_by_the_copies(exits: str) -> None:
    ids, labels = batch()
    local = with_blocks(exits=exits).eval()
    target = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    logits = torch.stack([local.exit_logits(index, ids) for index in range(local.num_exits)])
    losses = [nn.functional.cross_entropy(each.flatten(0, 1), target.flatten()) for each in logits]
    torch.testing.assert_close(local.evaluate(ids, labels).loss.double(), torch.stack(losses))
    assert torch.equal(local.predictions(ids, labels).token, logits.argmax(-1))


def test_a_cache_of_its_own() -> None:
    ids = torch.tensor([[5, 9, 30, 7, 11, 2]])
    local, cache = with_blocks().eval(), TextCache()
    name = str(cache_argument(local.model))
    expected = explicit_logits("llama", local, ids)[0]
    first = local.exit_logits(0, ids[:, :4], **{name: cache}, use_cache=True)
    cache.length = 4
    rest = local.exit_logits(0, ids[:, 4:], **{name: cache}, use_cache=True)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), expected, rtol=1e-12, atol=1e-12)
    assert cache.layers[0].keys.shape[2] == cache.branch(0).layers[0].keys.shape[2] == 6
    cache.truncate(3)
    assert cache.branch(0).layers[0].keys.shape[2] == 3


def test_a_cache_without_room_for_the_copy_is_refused() -> None:
    local = with_blocks().eval()
    name = str(cache_argument(local.model))
    with pytest.raises(
        ValueError, match="exit 0 has a block of its own .* DynamicCache has no place for; pass use_cache"
    ):
        local.exit_logits(0, batch()[0], **{name: DynamicCache()}, use_cache=True)
    local.exit_logits(2, batch()[0], **{name: DynamicCache()}, use_cache=True)


class Remembering(nn.Module):
    """A block that counts its calls in a dict that all blocks share: a second call is felt by the next ones."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, decay: Tensor, shared: dict[str, Tensor]) -> Tensor:
        hidden = self.block(hidden, decay) + shared.get("last", 0)
        shared["last"] = 0.1 * hidden
        return hidden


class RememberingDecoder(PlainDecoder):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Remembering(block) for block in self.blocks)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, shared = self.embed(tokens), {}
        for block in self.blocks:
            hidden = block(hidden, self.decay, shared)
        return self.head(self.norm(hidden))


class ScaledBetween(PlainDecoder):
    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(0.5 * hidden, self.decay)
        return self.head(self.norm(hidden))


def replaced_forward() -> nn.Module:
    model = build("plain")
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward: forward(*args)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (RememberingDecoder, "cannot be called once more|gives other numbers|gives other logits"),
        (ScaledBetween, "no argument of block 1 is what block 0 returned"),
        (replaced_forward, "computes with parameters of the model .* compile after attaching"),
    ],
)
def test_blocks_that_cannot_be_copied_are_refused(make: object, message: str) -> None:
    torch.manual_seed(0)
    model = make()
    attached(model).remove()
    with pytest.raises(ValueError, match=message) as error:
        attached(model, exit_body="block")
    assert "exit_body='block': " in str(error.value)
    assert "or take exit_body='mlp'" in str(error.value)


@pytest.mark.parametrize("wrapper", ["fully_shard", "DDP"])
def test_blocks_that_are_spread_or_wrapped_are_refused(wrapper: str) -> None:
    run_ranks(refused_wrapper, 1, wrapper)


def refused_wrapper(wrapper: str) -> None:
    model = build("plain")
    wrap_blocks(model, wrapper)
    with pytest.raises(ValueError, match=r"exit_body='block': blocks\.0 is sharded, or wrapped in DDP"):
        attached(model, exit_body="block", data_parallel=DataParallel())


def test_routers_with_an_auxiliary_loss_are_refused() -> None:
    with pytest.raises(ValueError, match="set config.output_router_logits=False"):
        attach(tiny_model("mixtral", output_router_logits=True), exit_body="block")
    model = tiny_model("mixtral", output_router_logits=False)
    local = attach(model, feedback="transport", exit_body="block", backward="stream")
    local(token_ids(), token_ids())
    assert gradients(local.exit_bodies)
