"""No rule but the exact baseline reads the unembedding on the way back, and the audit notices one that does."""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import localexit.feedback
from helpers.budget import assert_close
from helpers.cases import RULES, Inputs, make_inputs, run, small_rule
from localexit import Dense, ExactParallelExitHead, FactorizedExitHead, Feedback, WeightMirror, make_feedback
from localexit.exits.chunked import PLAIN
from localexit.feedback import Anchors, Error, Tokens
from localexit.measure import TransportAudit, audit_transport
from localexit.measure.transport import WEIGHT_NAMES, weight_arguments

WIDTH, VOCAB = 10, 60
WITHOUT_TRANSPORT = [name for name in RULES if not name.startswith("transport")]


def audit(rule: Feedback, inputs: Inputs | None = None, **options: Any) -> TransportAudit:
    inputs = make_inputs(12, WIDTH, VOCAB, ignored=2) if inputs is None else inputs
    return audit_transport(rule, inputs.weight, inputs.hidden, inputs.target, **options)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", WITHOUT_TRANSPORT)
def test_rules_are_free_of_weight_transport(name: str, backend: str) -> None:
    result = audit(small_rule(name, WIDTH, VOCAB), backend=backend)
    assert result.null_space_difference <= 1e-10
    assert result.forward_difference <= 1e-10
    assert result.exact_difference > 0.1
    assert result.nan_boundary_is_bitwise
    assert not result.is_handed_weight
    assert result.weight_arguments == ()
    assert result.passed


@pytest.mark.parametrize("name", ["transport", "transport_sampled"])
def test_the_exact_baseline_is_noticed_by_every_proof(name: str) -> None:
    result = audit(small_rule(name, WIDTH, VOCAB))
    assert result.null_space_difference > 0.1
    assert result.forward_difference <= 1e-10
    assert not result.nan_boundary_is_bitwise
    assert result.is_handed_weight
    assert not result.passed


@pytest.mark.parametrize("name", ["mirror", "mirror_sampled"])
def test_a_mirror_at_its_start_is_audited_with_what_it_learns(name: str) -> None:
    """Its first feedback is zero; the second, after an update, is not."""
    assert audit(make_feedback(name, WIDTH, VOCAB)).passed


@pytest.mark.parametrize("name", RULES)
def test_an_audit_changes_nothing(name: str) -> None:
    inputs, rule = make_inputs(12, WIDTH, VOCAB), small_rule(name, WIDTH, VOCAB).eval()
    weight, state = inputs.weight.clone(), copy.deepcopy(rule.state_dict())
    audit(rule, inputs)
    assert torch.equal(inputs.weight, weight)
    assert all(torch.equal(tensor, state[key]) for key, tensor in rule.state_dict().items())
    assert not rule.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_dtype_is_audited_in_fp64(dtype: torch.dtype) -> None:
    assert audit(small_rule("hybrid", WIDTH, VOCAB), make_inputs(12, WIDTH, VOCAB).to(dtype)).passed


def test_shapes_with_batch_dimensions() -> None:
    inputs = make_inputs(12, WIDTH, VOCAB)
    inputs = replace(inputs, hidden=inputs.hidden.reshape(3, 4, WIDTH), target=inputs.target.reshape(3, 4))
    assert audit(small_rule("anchors", WIDTH, VOCAB), inputs).passed


class StateOfWeight(WeightMirror):
    """A mirror that is handed the weight as its rows."""

    def state(self, weight: Tensor) -> list[Tensor]:
        return [weight.detach()]


class StateOfCopy(WeightMirror):
    """… or a copy of it, made in the forward."""

    def state(self, weight: Tensor) -> list[Tensor]:
        return [weight.detach().clone()]


class UpdateFromWeight(WeightMirror):
    """A mirror that learns by looking."""

    secret: list[Tensor]

    def update(self) -> None:
        super().update()
        self.rows.copy_(self.secret[0])


def made(mutant: type[WeightMirror]) -> Feedback:
    return mutant(WIDTH, VOCAB, num_pairs=4)


def test_a_rule_that_is_handed_the_weight_is_noticed() -> None:
    result = audit(made(StateOfWeight))
    assert result.null_space_difference > 0.1
    assert not result.nan_boundary_is_bitwise
    assert result.is_handed_weight


def test_a_rule_that_is_handed_a_copy_is_noticed_by_the_null_space() -> None:
    result = audit(made(StateOfCopy))
    assert result.null_space_difference > 0.1
    assert not result.passed


def test_a_rule_that_learns_from_the_weight_itself_is_noticed() -> None:
    inputs, rule = make_inputs(12, WIDTH, VOCAB), made(UpdateFromWeight)
    rule.secret = [inputs.weight]
    result = audit(rule, inputs)
    assert result.null_space_difference > 0.1
    assert not result.nan_boundary_is_bitwise
    assert not result.is_handed_weight


class TakesWeight(Dense):
    def forward(  # type: ignore[override]
        self, error: Error, tokens: Tokens, prepared: tuple[Tensor, ...], weight: Tensor | None = None
    ) -> Tensor:
        return super().forward(error, tokens, prepared)


def test_a_function_that_takes_the_weight_is_noticed() -> None:
    found = weight_arguments(TakesWeight)
    assert "TakesWeight.forward(weight)" in found
    assert weight_arguments(Dense) == ()


