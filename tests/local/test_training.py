"""Training calls of an attached model, and the state they build up."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import localexit
from local.decoders import VOCAB, WIDTH, PlainDecoder, batch, build, gradients
from local.rules import attached
from localexit.feedback import make_feedback
from localexit.local import LocalModel, LocalOutput, attach

MODES = ("deferred", "stream")


@pytest.mark.parametrize("mode", MODES)
def test_the_model_itself_trains_like_the_local_model(mode: str) -> None:
    ids, labels = batch()
    through_local, direct = build("llama"), build("llama")
    expected = attached(through_local, backward=mode)(input_ids=ids, labels=labels)
    attached(direct, backward=mode)
    got = direct(input_ids=ids, labels=labels)
    assert isinstance(got, LocalOutput)
    assert got.logits is None
    assert torch.equal(got.exit_losses, expected.exit_losses)
    assert not got.exit_losses.requires_grad
    torch.testing.assert_close(got.loss, got.exit_losses.sum())
    if mode == "deferred":
        (got.loss + expected.loss).backward()
    assert all(torch.equal(grad, gradients(through_local)[name]) for name, grad in gradients(direct).items())


def test_labels_given_by_position_are_noticed() -> None:
    ids, labels = batch()
    model = build("llama")
    attached(model)
    names = list(inspect.signature(model.forward).parameters)
    before = [None] * (names.index("labels") - 1)
    assert torch.equal(model(ids, *before, labels).loss, model(ids, labels=labels).loss)
    assert torch.equal(model(ids, *before, labels, num_items=4).loss, model(ids, labels=labels, num_items=4).loss)


def test_other_inputs_reach_the_model() -> None:
    ids, labels = batch()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    labels[1, :3] = -100
    own = build("llama")(ids, labels=labels, attention_mask=mask).loss
    local = attached(build("llama"))
    torch.testing.assert_close(local(ids, labels, attention_mask=mask).exit_losses[-1].float(), own)
    assert not torch.equal(local(ids, labels).exit_losses[-1].float(), own)


def test_embeddings_as_inputs() -> None:
    model = build("llama")
    local = attached(model)
    ids, labels = batch()
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(local(labels=labels, inputs_embeds=embeds).loss, local(ids, labels).loss)


def test_the_signature_stays_that_of_the_model() -> None:
    model = build("llama")
    before = inspect.signature(model.forward)
    attached(model)
    assert inspect.signature(model.forward) == before


def test_the_models_own_tail_logits_and_loss_are_not_computed_in_training() -> None:
    model = build("llama")
    local = attached(model, exits="every:2", exit_norm="none")
    ran: list[str] = []
    for name in ("lm_head", "model.norm", "model.layers.2"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    model.loss_function = lambda *_, **__: pytest.fail("the model's own loss ran")
    local(*batch())
    # The norm once, by the last exit; a hook on the last block runs like on any other.
    assert ran == ["model.norm", "model.layers.2"]


def test_backward_on_a_streamed_loss_names_the_mode() -> None:
    out = attached(build("plain"), backward="stream")(*batch())
    float(out.loss.detach())
    with pytest.raises(RuntimeError, match="attached with backward='stream'"):
        (out.loss / 2).backward()


def test_update_steps_the_feedback() -> None:
    local = attached(build("plain"), "mirror")
    rows = local.feedback.rows.clone()
    local(*batch()).loss.backward()
    local.update()
    assert int(local.feedback.step) == 1
    assert not torch.equal(local.feedback.rows, rows)


def test_a_batch_that_is_discarded_leaves_no_trace() -> None:
    ids, labels = batch()
    plain, local = (attached(build("plain"), "mirror_sampled", backward="stream") for _ in range(2))
    local(*batch(seed=3))
    local.discard()
    local.model.zero_grad()
    for each in (plain, local):
        each(ids, labels)
        each.update()
    ours, expected = gradients(local.model), gradients(plain.model)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], grad) for name, grad in expected.items())
    assert torch.equal(local.feedback.rows, plain.feedback.rows)
    assert int(local.feedback.step) == 1


@pytest.mark.parametrize("mode", MODES)
def test_what_a_model_would_collect_is_switched_off_in_training_alone(mode: str) -> None:
    """Keys and values of all blocks would keep every unit's activations."""
    local = attached(build("llama"), backward=mode)
    seen = []
    local.model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["use_cache"]), with_kwargs=True
    )
    ids, labels = batch()
    local(ids, labels)
    local(ids, labels, use_cache=True)
    local.exit_logits(0, ids)
    assert seen == [False, True, None]


