"""How close the feedback is to the exact gradient, and what it makes of the blocks' gradients.

    diagnosis = diagnose(local, input_ids)
    diagnosis.exits[0].gradient_cosine

Measured from outside: the exact gradient `e W` is computed next to the feedback, by the exact rule at the same exit,
and never handed to the rule. The number to trust is the cosine of the *block-parameter gradients*: a feedback whose
cosine token by token is 0.99 can train badly (see "What to trust" in docs/maths.md).
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from localexit.exits.functional import exit_step
from localexit.feedback import Feedback, SharedAnchors, WeightMirror, WeightTransport
from localexit.feedback.base import Error, Tokens
from localexit.local import LocalModel
from localexit.local.batch import IGNORE_INDEX, num_targets, shifted
from localexit.local.bodies import BlockCall
from localexit.local.exits import Exit
from localexit.local.model import check_attached
from localexit.local.steps import Step

_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True, kw_only=True)
class ExitDiagnosis:
    """Feedback f against the exact gradient g = e W at one exit; both zero count as nothing in common.

    Attributes:
        exit: its index.
        feedback_cosine: of f and g, mean over tokens.
        norm_ratio: ‖f‖ / ‖g‖ over all tokens.
        bias_ratio: ‖mean (f − g)‖ / ‖mean g‖, means over tokens.
        batch_gradient_cosine: of the gradients of the unit's blocks by f and by g, mean over batches.
        gradient_cosine: the same of the gradients summed over all batches: what noise averages out does not count.
    """

    exit: int
    feedback_cosine: float
    norm_ratio: float
    bias_ratio: float
    batch_gradient_cosine: float
    gradient_cosine: float


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What the feedback of a model's rule is worth.

    Attributes:
        exits: first exit first.
        num_tokens: how many tokens it was measured on.
        num_batches: in how many batches.
        rows_cosine: of W and the matrix A that stands in for it, for rules with f = e A: the mirror's rows, or the
            codes' expanded; None for others.
        rows_error: ‖A − W‖ / ‖W‖: how far a mirror is from W; None for others.
    """

    exits: tuple[ExitDiagnosis, ...]
    num_tokens: int
    num_batches: int
    rows_cosine: float | None
    rows_error: float | None

    def by_exit(self) -> dict[str, tuple[float, ...]]:
        """Every number of the exits by its name, first exit first."""
        names = [field_.name for field_ in fields(ExitDiagnosis) if field_.name != "exit"]
        return {name: tuple(getattr(exit_, name) for exit_ in self.exits) for name in names}

    def to_json(self) -> dict[str, Any]:
        """Every field, in types that JSON has."""
        return {**asdict(self), "exits": [asdict(exit_) for exit_ in self.exits]}


def diagnose(local: LocalModel, input_ids: Tensor, labels: Tensor | None = None, **inputs: Any) -> Diagnosis:
    """Compare the feedback of an attached model's rule with the exact gradient, on one batch.

    Nothing changes: parameters, gradients, the rule's state and draws are as before. Call it between optimiser steps.
    For several batches see `Diagnostician`.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from localexit import attach
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=12, n_layer=2, n_head=2))
    >>> diagnosis = diagnose(attach(model, feedback="transport"), torch.randint(50, (2, 8)))
    >>> [round(exit_.gradient_cosine, 3) for exit_ in diagnosis.exits]
    [1.0, 1.0]

    Args:
        local: the model, attached with backward "deferred" or "stream".
        input_ids: int64 [B, T].
        labels: int64 [B, T], see `LocalModel.forward`; the input by default.
        inputs: the model's other inputs.

    Raises:
        ValueError: the model is a control that is not local.
    """
    diagnostician = Diagnostician(local)
    diagnostician.add(input_ids, labels, **inputs)
    return diagnostician.result()


