"""Exits with an MLP or a block of their own: part of their unit, saved with the exits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from local.decoders import batch, build, gradients
from local.explicit import explicit_step, parts_of
from local.rules import attached, rule
from local.test_gradients import assert_same, train_step
from localexit.local import ExitSchedule, LocalModel, StepInBackward, load_exits, save_exits
from localexit.local.bodies import ExitMlp

MODES = ("deferred", "stream")


def with_bodies(*, seed: int = 0, **options: object) -> LocalModel:
    """An attached decoder whose bodies do something."""
    local = attached(build("plain"), exit_body="mlp", seed=seed, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for body in local.exit_bodies:
            body.down.weight.normal_(std=0.2, generator=generator)
    return local


def test_a_body_starts_without_effect() -> None:
    ids, _ = batch()
    plain, local = attached(build("plain")), attached(build("plain"), exit_body="mlp")
    for index in range(3):
        assert torch.equal(local.exit_logits(index, ids), plain.exit_logits(index, ids))
    changed = with_bodies()
    assert not torch.equal(changed.exit_logits(0, ids), plain.exit_logits(0, ids))
    assert torch.equal(changed.exit_logits(2, ids), plain.exit_logits(2, ids))


def test_what_goes_into_a_body_comes_out_of_its_first_matrix_at_its_own_size() -> None:
    body = ExitMlp(64, generator=torch.Generator().manual_seed(0))
    assert (body.up.weight.shape, body.down.weight.shape) == ((256, 64), (64, 256))
    assert [name for name, _ in body.named_parameters()] == ["norm.weight", "up.weight", "down.weight"]
    hidden = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    assert float(body.up(body.norm(hidden)).detach().std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exit_norm", ["shared", "none"])
def test_gradients_equal_an_explicit_loop(mode: str, exit_norm: str) -> None:
    ids, labels = batch()
    reference, local = build("plain"), with_bodies(backward=mode, exit_norm=exit_norm)
    bodies = copy.deepcopy(local.exit_bodies)
    norm = reference.norm if exit_norm == "shared" else (lambda hidden: hidden)
    norms = [*(lambda hidden, body=body: norm(body(hidden)) for body in bodies), reference.norm]
    losses = explicit_step(parts_of("plain", reference), ids, labels, rule("transport"), norms=norms)
    torch.testing.assert_close(train_step(local, mode, ids, labels), torch.stack(losses), rtol=1e-10, atol=0)
    assert_same(gradients(local.model), gradients(reference))
    assert_same(gradients(local.exit_bodies), gradients(bodies))
    assert len(gradients(bodies)) == 6


def test_a_body_belongs_to_its_unit_and_is_stepped_with_it() -> None:
    local = with_bodies(backward="stream")
    for unit, body in zip(local.units[:-1], local.exit_bodies, strict=True):
        assert {id(p) for p in body.parameters()} <= {id(p) for p in unit.parameters()}
    assert len({id(p) for p in local.parameters()}) == sum(len(unit.parameters()) for unit in local.units) + len(
        local.shared_parameters()
    )
    before = [p.clone() for p in local.exit_bodies.parameters()]
    stepper = StepInBackward(local, torch.optim.SGD(local.parameters(), lr=0.1))
    local(*batch())
    assert all(not torch.equal(p, q) for p, q in zip(local.exit_bodies.parameters(), before, strict=True))
    stepper.step()


def test_a_body_computes_with_the_tokens_that_the_exit_sees() -> None:
    local = with_bodies(backward="stream", schedule=ExitSchedule(token_share=0.5))
    seen: list[int] = []
    local.exit_bodies[0].register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[:-1].numel()))
    local(*batch())
    assert seen == [7]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exit_body", ["mlp", "block"])
def test_bodies_learn_on_a_model_that_stays_as_it_is(exit_body: str, mode: str) -> None:
    ids, labels = batch()
    model = build("llama").requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    local = attached(model, "mirror_sampled", exit_body=exit_body, backward=mode)
    local.exit_bodies.requires_grad_(True)
    optimizer = torch.optim.Adam(local.exit_bodies.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(train_step(local, mode, ids, labels))
        optimizer.step()
        optimizer.zero_grad()
        local.update()
    assert (losses[-1][:2] < losses[0][:2] - 0.3).all()
    assert losses[-1][2] == losses[0][2]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    local = attached(build("plain"), exit_body="mlp", seed=3)
    weights = [body.up.weight for body in local.exit_bodies]
    again, other = (attached(build("plain"), exit_body="mlp", seed=seed) for seed in (3, 4))
    assert all(torch.equal(w, body.up.weight) for w, body in zip(weights, again.exit_bodies, strict=True))
    assert not torch.equal(weights[0], other.exit_bodies[0].up.weight)
    assert not torch.equal(weights[0], weights[1])
    torch.set_rng_state(state)
    model = build("plain")
    state = torch.get_rng_state()
    attached(model, exit_body="mlp")
    assert torch.equal(torch.get_rng_state(), state)


def test_bodies_are_saved_with_the_exits(tmp_path: Path) -> None:
    ids, _ = batch()
    local = with_bodies()
    save_exits(local, tmp_path)
    again = load_exits(build("plain"), tmp_path)
    assert torch.equal(again.exit_logits(0, ids), local.exit_logits(0, ids))
    assert "exit_bodies.1.down.weight" in local.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_body": "attention"}, "exit_body must be one of 'norm', 'mlp', 'block', got 'attention'"),
        ({"exit_body": "mlp", "exits": [-1]}, "the last is the only exit; leave exit_body out"),
    ],
)
def test_bad_bodies(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attached(build("plain"), **options)
