"""What local training is compared with: end-to-end backprop from all exits, and direct feedback alignment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from local.decoders import DECODERS, batch, build, gradients
from local.explicit import Parts, parts_of
from local.rules import attached
from local.test_gradients import assert_same
from localexit.exits.reference import reference_exit
from localexit.local import LocalModel
from localexit.measure import audit_attached


def shifted(labels: Tensor) -> Tensor:
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1).flatten()


def hidden_states(parts: Parts, ids: Tensor) -> list[Tensor]:
    """The normed hidden after every block, in one graph."""
    hidden, extras = parts.embed(ids)
    normed = []
    for block in parts.blocks:
        hidden = parts.run(block, hidden, *extras)
        normed.append(parts.norm(hidden))
    return normed


@pytest.mark.parametrize("name", DECODERS)
def test_joint_is_backprop_of_the_summed_losses(name: str) -> None:
    ids, labels = batch()
    reference, model = build(name), build(name)
    parts = parts_of(name, reference)
    weights = (0.5, 2.0, 1.0)
    losses = [
        nn.functional.cross_entropy(parts.head(h).flatten(0, 1), shifted(labels)) for h in hidden_states(parts, ids)
    ]
    sum(weight * loss for weight, loss in zip(weights, losses, strict=True)).backward()
    output = attached(model, backward="joint", exit_weights=weights)(ids, labels)
    torch.testing.assert_close(output.exit_losses, torch.stack(losses).detach(), rtol=1e-10, atol=0)
    assert_same(gradients(model), gradients(reference))


@pytest.mark.parametrize("mode", ["joint", "direct"])
def test_a_frozen_unit_is_left_out(mode: str) -> None:
    model = build("plain")
    frozen = [model.decay, *model.embed.parameters(), *model.position.parameters(), *model.blocks[0].parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    attached(model, backward=mode, exit_norm="none")(*batch())
    assert all(parameter.grad is None for parameter in frozen)
    assert all(parameter.grad.any() for block in model.blocks[1:] for parameter in block.parameters())


@pytest.mark.parametrize("name", DECODERS)
def test_direct_sends_the_last_error_to_every_unit(name: str) -> None:
    ids, labels = batch()
    reference, model = build(name), build(name)
    local = attached(model, "dense", backward="direct")
    parts = parts_of(name, reference)
    hidden, extras = parts.embed(ids)
    normed = []
    for block in parts.blocks:
        hidden = parts.run(block, hidden, *extras)
        normed.append(parts.norm(hidden))
        hidden, extras = hidden.detach(), tuple(extra.detach() for extra in extras)
    last = reference_exit(
        normed[-1].flatten(0, 1),
        parts.head.weight,
        shifted(labels),
        feedback=local.feedback,
        linear_bias=parts.head.bias,
        num_items=int((shifted(labels) != -100).sum()),
    )
    for h in normed:
        h.backward(last.feedback.view_as(h))
    parts.head.weight.grad = last.weight_grad
    if parts.head.bias is not None:
        parts.head.bias.grad = last.bias_grad
    output = local(ids, labels)
    torch.testing.assert_close(output.exit_losses[-1], last.loss, rtol=1e-10, atol=0)
    assert_same(gradients(model), gradients(reference))


def local_by(mode: str) -> LocalModel:
    return attached(build("llama"), backward=mode)


@pytest.mark.parametrize("mode", ["joint", "direct"])
def test_all_losses_are_those_of_local_training(mode: str) -> None:
    assert torch.equal(local_by(mode)(*batch()).exit_losses, local_by("stream")(*batch()).exit_losses)


@pytest.mark.parametrize("mode", ["joint", "direct"])
def test_the_audit_of_locality_tells_the_controls(mode: str) -> None:
    """Both send every unit something of a later one; if they passed, the audit could not fail."""
    report = audit_attached(local_by(mode))
    assert report.locality.heard_parameters or report.locality.heard_losses
    assert not report.locality.passed
