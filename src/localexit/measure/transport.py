"""Does a feedback rule read the unembedding on the way back? Three proofs, on any rule, weight and hidden states.

1. Null space, a black box: W' = W + A (I - P), with P the projector on the span of the hidden states, has the same
   logits, loss and dW. What does not read W gives the same feedback; `e W'` is another one.
2. Stage boundary: W is NaN while the feedback is computed, and while the rule learns. What does not read W is bitwise
   the same.
3. Source: no function of the rule takes the weight, and the rule's state does not hold it.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from localexit import _checks
from localexit.exits.chunked import PLAIN, ExitCall, Stages, run_exit
from localexit.exits.functional import exit_step
from localexit.exits.loss import LossOptions
from localexit.feedback import Feedback, WeightTransport
from localexit.feedback.draws import choose_rows, stratified_uniforms
from localexit.feedback.registry import from_spec
from localexit.measure.checks import Check

# Relative changes: of what must stay the same in fp64, and of what the exact gradient must show at least.
ROUNDING, NOTICEABLE = 1e-10, 0.1
IGNORE_INDEX = -100
WEIGHT_NAMES = frozenset({"w", "weight", "linear_weight", "shared_weight", "unembedding", "model"})


@dataclass(frozen=True, kw_only=True)
class TransportAudit:
    """What an audit for weight transport saw.

    Attributes:
        feedback: name of the rule.
        null_space_difference: relative change of the feedback between W and W', over two steps with `update()` between.
        exact_difference: the same of the exact gradient: how much there was to notice.
        forward_difference: the larger of the relative changes of loss and dW, which W' must not have.
        nan_boundary_is_bitwise: whether the feedback is bitwise the same with W filled with NaN behind the boundary.
        is_handed_weight: whether the rule's state contains the weight.
        weight_arguments: arguments of the rule's functions that are called like the weight.
    """

    feedback: str
    null_space_difference: float
    exact_difference: float
    forward_difference: float
    nan_boundary_is_bitwise: bool
    is_handed_weight: bool
    weight_arguments: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether all proofs hold: the rule is free of weight transport."""
        return all(check.passed for check in self.checks())

    def checks(self) -> tuple[Check, ...]:
        """The proofs one by one."""
        return (
            _at_most("null space: loss and dW stay", self.forward_difference, ROUNDING),
            Check(
                name="null space: the exact gradient changes",
                measured=f"{self.exact_difference:.1e}",
                expected=f"> {NOTICEABLE:g}",
                passed=self.exact_difference > NOTICEABLE,
            ),
            _at_most("null space: the feedback stays", self.null_space_difference, ROUNDING),
            _true("W is NaN behind the boundary: bitwise the same feedback", self.nan_boundary_is_bitwise),
            _true("the rule's state does not hold W", not self.is_handed_weight),
            Check(
                name="no function of the rule takes W",
                measured=", ".join(self.weight_arguments) or "none",
                expected="none",
                passed=not self.weight_arguments,
            ),
        )


def _at_most(name: str, measured: float, limit: float) -> Check:
    return Check(name=name, measured=f"{measured:.1e}", expected=f"<= {limit:g}", passed=measured <= limit)


def _true(name: str, value: bool) -> Check:
    return Check(name=name, measured="yes" if value else "no", expected="yes", passed=value)


def audit_transport(
    feedback: Feedback, weight: Tensor, hidden: Tensor, target: Tensor, *, backend: str = "auto", seed: int = 0
) -> TransportAudit:
    """Look for weight transport in a rule; in fp64, on copies: nothing given is changed.

    Args:
        feedback: the rule, in any state; its codes, draws and what it learned stay fixed.
        weight: unembedding W [V, D], D at least 2, not zero.
        hidden: hidden states [..., D]; projected on a subspace of at most D/2 dimensions.
        target: gold tokens [...], -100 on tokens to leave out; one at least must count.
        backend: of the exit in the null-space proof.
        seed: of the change of W.

    Raises:
        TypeError, ValueError: see `exit_cross_entropy`; or there is nothing to look at.
    """
    _checks.shapes(hidden, weight, target)
    _checks.feedback_fits(feedback, hidden, weight)
    _check_content(weight, target)
    unembedding = weight.detach().double().clone()
    basis = _subspace(hidden.detach().double().reshape(-1, weight.shape[1]))
    # What a rule keeps of the weight, it shall keep of the audited copy; nothing of an unfinished step.
    rule = copy.deepcopy(feedback, {id(weight): unembedding}).double().train()
    rule.discard()
    case = _Case(
        rule=rule,
        weight=unembedding,
        hidden=hidden.detach().double().reshape(-1, weight.shape[1]) @ basis.T @ basis,
        target=target.reshape(-1),
    )
    exact = replace(case, rule=WeightTransport(weight.shape[1], weight.shape[0]).to(weight.device))
    change = _outside_of(basis, unembedding, seed)
    before, exact_before = case.observe(backend), exact.observe(backend)
    unembedding += change
    after, exact_after = case.observe(backend), exact.observe(backend)
    unembedding -= change
    return TransportAudit(
        feedback=feedback.name,
        null_space_difference=_relative(after.feedback, before.feedback),
        exact_difference=_relative(exact_after.feedback, exact_before.feedback),
        forward_difference=max(_relative(after.loss, before.loss), _relative(after.weight_grad, before.weight_grad)),
        nan_boundary_is_bitwise=case.is_nan_blind(PLAIN),
        is_handed_weight=_is_handed_weight(case.rule, unembedding),
        weight_arguments=weight_arguments(type(feedback)),
    )