class Diagnostician:
    """Adds up batches, so that what the batches' noise hides can be told from what it does not.

    Args:
        local: the model; its parameters and the rule's state must stay as they are in between.

    Raises:
        ValueError: the model is a control that is not local.
        TypeError: `local` is not attached.
    """

    def __init__(self, local: LocalModel) -> None:
        check_attached(local)
        if local.backward_mode not in ("deferred", "stream"):
            raise ValueError(
                f"local was attached with backward={local.backward_mode!r}, where exits do not train their own units; "
                f"attach with 'deferred' or 'stream'"
            )
        local.refuse_vocab_parallel("a diagnosis")
        self._local = local
        self._exits = [_Sums(block_parameters(local, index)) for index in range(local.num_exits)]
        self._exact = _exact_rule(local)
        self._num_tokens = 0
        self._num_rows = 0
        self._num_batches = 0

    def add(self, input_ids: Tensor, labels: Tensor | None = None, **inputs: Any) -> None:
        """Measure one batch; arguments as for `diagnose`."""
        local = self._local
        target = shifted(input_ids if labels is None else labels)
        step = _DiagnosisStep(
            settings=replace(local.loss_settings, feedback=_of_this_batch(local.feedback)),
            last_exit=local.num_exits - 1,
            target=target,
            exact=self._exact,
            # Every batch has rows of its own, and with them draws and anchors of its own.
            first_row=self._num_rows,
            sums=self._exits,
        )
        with torch.enable_grad():
            local.run(step, input_ids, **inputs)
        self._num_tokens += int((target != IGNORE_INDEX).sum())
        self._num_rows += target.numel()
        self._num_batches += 1

    def result(self) -> Diagnosis:
        """Of all batches so far.

        Raises:
            ValueError: there is none.
        """
        if not self._num_batches:
            raise ValueError("batches: expected at least one, got none; call add() first")
        weight = self._local.unembedding.weight.detach()
        rows = stand_in(self._local.feedback)
        is_mirror = isinstance(self._local.feedback, WeightMirror)
        return Diagnosis(
            exits=tuple(sums.diagnosis(index) for index, sums in enumerate(self._exits)),
            num_tokens=self._num_tokens,
            num_batches=self._num_batches,
            rows_cosine=None if rows is None else cosine(rows, weight),
            rows_error=_ratio((rows - weight).norm(), weight.norm()) if rows is not None and is_mirror else None,
        )


def block_parameters(local: LocalModel, index: int) -> list[nn.Parameter]:
    """What unit `index` alone trains in its blocks; embeddings, which have no block, are left out."""
    in_blocks = {id(p) for block in local.units[index].block_indices for p in local.blocks[block].parameters()}
    return [p for p in local.units[index].parameters() if id(p) in in_blocks and p.requires_grad]


@torch.no_grad()
def stand_in(rule: Feedback) -> Tensor | None:
    """The matrix A [V, D] of a rule with f = e A whose A is its own: codes expanded, or a mirror's rows; else None."""
    if isinstance(rule, WeightMirror):
        return rule.rows.float()
    if not rule.is_additive or rule.needs_weight or rule.needs_logits or rule.num_anchors:
        return None
    device = rule.step.device
    prepared = rule.prepare(None, torch.float32)
    chunks = []
    # Row v of A is the feedback of an error that is 1 at token v.
    for ids in torch.arange(rule.vocab_size, device=device).split(_ROWS_AT_A_TIME):
        error = Error(
            values=nn.functional.one_hot(ids, rule.vocab_size).float(), scale=torch.ones(len(ids), device=device)
        )
        hidden = torch.zeros(len(ids), rule.hidden_size, device=device)
        chunks.append(rule(error, Tokens(hidden=hidden, target=ids), prepared))
    return torch.cat(chunks)


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two tensors as vectors, in fp64; 0 if one is zero."""
    a, b = a.double().flatten(), b.double().flatten()
    return _ratio(a @ b, a.norm() * b.norm())


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a / b) if float(b) > 0 else 0.0


def _of_this_batch(rule: Feedback) -> Feedback:
    """The rule as it is in a training step of this batch alone: what its exits share is kept apart from the model's."""
    if not isinstance(rule, SharedAnchors):
        return rule
    own = copy.copy(rule).train()
    own.discard()
    return own