def test_a_model_switched_to_training_by_itself_trains_its_mirror() -> None:
    local = attached(build("plain"), "mirror")
    rows = local.feedback.rows.clone()
    local.eval()
    local.model.train()
    local(*batch())
    local.update()
    assert not torch.equal(local.feedback.rows, rows)


@pytest.mark.parametrize("mode", MODES)
def test_losses_go_down(mode: str) -> None:
    torch.manual_seed(0)
    local = attach(PlainDecoder(3), feedback="mirror", backward=mode)
    optimizer = torch.optim.Adam(local.parameters(), lr=1e-2)
    ids, _ = batch(rows=4)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        out = local(ids, ids)
        if mode == "deferred":
            out.loss.backward()
        local.clip_grad_norm_(1.0)
        optimizer.step()
        local.update()
        losses.append(out.exit_losses)
    assert torch.all(losses[-1] < 0.5 * losses[0])


def test_clipping_is_per_unit() -> None:
    model = build("plain")
    local = attached(model)
    local(*batch()).loss.backward()
    groups = [*(unit.parameters() for unit in local.units), local.shared_parameters()]
    before = [torch.cat([p.grad.flatten() for p in group]) for group in groups]
    limit = float(before[1].norm()) * 0.99
    norms = local.clip_grad_norm_(limit)
    torch.testing.assert_close(norms, torch.stack([grad.norm() for grad in before]))
    for group, grad, norm in zip(groups, before, norms, strict=True):
        factor = min(1.0, limit / (float(norm) + 1e-6))
        torch.testing.assert_close(torch.cat([p.grad.flatten() for p in group]), factor * grad)


def test_clipping_with_frozen_groups() -> None:
    model = build("plain")
    model.blocks[1].requires_grad_(False)
    local = attached(model, backward="stream")
    local(*batch())
    norms = local.clip_grad_norm_(1.0)
    assert norms.shape == (4,)
    assert norms[1] == 0


def test_exit_weights_may_change_between_steps() -> None:
    local = attached(build("plain"))
    losses = local(*batch()).exit_losses
    local.exit_weights = (3.0, 1.0, 2.0)
    torch.testing.assert_close(local(*batch()).loss, losses @ torch.tensor([3.0, 1.0, 2.0]).double())


def test_state_dict_holds_model_norms_and_feedback() -> None:
    local = attached(build("plain"), "mirror", exit_norm="copy")
    local(*batch())
    local.update()
    keys = local.state_dict().keys()
    assert {"feedback.rows", "feedback.step", "exit_norms.0.0.weight", "model.head.weight"} <= keys
    assert {key.removeprefix("model.") for key in keys if key.startswith("model.")} == local.model.state_dict().keys()
    other = attached(build("plain", seed=9), "mirror", exit_norm="copy")
    buffer = io.BytesIO()
    torch.save(local.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(*batch()).loss, local(*batch()).loss)


def test_a_deep_copy_is_attached_to_the_copy() -> None:
    local = attached(build("plain"), backward="stream")
    copied = copy.deepcopy(local)
    assert copied.model is not local.model
    copied(*batch())
    assert all(parameter.grad is None for parameter in local.parameters())
    copied.remove()
    assert isinstance(local(*batch()), LocalOutput)


def test_rules_by_name_get_the_unembeddings_sizes_and_the_seed() -> None:
    local = attach(build("plain"), feedback="dense", seed=4)
    expected = make_feedback("dense", WIDTH, VOCAB, seed=4)
    assert torch.equal(local.feedback.codebook, expected.codebook)
    assert localexit.attach is attach


# The compiler looks at the gradients of all tensors it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", MODES)
def test_compiled_blocks_give_the_same_gradients(mode: str, backend: str) -> None:
    """Compiled with their hooks, or without (`block.forward`, which also allows fullgraph)."""
    ids, labels = batch()
    expected, model = build("plain", 2), build("plain", 2)
    for decoder in (expected, model):
        local = attached(decoder, backward=mode)
        if decoder is model:
            model.blocks[0].forward = torch.compile(model.blocks[0].forward, backend=backend, fullgraph=True)
            model.blocks[1].compile(backend=backend)
        out = local(ids, labels)
        if mode == "deferred":
            out.loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, gradients(expected)[name])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_attaching_compiles_nothing() -> None:
    """Blocks compiled for the hooks of a trace would use up the versions that the compiler allows."""
    model, counter = build("plain", 2), CompileCounter()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=counter)
    attached(model)
    assert counter.frame_count == 0
    model(batch()[0])
    assert counter.frame_count > 0