def weight_arguments(rule: type[Feedback]) -> tuple[str, ...]:
    """Arguments that are called like the weight, of all functions in the modules that make up a rule.

    `Feedback.state`, which hands the weight to rules that declare `needs_weight`, is the one place that may have it.
    """
    modules = {sys.modules[base.__module__] for base in rule.__mro__ if issubclass(base, Feedback)}
    found = []
    for name, function in sorted(_functions(modules)):
        taken = WEIGHT_NAMES & {parameter.lower() for parameter in inspect.signature(function).parameters}
        if function is not Feedback.state:
            found += [f"{name}({argument})" for argument in sorted(taken)]
    return tuple(found)


def _functions(modules: Any) -> Iterator[tuple[str, Any]]:
    for module in modules:
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        for value in own:
            members = vars(value).values() if inspect.isclass(value) else [value]
            for member in members:
                function = getattr(member, "__func__", member)
                if inspect.isfunction(function):
                    yield function.__qualname__, function


def _check_content(weight: Tensor, target: Tensor) -> None:
    if weight.shape[1] < 2:
        raise ValueError(f"linear_weight is [V, D]={list(weight.shape)}, but without D >= 2 there is no null space")
    if not weight.any():
        raise ValueError("linear_weight is zero: nothing could be transported; audit an initialised model")
    if not (target != IGNORE_INDEX).any():
        raise ValueError(f"target has no token that counts: all are {IGNORE_INDEX}; pass some that do")


def _subspace(hidden: Tensor) -> Tensor:
    """Orthonormal rows [r, D]: the main directions of the hidden states, at most half of all directions."""
    clean = hidden.nan_to_num(0.0, 0.0, 0.0)
    return torch.linalg.svd(clean, full_matrices=False).Vh[: max(1, hidden.shape[1] // 2)]


def _outside_of(basis: Tensor, weight: Tensor, seed: int) -> Tensor:
    """A random change of the weight, as large as the weight, that no hidden state of the subspace can see."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    change = torch.randn(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)
    change -= change @ basis.T @ basis
    return change * (weight.norm() / change.norm())


def _relative(after: Tensor, before: Tensor) -> float:
    difference = float((after - before).norm())
    return difference if difference == 0 else difference / float(before.norm().clamp_min(1e-300))


def _is_handed_weight(rule: Feedback, weight: Tensor) -> bool:
    storage = weight.untyped_storage().data_ptr()
    return any(tensor.untyped_storage().data_ptr() == storage for tensor in rule.state(weight))


@dataclass(frozen=True, kw_only=True)
class _Observed:
    """Two steps: loss [2], dW [V, D] summed, feedback [2 N, D]."""

    loss: Tensor
    weight_grad: Tensor
    feedback: Tensor


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A rule, a weight that may be changed in place, hidden states and targets; all in fp64 and flat."""

    rule: Feedback
    weight: Tensor
    hidden: Tensor
    target: Tensor

    def observe(self, backend: str) -> _Observed:
        """Two steps with `update()` in between, from the same state every time."""
        rule = self._fresh_rule()
        weight_grad = torch.zeros_like(self.weight)
        losses, feedback = [], []
        for _ in range(2):
            step = exit_step(
                self.hidden,
                self.weight,
                self.target,
                feedback=rule,
                grad_weight=weight_grad,
                backend=backend,  # type: ignore[arg-type]
            )
            assert step.feedback is not None
            losses.append(step.loss)
            feedback.append(step.feedback)
            rule.update()
        return _Observed(loss=torch.stack(losses), weight_grad=weight_grad, feedback=torch.cat(feedback))

    def is_nan_blind(self, stages: Stages) -> bool:
        """Whether two steps, with an update between, give bitwise the same when W is NaN behind the boundary."""
        return torch.equal(self._behind_boundary(stages, is_nan=True), self._behind_boundary(stages, is_nan=False))

    def _behind_boundary(self, stages: Stages, *, is_nan: bool) -> Tensor:
        rule = self._fresh_rule()

        def feedback(*arguments: Any) -> Tensor:
            with self._poisoned(is_nan):
                return stages.feedback(*arguments)

        steps = []
        for _ in range(2):
            # The forward's business: a rule that learns from forward measurements gets them here.
            exit_step(self.hidden, self.weight, self.target, feedback=rule)
            result = run_exit(self._call(rule), stages=replace(stages, feedback=feedback))
            assert result.feedback is not None
            steps.append(result.feedback)
            with self._poisoned(is_nan):
                rule.update()
        return torch.cat(steps)

    @contextmanager
    def _poisoned(self, is_nan: bool) -> Iterator[None]:
        kept = self.weight.clone()
        if is_nan:
            self.weight.fill_(torch.nan)
        yield
        self.weight.copy_(kept)

    def _fresh_rule(self) -> Feedback:
        return copy.deepcopy(self.rule, {id(self.weight): self.weight})

    def _call(self, rule: Feedback) -> ExitCall:
        is_counted = self.target != IGNORE_INDEX
        draws = (rule.seed, rule.step, 0)
        rows = torch.arange(len(self.target), device=self.target.device)
        return ExitCall(
            hidden=self.hidden,
            weight=self.weight,
            bias=None,
            target=self.target,
            row_weight=torch.ones_like(self.hidden[:, 0]),
            compute_dtype=self.hidden.dtype,
            options=LossOptions(),
            rule=from_spec(rule.spec(), rule.state(self.weight)),
            uniforms=stratified_uniforms(*draws, rows, rule.num_draws) if rule.num_draws else None,
            anchor_rows=choose_rows(*draws, is_counted, rule.num_anchors) if rule.num_anchors else None,
            need_hidden=True,
            need_weight=True,
            need_bias=False,
            need_stats=False,
            is_filtered=False,
        )
