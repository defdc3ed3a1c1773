"""Nothing is measured unless gradients are right."""

from __future__ import annotations

from torch import Tensor

from depth_parts.contenders import backprop
from depth_parts.models import Machine
from depth_parts.shapes import shape_of
from localexit import attach, feedback_names


def gate(machine: Machine) -> None:
    """Stop unless local training makes the gradients it should.

    Raises:
        SystemExit: it does not.
    """
    exact = Machine(device=machine.device, is_fast=False)
    shape = shape_of(3, 64, 211, 2, 24)
    ids = exact.ids(shape)
    whole = exact.model(shape)
    backprop(exact, whole)(ids)
    model = exact.model(shape)
    attach(model, feedback="transport", exits=[-1], backward="stream", example=ids)(ids, ids)
    for (name, parameter), reference in zip(model.named_parameters(), whole.parameters(), strict=True):
        _check(f"one exit at the top, {name}", parameter.grad, reference.grad)
    frugal = exact.model(shape)
    backprop(exact, frugal, is_frugal=True)(ids)
    for (name, parameter), reference in zip(frugal.named_parameters(), whole.parameters(), strict=True):
        _check(f"backprop without logits, {name}", parameter.grad, reference.grad)
    whole.zero_grad()
    backprop(exact, whole, at_every_block=True)(ids)
    for rule in feedback_names():
        if rule.startswith("parallel"):
            # They warn of the norm in front of the exits, which removes what they feed back.
            continue
        model = exact.model(shape)
        attach(model, feedback=rule, backward="stream", example=ids)(ids, ids)
        _check(f"{rule}, unembedding", model.unembed.weight.grad, whole.unembed.weight.grad)


def _check(what: str, found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None
    assert expected is not None
    error = float((found - expected).norm() / expected.norm())
    # fp32, or TF32 where a GPU is allowed to.
    if not error < 2e-3:
        raise SystemExit(f"{what}: gradient is off by {error:.1e}; nothing is measured")
