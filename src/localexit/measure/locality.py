"""Does a unit hear of another one? Two proofs from the outside, on any attached model, bit by bit.

1. Other parameters in a later unit change neither the loss nor any gradient of an earlier one.
2. Another weight of one exit's loss changes the gradients of its own unit and of no other.

What units share by design, the unembedding and a shared exit norm, is left out; see `LocalModel.shared_parameters`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from localexit.local import LocalModel, Unit
from localexit.measure.checks import Check


@dataclass(frozen=True, kw_only=True)
class LocalityAudit:
    """What an audit for locality saw.

    Attributes:
        num_units: how many units the model has.
        is_reproducible: whether the same step gives bitwise the same twice; without that nothing can be told.
        heard_parameters: pairs (i, j): unit i changed when parameters of unit j did, a later one.
        heard_losses: pairs (i, j): gradients of unit i changed when the loss of another unit j counted twice.
        deaf: units whose own gradients do not change when their own loss counts twice: they do not learn.
    """

    num_units: int
    is_reproducible: bool
    heard_parameters: tuple[tuple[int, int], ...]
    heard_losses: tuple[tuple[int, int], ...]
    deaf: tuple[int, ...]

    @property
    def passed(self) -> bool:
        """Whether every unit learns from its own loss and from nothing else."""
        return all(check.passed for check in self.checks())

    def checks(self) -> tuple[Check, ...]:
        """The proofs one by one."""
        return (
            _none("a step is bitwise reproducible", () if self.is_reproducible else ("it is not",)),
            _none("no unit hears of a later unit's parameters", _pairs(self.heard_parameters)),
            _none("no unit hears of another unit's loss", _pairs(self.heard_losses)),
            _none("every unit learns from its own loss", [f"unit {unit} does not" for unit in self.deaf]),
        )


def _none(name: str, exceptions: Sequence[str]) -> Check:
    return Check(name=name, measured=", ".join(exceptions) or "none", expected="no exception", passed=not exceptions)


def _pairs(pairs: Sequence[tuple[int, int]]) -> list[str]:
    return [f"unit {i} of unit {j}" for i, j in pairs]


@dataclass(frozen=True, kw_only=True)
class _Observed:
    """One step: every exit's loss, and every unit's gradients."""

    losses: Tensor
    gradients: tuple[tuple[Tensor | None, ...], ...]

    def same_loss(self, other: _Observed, unit: int) -> bool:
        return torch.equal(self.losses[unit], other.losses[unit])

    def same_gradients(self, other: _Observed, unit: int) -> bool:
        pairs = zip(self.gradients[unit], other.gradients[unit], strict=True)
        return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    def same(self, other: _Observed, unit: int) -> bool:
        return self.same_loss(other, unit) and self.same_gradients(other, unit)


def audit_locality(
    local: LocalModel, input_ids: Tensor, labels: Tensor, *, seed: int = 0, **inputs: Any
) -> LocalityAudit:
    """Look for communication between the units of an attached model, at fixed parameters and state.

    Parameters, gradients and options are as before afterwards. Call it between optimiser steps: what a rule has
    collected or measured in an unfinished one is forgotten.

    Args:
        local: the attached model.
        input_ids: int64 [B, T].
        labels: int64 [B, T], see `LocalModel.forward`.
        seed: of dropout, the same in every step, and of the changes of parameters.
        inputs: the model's other inputs.

    Raises:
        ValueError: labels do not fit.
    """

    def observe() -> _Observed:
        return _observe(local, seed, input_ids=input_ids, labels=labels, **inputs)

    units = range(local.num_exits)
    local.feedback.discard()
    with _restored(local):
        once, again = observe(), observe()
        heard_parameters = []
        for j in units[1:]:
            with _changed(local.units[j], seed):
                after = observe()
            heard_parameters += [(i, j) for i in units[:j] if not once.same(after, i)]
        heard_losses, deaf = [], []
        for j in units:
            with _counting_twice(local, j):
                after = observe()
            heard_losses += [(i, j) for i in units if i != j and not once.same(after, i)]
            if _can_learn(local.units[j]) and once.same_gradients(after, j):
                deaf.append(j)
    return LocalityAudit(
        num_units=local.num_exits,
        is_reproducible=all(once.same(again, i) for i in units),
        heard_parameters=tuple(heard_parameters),
        heard_losses=tuple(heard_losses),
        deaf=tuple(deaf),
    )


def _observe(local: LocalModel, seed: int, **inputs: Any) -> _Observed:
    for parameter in local.parameters():
        parameter.grad = None
    rows = local.rows_since_update
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = local(**inputs)
    # The next observation is of the same tokens of the same step, with the same draws, and measures what it needs.
    local.rows_since_update = rows
    local.feedback.discard()
    if local.backward_mode == "deferred":
        output.loss.backward()
    gradients = tuple(tuple(_copy(p.grad) for p in unit.parameters()) for unit in local.units)
    return _Observed(losses=output.exit_losses.clone(), gradients=gradients)


def _copy(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.clone()


def _can_learn(unit: Unit) -> bool:
    return any(parameter.requires_grad for parameter in unit.parameters())


@contextmanager
def _restored(local: LocalModel) -> Iterator[None]:
    """Training mode inside, no exit sits out, no unit is stepped; afterwards everything is as it was."""
    schedule, in_backward = local.schedule, local.in_backward
    local.schedule, local.in_backward = replace(schedule, exits_per_step=None), None
    modes = {module: module.training for module in local.modules()}
    grads = {parameter: parameter.grad for parameter in local.parameters()}
    local.train()
    try:
        yield
    finally:
        local.schedule, local.in_backward = schedule, in_backward
        for parameter, grad in grads.items():
            parameter.grad = grad
        for module, is_training in modes.items():
            module.training = is_training


@contextmanager
def _changed(unit: Unit, seed: int) -> Iterator[None]:
    """Noise on all parameters of a unit, a tenth of their size."""
    kept: dict[nn.Parameter, Tensor] = {parameter: parameter.detach().clone() for parameter in unit.parameters()}
    generator = torch.Generator(device="cpu").manual_seed(seed)
    with torch.no_grad():
        for parameter in kept:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise, alpha=0.1 * float(parameter.square().mean().sqrt()) + 1e-3)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in kept.items():
                parameter.copy_(values)


@contextmanager
def _counting_twice(local: LocalModel, exit_index: int) -> Iterator[None]:
    kept = local.exit_weights
    local.exit_weights = tuple(2 * weight if i == exit_index else weight for i, weight in enumerate(kept))
    try:
        yield
    finally:
        local.exit_weights = kept