@pytest.mark.parametrize("mode", MODES)
def test_a_mirror_learns_from_micro_batches_as_from_the_whole_batch(mode: str) -> None:
    ids, labels = batch(rows=4)
    mirrors = []
    for parts in (1, 4):
        rule = make_feedback("mirror", WIDTH, VOCAB, num_pairs=6).double()
        local = attach(build("plain").double(), feedback=rule, backward=mode)
        for micro_ids, micro_labels in zip(ids.chunk(parts), labels.chunk(parts), strict=True):
            local(micro_ids, micro_labels, num_items=20)
        local.update()
        mirrors.append(rule.rows)
    assert mirrors[0].any()
    torch.testing.assert_close(mirrors[1], mirrors[0], rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_as_a_whole_after_attaching_a_deferred_model_still_trains_unit_by_unit() -> None:
    ids, labels = batch()
    expected, model = build("plain", 2), build("plain", 2)
    attached(expected)(ids, labels).loss.backward()
    attached(model)
    model.compile(backend="aot_eager")
    model(ids, labels=labels).loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, gradients(expected)[name])


WHOLE: dict[str, Callable[[LocalModel], Callable[..., object]]] = {
    "the model": lambda local: torch.compile(local.model, backend="aot_eager"),
    "the model with exits": lambda local: torch.compile(local, backend="aot_eager"),
    "a function that calls it": lambda local: torch.compile(
        lambda ids, labels: local(ids, labels).loss + 1, backend="aot_eager"
    ),
}


@pytest.mark.parametrize("backward", ["stream", "joint"])
@pytest.mark.parametrize("what", WHOLE)
def test_a_compiled_whole_is_refused_where_backwards_run_in_the_forward(what: str, backward: str) -> None:
    ids, labels = batch()
    local = attached(build("llama", 2), backward=backward)
    compiled = WHOLE[what](local)
    with pytest.raises(
        ValueError, match=rf"backward='{backward}' and compiled as a whole .* Compile the blocks one by"
    ):
        compiled(ids, labels=labels)
    assert not gradients(local.model)
    # The same object trains uncompiled, and may be evaluated compiled: not with torch 2.11, whose compiler fails on
    # hooks that were put before others.
    local(ids, labels)
    assert gradients(local.model)
    if torch.__version__ < "2.12":
        return
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(local.model.eval(), backend="eager")(ids).logits, local.model(ids).logits
        )


def test_micro_batches_draw_independently_until_the_update() -> None:
    ids, labels = batch()
    model = build("plain")
    local = attached(model, "transport_sampled", backward="stream")
    results = []
    for with_update in (False, True, False):
        model.zero_grad()
        local(ids, labels)
        results.append(torch.cat([grad.flatten() for grad in gradients(model.blocks).values()]))
        if with_update:
            local.update()
    first, second, after_update = results
    # The same tokens, other rows of the step, then another step: draws differ each time.
    assert not torch.equal(first, second)
    assert not torch.equal(first, after_update)


def test_a_forgotten_update_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localexit.feedback.base, "FORWARDS_WITHOUT_UPDATE", 3)
    ids, labels = batch()
    local = attached(build("plain"))
    local(ids, labels)
    local(ids, labels)
    local.update()
    local(ids, labels)
    local(ids, labels)
    local.discard()
    local(ids, labels)
    local(ids, labels)
    with pytest.warns(UserWarning, match=r"3 training forwards without update\(\)"):
        local(ids, labels)


@pytest.mark.parametrize("option", [{"num_items": 3}, {"loss_scale": 2.0}, {"token_weight": torch.ones(2, 7)}])
def test_options_of_training_are_refused_outside_of_it(option: dict[str, float]) -> None:
    ids, labels = batch()
    local = attached(build("llama"))
    with pytest.raises(ValueError, match=rf"{next(iter(option))} given, but this is no training forward"):
        local(ids, **option)
    local.eval()
    with pytest.raises(ValueError, match=r"no training forward"):
        local(ids, labels, **option)