def _exact_rule(local: LocalModel) -> WeightTransport:
    vocab_size, hidden_size = local.unembedding.weight.shape
    return WeightTransport(hidden_size, vocab_size).eval().to(local.unembedding.weight.device)


@dataclass(kw_only=True)
class _DiagnosisStep(Step):
    """Units are kept apart as in training; at each exit both gradients are carried back through the unit's blocks."""

    target: Tensor
    exact: Feedback
    first_row: int
    sums: Sequence[_Sums]
    is_training: bool = True
    router_logits: list[Tensor] = field(default_factory=list)

    def at_exit(self, exit_: Exit, call: BlockCall) -> None:
        """Measure the exit."""
        normed = self.settings.readout.normed(exit_, exit_.reads(call))
        exact = self._feedback(exit_, normed, self.exact)
        ours = self._feedback(exit_, normed, self.settings.feedback)
        is_counted = (self.target != IGNORE_INDEX).flatten()
        sums = self.sums[exit_.index]
        sums.add_tokens(ours.flatten(0, -2)[is_counted], exact.flatten(0, -2)[is_counted])
        if normed.requires_grad and sums.parameters:
            sums.add_gradients(_gradient(normed, sums.parameters, ours), _gradient(normed, sums.parameters, exact))

    def _feedback(self, exit_: Exit, normed: Tensor, rule: Feedback) -> Tensor:
        settings, readout = self.settings, self.settings.readout
        bias = readout.bias()
        result = exit_step(
            normed.detach(),
            readout.weight.detach(),
            self.target,
            feedback=rule,
            linear_bias=None if bias is None else bias.detach(),
            num_items=num_targets(self.target),
            label_smoothing=settings.label_smoothing,
            z_loss=settings.z_loss,
            softcap=readout.softcap,
            exit_index=exit_.index,
            first_row=self.first_row,
        )
        assert result.feedback is not None, "it was asked for"
        return result.feedback


def _gradient(normed: Tensor, parameters: Sequence[nn.Parameter], feedback: Tensor) -> Tensor:
    """What the unit's blocks would learn from: one vector, fp32."""
    with torch.autocast(normed.device.type, enabled=False):
        grads = torch.autograd.grad(
            normed, parameters, feedback, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    return torch.cat([grad.flatten().float() for grad in grads])


class _Sums:
    """Of one exit, over batches, in fp64 and on the device: nothing waits for it before the end."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self._num_tokens = 0
        self._cosines: list[Tensor] = []
        # Of the feedback and the exact gradient, one row each.
        self._squares: Tensor | float = 0.0
        self._totals: Tensor | float = 0.0
        self._batch_cosines: list[float] = []
        self._gradients: Tensor | float = 0.0

    def add_tokens(self, feedback: Tensor, exact: Tensor) -> None:
        """[n, D] each."""
        both = torch.stack([feedback, exact]).double()
        self._num_tokens += both.shape[1]
        self._cosines.append(nn.functional.cosine_similarity(both[0], both[1], dim=-1).sum())
        self._squares = self._squares + both.square().sum((1, 2))
        self._totals = self._totals + both.sum(1)

    def add_gradients(self, feedback: Tensor, exact: Tensor) -> None:
        """Those of the unit's blocks, one vector each."""
        self._batch_cosines.append(cosine(feedback, exact))
        self._gradients = self._gradients + torch.stack([feedback, exact]).double()

    def diagnosis(self, index: int) -> ExitDiagnosis:
        """What the sums say about exit `index`."""
        squares, totals, gradients = map(torch.as_tensor, (self._squares, self._totals, self._gradients))
        has_gradients = bool(self._batch_cosines)
        return ExitDiagnosis(
            exit=index,
            feedback_cosine=float(torch.stack(self._cosines).sum()) / max(self._num_tokens, 1),
            norm_ratio=_ratio(squares[0].sqrt(), squares[1].sqrt()),
            bias_ratio=_ratio((totals[0] - totals[1]).norm(), totals[1].norm()),
            batch_gradient_cosine=statistics.fmean(self._batch_cosines) if has_gradients else 0.0,
            gradient_cosine=cosine(gradients[0], gradients[1]) if has_gradients else 0.0,
        )
