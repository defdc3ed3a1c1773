"""Gradients of an attached model equal those of an explicit loop over its blocks, in both modes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from local.decoders import DECODERS, VOCAB, WIDTH, PlainDecoder, batch, build, gradients
from local.explicit import explicit_step, parts_of
from local.rules import RULES, attached, rule

MODES = ("deferred", "stream")


def train_step(local: nn.Module, mode: str, ids: Tensor, labels: Tensor, **inputs: object) -> Tensor:
    out = local(input_ids=ids, labels=labels, **inputs)
    if mode == "deferred":
        out.loss.backward()
    return out.exit_losses


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float = 1e-9) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        scale = float(expected[name].abs().max()) + 1e-30
        torch.testing.assert_close(
            got[name], expected[name], rtol=0, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def compare(name: str, rule_name: str, mode: str, *, is_tied: bool = False, **step_options: object) -> None:
    ids, labels = batch()
    reference, model = (build(name, is_tied=is_tied) for _ in range(2))
    losses = explicit_step(parts_of(name, reference), ids, labels, rule(rule_name), **step_options)
    with_exits = {"exits": step_options["exits_at"]} if "exits_at" in step_options else {}
    with_weights = {"exit_weights": step_options["weights"]} if "weights" in step_options else {}
    local = attached(model, rule_name, backward=mode, **with_exits, **with_weights)
    got = train_step(local, mode, ids, labels)
    torch.testing.assert_close(got, torch.stack(losses), rtol=1e-10, atol=0)
    assert_same(gradients(model), gradients(reference))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule_name", RULES)
def test_every_rule_equals_the_explicit_loop(rule_name: str, mode: str) -> None:
    compare("plain", rule_name, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("rule_name", ["transport", "dense", "mirror_sampled"])
def test_every_decoder_equals_the_explicit_loop(name: str, is_tied: bool, rule_name: str, mode: str) -> None:
    compare(name, rule_name, mode, is_tied=is_tied)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DECODERS)
def test_units_of_several_blocks(name: str, mode: str) -> None:
    compare(name, "transport", mode, exits_at=(1, 2))


@pytest.mark.parametrize("mode", MODES)
def test_one_exit_at_the_top_with_transport_is_backpropagation(mode: str) -> None:
    ids, labels = batch()
    reference, model = build("plain"), build("plain")
    logits = reference(ids)
    target = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
    train_step(attached(model, exits=[-1], backward=mode), mode, ids, labels)
    assert_same(gradients(model), gradients(reference))


@pytest.mark.parametrize("mode", MODES)
def test_exit_weights_scale_each_unit_and_its_share_of_the_unembedding(mode: str) -> None:
    compare("plain", "transport", mode, weights=(0.25, 2.0, 1.0))


@pytest.mark.parametrize("mode", MODES)
def test_label_smoothing_and_z_loss_reach_the_exits(mode: str) -> None:
    ids, labels = batch()
    reference, model = build("plain"), build("plain")
    losses = explicit_step(
        parts_of("plain", reference), ids, labels, rule("transport"), label_smoothing=0.1, z_loss=0.01
    )
    local = attached(model, backward=mode, label_smoothing=0.1, z_loss=0.01)
    torch.testing.assert_close(train_step(local, mode, ids, labels), torch.stack(losses), rtol=1e-10, atol=0)
    assert_same(gradients(model), gradients(reference))


@pytest.mark.parametrize("mode", MODES)
def test_exit_norms_of_their_own(mode: str) -> None:
    ids, labels = batch()
    reference, model = build("plain"), build("plain")
    local = attached(model, backward=mode, exit_norm="copy")
    copies = [nn.LayerNorm(WIDTH).double() for _ in range(2)]
    for copied in copies:
        copied.load_state_dict(reference.norm.state_dict())
    explicit_step(parts_of("plain", reference), ids, labels, rule("transport"), norms=[*copies, reference.norm])
    train_step(local, mode, ids, labels)
    assert_same(gradients(model), gradients(reference))
    for exit_norm, copied in zip(local.exit_norms, copies, strict=True):
        assert_same(gradients(exit_norm[0]), gradients(copied))


@pytest.mark.parametrize("mode", MODES)
def test_no_exit_norm(mode: str) -> None:
    ids, labels = batch()
    reference, model = build("plain"), build("plain")
    norms = [lambda hidden: hidden, lambda hidden: hidden, reference.norm]
    explicit_step(parts_of("plain", reference), ids, labels, rule("transport"), norms=norms)
    train_step(attached(model, backward=mode, exit_norm="none"), mode, ids, labels)
    assert_same(gradients(model), gradients(reference))


@pytest.mark.parametrize("mode", MODES)
def test_a_module_as_exit_norm_serves_all_exits_but_the_last(mode: str) -> None:
    ids, labels = batch()
    reference, model = build("plain"), build("plain")
    own, copied = nn.RMSNorm(WIDTH).double(), nn.RMSNorm(WIDTH).double()
    norms = [copied, copied, reference.norm]
    explicit_step(parts_of("plain", reference), ids, labels, rule("transport"), norms=norms)
    train_step(attached(model, backward=mode, exit_norm=own), mode, ids, labels)
    assert_same(gradients(model), gradients(reference))
    assert_same(gradients(own), gradients(copied))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", ["head", "blocks.1", "blocks", "norm", "embed"])
def test_partly_frozen_models(frozen: str, mode: str) -> None:
    ids, labels = batch()
    reference, model = build("plain"), build("plain")
    for decoder in (reference, model):
        decoder.get_submodule(frozen).requires_grad_(False)
    explicit_step(parts_of("plain", reference), ids, labels, rule("transport"))
    train_step(attached(model, backward=mode), mode, ids, labels)
    assert_same(gradients(model), gradients(reference))


def test_a_frozen_unit_costs_no_feedback(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("plain")
    model.blocks[1].requires_grad_(False)
    model.norm.requires_grad_(False)
    asked: list[bool] = []
    from localexit.local import steps

    def recording(*args: object, need_feedback: bool, **keywords: object) -> object:
        asked.append(need_feedback)
        return exit_step(*args, need_feedback=need_feedback, **keywords)

    exit_step = steps.exit_step
    monkeypatch.setattr(steps, "exit_step", recording)
    train_step(attached(model, backward="stream"), "stream", *batch())
    assert asked == [True, False, True]


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_with_num_items_add_up_to_the_whole_batch(mode: str) -> None:
    ids, labels = batch(rows=4)
    labels[3, 3:] = -100
    whole, parts = build("plain"), build("plain")
    train_step(attached(whole, backward=mode), mode, ids, labels)
    count = int((labels[:, 1:] != -100).sum())
    local = attached(parts, backward=mode)
    for rows in (slice(0, 1), slice(1, 4)):
        train_step(local, mode, ids[rows], labels[rows], num_items=torch.tensor(count))
    assert_same(gradients(parts), gradients(whole))


def test_the_normaliser_of_transformers_is_taken_as_well() -> None:
    ids, labels = batch()
    model = build("llama")
    local = attached(model)
    halved = model(input_ids=ids, labels=labels, num_items_in_batch=22).loss
    torch.testing.assert_close(halved, local(input_ids=ids, labels=labels).loss / 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule_name", ["transport", "anchors", "mirror_sampled"])
def test_token_weights_move_with_the_labels(rule_name: str, mode: str) -> None:
    ids, labels = batch()
    token_weight = torch.randn(labels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    reference, model = build("plain"), build("plain")
    losses = explicit_step(parts_of("plain", reference), ids, labels, rule(rule_name), token_weight=token_weight)
    got = train_step(attached(model, rule_name, backward=mode), mode, ids, labels, token_weight=token_weight)
    torch.testing.assert_close(got, torch.stack(losses), rtol=1e-10, atol=0)
    assert_same(gradients(model), gradients(reference))


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_per_sequence_weighs_the_losses_of_the_sequences(mode: str) -> None:
    ids, labels = batch()
    rewards = torch.tensor([0.5, -2.0], dtype=torch.float64)
    weighted, apart = build("plain"), build("plain")
    token_weight = rewards[:, None].expand(labels.shape)
    train_step(attached(weighted, backward=mode), mode, ids, labels, token_weight=token_weight)
    local = attached(apart, backward=mode)
    count = int((labels[:, 1:] != -100).sum())
    expected: dict[str, Tensor] = {}
    for row, reward in enumerate(rewards.tolist()):
        train_step(local, mode, ids[row : row + 1], labels[row : row + 1], num_items=count)
        for name, grad in gradients(apart).items():
            expected[name] = expected.get(name, torch.zeros_like(grad)) + reward * grad
        apart.zero_grad()
    assert_same(gradients(weighted), expected)


def test_loss_scale_multiplies_the_gradients_and_not_the_loss() -> None:
    ids, labels = batch()
    plain, scaled = build("plain"), build("plain")
    expected = train_step(attached(plain, backward="stream"), "stream", ids, labels)
    got = train_step(attached(scaled, backward="stream"), "stream", ids, labels, loss_scale=torch.tensor(8.0))
    torch.testing.assert_close(got, expected)
    assert_same(gradients(scaled), {name: 8 * grad for name, grad in gradients(plain).items()})


@pytest.mark.parametrize("mode", MODES)
def test_a_grad_scaler_changes_no_step(mode: str) -> None:
    """The recipe of docs/dtypes.md, in fp64 where scaling by a power of two is exact."""
    ids, labels = batch()
    plain, scaled = build("plain"), build("plain")
    train_step(attached(plain, backward=mode), mode, ids, labels)
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    local, optimizer = attached(scaled, backward=mode), torch.optim.SGD(scaled.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    if mode == "stream":
        local(input_ids=ids, labels=labels, loss_scale=scaler.scale(torch.ones(())))
    else:
        scaler.scale(local(input_ids=ids, labels=labels).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 65536.0
    assert_same(dict(scaled.state_dict()), dict(plain.state_dict()), rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_targets_gives_zero(mode: str) -> None:
    model = build("plain")
    ids, labels = batch()
    losses = train_step(attached(model, backward=mode), mode, ids, torch.full_like(labels, -100))
    assert torch.equal(losses, torch.zeros(3).double())
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_grad", [False, True])
def test_stream_equals_deferred_in_lower_precision(dtype: torch.dtype, has_grad: bool) -> None:
    ids, labels = batch()
    found = {}
    for mode in MODES:
        model = build("llama", is_tied=True).to(dtype)
        local = attached(model, backward=mode)
        for _ in range(2 if has_grad else 1):
            train_step(local, mode, ids, labels)
        found[mode] = gradients(model)
    # The shared dW is rounded once per exit in one mode and once in all in the other.
    assert_same(found["stream"], found["deferred"], rtol=4 * torch.finfo(dtype).eps)


def test_stream_equals_deferred_under_autocast() -> None:
    ids, labels = batch()
    found = {}
    for mode in MODES:
        model = build("llama").float()
        local = attached(model, backward=mode)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = local(input_ids=ids, labels=labels)
        if mode == "deferred":
            out.loss.backward()
        found[mode] = gradients(model)
    assert_same(found["stream"], found["deferred"], rtol=2 * torch.finfo(torch.bfloat16).eps)


class Capped(PlainDecoder):
    """A decoder that scales and caps its logits, with a bias."""

    logit_scale = 0.5
    final_logit_softcapping = 2.0

    def forward(self, tokens: Tensor) -> Tensor:
        return 2.0 * torch.tanh(0.5 * super().forward(tokens) / 2.0)


@pytest.mark.parametrize("mode", MODES)
def test_scaled_and_capped_logits(mode: str) -> None:
    ids, labels = batch()
    torch.manual_seed(0)
    reference = Capped(3, bias=True).double()
    model = Capped(3, bias=True).double()
    model.load_state_dict(reference.state_dict())
    target = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    nn.functional.cross_entropy(reference(ids).view(-1, VOCAB), target.flatten()).backward()
    train_step(attached(model, exits=[2], backward=mode), mode, ids, labels)
    assert_same(gradients(model), gradients(reference))


class TupleBlock(nn.Module):
    """Returns a tuple, and something with a graph besides the hidden."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, decay: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.block(hidden, decay)
        return hidden, {"mean": hidden.mean()}


class TupleDecoder(PlainDecoder):
    """Blocks with tuple outputs of which the second element also flows on."""

    def __init__(self) -> None:
        super().__init__(3)
        self.blocks = nn.ModuleList(TupleBlock(block) for block in self.blocks)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        decay = self.decay + 0.0
        for block in self.blocks:
            hidden, extra = block(hidden, decay)
            decay = extra["mean"]
        return self.head(self.norm(hidden))


@pytest.mark.parametrize("mode", MODES)
def test_tuple_outputs_are_detached_as_a_whole(mode: str) -> None:
    ids, labels = batch()
    torch.manual_seed(0)
    model = TupleDecoder().double()
    train_step(attached(model, backward=mode), mode, ids, labels)
    got = gradients(model)
    model.zero_grad()
    hidden, decay = model.embed(ids) + model.position(torch.arange(ids.shape[1])), model.decay + 0.0
    target = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    for block in model.blocks:
        hidden, extra = block(hidden, decay)
        nn.functional.cross_entropy(model.head(model.norm(hidden)).flatten(0, 1), target.flatten()).backward()
        hidden, decay = hidden.detach(), extra["mean"].detach()
    assert_same(got, gradients(model))
