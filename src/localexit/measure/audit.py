"""The audit of a user's model: no weight transport, and locality."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localexit.feedback import Feedback
from localexit.local import LocalModel, attach
from localexit.local.batch import shifted
from localexit.measure.checks import Check, table
from localexit.measure.locality import LocalityAudit, audit_locality
from localexit.measure.transport import TransportAudit, audit_transport


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """Both audits of one model.

    Attributes:
        transport: of the rule, at the model's last exit.
        locality: of the model's units.
    """

    transport: TransportAudit
    locality: LocalityAudit

    @property
    def passed(self) -> bool:
        """Whether both audits passed."""
        return self.transport.passed and self.locality.passed

    def checks(self) -> tuple[Check, ...]:
        """All checks, those for transport first."""
        return (*self.transport.checks(), *self.locality.checks())

    def __str__(self) -> str:
        """A plain table with a verdict."""
        verdict = "passed" if self.passed else "FAILED"
        heading = f"audit of feedback {self.transport.feedback!r} on {self.locality.num_units} units: {verdict}"
        return f"{heading}\n\n{table(self.checks())}"


def audit_model(
    model: nn.Module,
    feedback: str | Feedback = "mirror_sampled",
    *,
    input_ids: Tensor | None = None,
    labels: Tensor | None = None,
    exits: str | Iterable[int] = "every",
    exit_norm: str | nn.Module = "shared",
    backward: str = "deferred",
    seed: int = 0,
) -> AuditReport:
    """Audit local training of a model with a rule; on copies of both: neither is changed.

    Args:
        model: what `localexit.attach` takes.
        feedback: the rule, or its name.
        input_ids: int64 [B, T] to audit with; random token ids by default.
        labels: int64 [B, T]; the input by default.
        exits: which blocks have one, see `localexit.attach`.
        exit_norm: see there.
        backward: see there.
        seed: of the rule when given by name, of random token ids, dropout, and the changes an audit makes.

    Raises:
        TypeError, ValueError: see `localexit.attach`.
    """
    model, feedback, exit_norm = copy.deepcopy((model, feedback, exit_norm))
    with warnings.catch_warnings():
        # That a rule does not go well with a norm is not what an audit is about.
        warnings.filterwarnings("ignore", message="feedback 'parallel", category=UserWarning)
        local = attach(model, feedback=feedback, exits=exits, exit_norm=exit_norm, backward=backward, seed=seed)
    return _audit(local, input_ids, labels, seed=seed)


def audit_attached(
    local: LocalModel, *, input_ids: Tensor | None = None, labels: Tensor | None = None, seed: int = 0
) -> AuditReport:
    """Audit a model that is attached already, with its rule's state as it is; on a copy: it is not changed.

    Args:
        local: the attached model.
        input_ids: int64 [B, T] to audit with; random token ids by default.
        labels: int64 [B, T]; the input by default.
        seed: of random token ids, dropout, and the changes an audit makes.
    """
    local.refuse_vocab_parallel("an audit")
    copied = copy.deepcopy(local)
    # Whoever steps units in the backward steps them between audits, not in one.
    copied.in_backward = None
    return _audit(copied, input_ids, labels, seed=seed)


def _audit(local: LocalModel, input_ids: Tensor | None, labels: Tensor | None, *, seed: int) -> AuditReport:
    weight = local.unembedding.weight
    if input_ids is None:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        input_ids = torch.randint(weight.shape[0], (2, 16), generator=generator).to(weight.device)
    labels = input_ids if labels is None else labels
    hidden = _last_hidden(local, input_ids)
    _warm_up(local, input_ids, labels)
    return AuditReport(
        transport=audit_transport(local.feedback, weight, hidden.to(weight.dtype), shifted(labels), seed=seed),
        locality=audit_locality(local, input_ids, labels, seed=seed),
    )


def _warm_up(local: LocalModel, input_ids: Tensor, labels: Tensor) -> None:
    """One step of the rule's own learning: a mirror starts at zero, and feeds nothing back that could be audited."""
    local.train()
    local(input_ids, labels)
    local.update()


def _last_hidden(local: LocalModel, input_ids: Tensor) -> Tensor:
    """What the unembedding of the last exit receives: [B, T, D]."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0].detach())

    handle = local.unembedding.register_forward_pre_hook(keep)
    try:
        local.exit_logits(-1, input_ids)
    finally:
        handle.remove()
    return seen[0]