def test_bad_input() -> None:
    inputs = make_inputs(4, WIDTH, VOCAB, ignored=4)
    with pytest.raises(ValueError, match="target has no token that counts"):
        audit(small_rule("dense", WIDTH, VOCAB), inputs)
    with pytest.raises(ValueError, match="linear_weight is zero"):
        audit(small_rule("dense", WIDTH, VOCAB), replace(inputs, weight=torch.zeros_like(inputs.weight)))
    with pytest.raises(ValueError, match="D >= 2"):
        audit(small_rule("dense", 1, VOCAB), make_inputs(4, 1, VOCAB))
    with pytest.raises(ValueError, match="was made for"):
        audit(small_rule("dense", WIDTH, VOCAB + 1), inputs)


# Source


def source_functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    assert localexit.feedback.__file__ is not None
    for path in sorted(Path(localexit.feedback.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.name}:{node.name}", node


def test_no_function_of_the_feedback_room_takes_the_weight() -> None:
    having_it = [
        name
        for name, function in source_functions()
        for argument in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        if argument.arg.lower() in WEIGHT_NAMES
    ]
    assert having_it == ["base.py:state"]
    assert not any(
        function.args.kwarg
        for name, function in source_functions()
        if "make_feedback" not in name and "spec_text" not in name
    )


@pytest.mark.parametrize("view", [Error, Tokens, Anchors])
def test_what_a_rule_sees_has_no_weight(view: Any) -> None:
    assert not {field.name for field in fields(view)} & WEIGHT_NAMES


def test_the_feedback_stage_is_a_boundary_without_the_weight() -> None:
    assert list(inspect.signature(PLAIN.feedback).parameters) == ["rule", "error", "tokens", "prepared"]


@pytest.mark.parametrize("name", RULES)
def test_only_a_rule_that_declares_it_gets_the_weight(name: str) -> None:
    rule, weight = small_rule(name, WIDTH, VOCAB), torch.randn(VOCAB, WIDTH)
    holds = [
        tensor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() for tensor in rule.state(weight)
    ]
    assert any(holds) == rule.needs_weight == name.startswith("transport")


# The drop-in heads, which are not rules

HEADS: dict[str, Callable[[], torch.nn.Module]] = {
    "dense": lambda: FactorizedExitHead(WIDTH, VOCAB, mode="dense", rank=6, seed=0),
    "hybrid": lambda: FactorizedExitHead(WIDTH, VOCAB, rank=6, rank_exact=3, topk=3, seed=0),
    "parallel_only": lambda: ExactParallelExitHead(WIDTH, VOCAB, seed=0),
    "parallel_gold": lambda: ExactParallelExitHead(WIDTH, VOCAB, mode="parallel_gold", residual_rank=6, seed=0),
    "parallel_topmass": lambda: ExactParallelExitHead(WIDTH, VOCAB, mode="parallel_topmass", residual_rank=6, seed=0),
}


def head_outcome(head: torch.nn.Module, inputs: Inputs, *, is_nan: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, feedback and dW; with is_nan the weight is lost between forward and backward."""
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    logits = head.double()(hidden, weight, inputs.target)
    loss = F.cross_entropy(logits, inputs.target, label_smoothing=0.1)
    if is_nan:
        weight.data.fill_(torch.nan)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return logits.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("name", HEADS)
def test_the_null_space_of_a_drop_in_head(name: str) -> None:
    inputs = make_inputs(WIDTH // 2, WIDTH, VOCAB)
    projector = torch.linalg.pinv(inputs.hidden) @ inputs.hidden
    change = make_inputs(1, WIDTH, VOCAB, seed=8).weight
    other = replace(inputs, weight=inputs.weight + change - change @ projector)
    for one, two in zip(head_outcome(HEADS[name](), inputs), head_outcome(HEADS[name](), other), strict=True):
        assert_close(two, one)
    error = inputs.hidden @ inputs.weight.T
    assert float((error @ (other.weight - inputs.weight)).norm()) > 0.1 * float((error @ inputs.weight).norm())


@pytest.mark.parametrize("name", HEADS)
def test_a_drop_in_head_does_without_the_weight_behind_its_forward(name: str) -> None:
    inputs = make_inputs(7, WIDTH, VOCAB)
    for one, two in zip(
        head_outcome(HEADS[name](), inputs), head_outcome(HEADS[name](), inputs, is_nan=True), strict=True
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", RULES)
def test_a_joint_rotation_of_hidden_states_and_weight(name: str) -> None:
    """A test of consistency, not of transport: fixed codes do not notice, what is measured along h rotates with it."""
    inputs = make_inputs(7, WIDTH, VOCAB)
    rotation = torch.linalg.qr(make_inputs(1, WIDTH, WIDTH, seed=4).weight).Q
    rotated = replace(inputs, hidden=inputs.hidden @ rotation, weight=inputs.weight @ rotation)
    rule, other = small_rule(name, WIDTH, VOCAB).double(), small_rule(name, WIDTH, VOCAB).double()
    if name.startswith("mirror"):
        other.rows.copy_(rule.rows @ rotation)
    elif name.startswith("parallel_"):
        other.residual_base.copy_(rotation.T @ rule.residual_base)
    is_fixed = name in ("dense", "sketch", "hybrid")
    feedback = run(inputs, rule).feedback
    assert_close(run(rotated, other).feedback, feedback if is_fixed else feedback @ rotation)
