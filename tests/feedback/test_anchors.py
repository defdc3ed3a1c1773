"""Eq. (10): the exact gradient projected on the span of the anchors, from forward measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers.budget import assert_close
from helpers.cases import Inputs, expected, make_inputs, run, small_rule
from helpers.direct import apply, signed_error
from localexit import make_feedback
from localexit.feedback.draws import choose_rows
from localexit.feedback.ridge import ridge_rows


def chosen(num: int, rows: int, seed: int = 3) -> Tensor:
    return choose_rows(seed, torch.tensor(0), 0, torch.ones(rows, dtype=torch.bool), num)


@pytest.mark.parametrize("num_anchors", [2, 4, 9, 20], ids=["two", "fewer_than_D", "as_many_as_D", "more_than_D"])
@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_ridge_formula(num_anchors: int, ridge: float) -> None:
    inputs = make_inputs(25, 9, 40)
    values = signed_error(inputs)
    h_m = inputs.hidden[chosen(num_anchors, 25)]
    unit = h_m.mean(0) / h_m.mean(0).norm()
    rest = h_m - torch.outer(h_m @ unit, unit)
    rows = torch.cat([rest, rest.norm() * unit[None]])
    gram = rows.T @ rows
    shifted = gram + ridge * gram.trace() / num_anchors * torch.eye(9, dtype=torch.float64)
    expected = values @ inputs.weight @ gram @ torch.linalg.inv(shifted)
    rule = small_rule("anchors", 9, 40, num_anchors=num_anchors, ridge=ridge)
    assert_close(apply(rule, values, inputs), expected, tolerance=1e-9)


@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-5])
def test_what_hidden_states_have_in_common_hides_nothing(spread: float) -> None:
    """Nearly equal hidden states: the default ridge is small against their differences, not only against themselves."""
    inputs = make_inputs(40, 9, 40)
    inputs = replace(inputs, hidden=1 + spread * inputs.hidden)
    values = signed_error(inputs)
    feedback = apply(small_rule("anchors", 9, 40, num_anchors=40), values, inputs)
    assert_close(feedback, values @ inputs.weight, tolerance=0.02)


def test_without_ridge_it_is_the_projection_of_the_exact_gradient() -> None:
    inputs = make_inputs(25, 9, 40)
    values = signed_error(inputs)
    h_m = inputs.hidden[chosen(4, 25)]
    projector = torch.linalg.pinv(h_m) @ h_m
    feedback = apply(small_rule("anchors", 9, 40, ridge=0.0), values, inputs)
    assert_close(feedback, values @ inputs.weight @ projector, tolerance=1e-9)


def test_the_own_token_alone_is_the_parallel_rule() -> None:
    """M = 1, λ → 0: eq. (8)."""
    inputs = make_inputs(1, 9, 40)
    values = signed_error(inputs)
    anchors = apply(small_rule("anchors", 9, 40, num_anchors=1, ridge=0.0), values, inputs)
    assert_close(anchors, apply(small_rule("parallel", 9, 40), values, inputs), tolerance=1e-12)


@pytest.mark.parametrize("num_anchors", [9, 20])
def test_as_many_anchors_as_the_width_are_exact(num_anchors: int) -> None:
    inputs = make_inputs(25, 9, 40)
    values = signed_error(inputs)
    rule = small_rule("anchors", 9, 40, num_anchors=num_anchors, ridge=0.0)
    assert_close(apply(rule, values, inputs), values @ inputs.weight, tolerance=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_differences_the_common_direction_is_left(dtype: torch.dtype) -> None:
    inputs = make_inputs(1, 9, 40).to(dtype)
    inputs = replace(inputs, hidden=inputs.hidden.repeat(6, 1), target=inputs.target.repeat(6))
    values = signed_error(inputs).to(dtype)
    unit = inputs.hidden[0] / inputs.hidden[0].norm()
    feedback = apply(small_rule("anchors", 9, 40), values, inputs)
    assert_close(feedback, torch.outer(values @ inputs.weight @ unit, unit), tolerance=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_common_direction_the_differences_are_left(dtype: torch.dtype) -> None:
    inputs = make_inputs(20, 9, 40).to(dtype)
    inputs = replace(inputs, hidden=torch.cat([inputs.hidden, -inputs.hidden]), target=inputs.target.repeat(2))
    values = signed_error(inputs).to(dtype)
    feedback = apply(small_rule("anchors", 9, 40, num_anchors=40), values, inputs)
    assert_close(feedback, values @ inputs.weight, tolerance=5e-3)


def with_clear_axes(rows: int = 60) -> Inputs:
    """Hidden states around a common one; their spread halves from each of nine directions to the next."""
    inputs = make_inputs(rows, 9, 40)
    sizes = 2.0 ** -torch.arange(9, dtype=torch.float64)
    rotation = torch.linalg.qr(make_inputs(9, 9, 1, seed=1).hidden).Q
    return replace(inputs, hidden=1 + inputs.hidden * sizes @ rotation)


@pytest.mark.parametrize("rank", [2, 4, 9])
def test_rank_keeps_the_principal_directions(rank: int) -> None:
    inputs = with_clear_axes()
    values = signed_error(inputs)
    mean = inputs.hidden.mean(0) / inputs.hidden.mean(0).norm()
    rest = inputs.hidden - torch.outer(inputs.hidden @ mean, mean)
    axes = torch.cat([mean[None], torch.linalg.svd(rest, full_matrices=False).Vh[:8]])[:rank]
    rule = small_rule("anchors", 9, 40, num_anchors=60, rank=rank, ridge=1e-9)
    assert_close(apply(rule, values, inputs), values @ inputs.weight @ axes.T @ axes, tolerance=0.02)


@pytest.mark.parametrize("name", ["anchors", "anchors_sampled"])
@pytest.mark.parametrize("ignored", [0, 5])
def test_rank_equals_the_oracle(name: str, ignored: int) -> None:
    inputs = make_inputs(12, 9, 40, ignored=ignored)
    rule = small_rule(name, 9, 40, num_anchors=8, rank=3)
    assert_close(run(inputs, rule).feedback, expected(inputs, rule).feedback, tolerance=1e-9)
    assert torch.linalg.matrix_rank(run(inputs, rule).feedback) == 3


def test_sampled_with_all_tokens_kept_it_is_the_whole_product() -> None:
    inputs = make_inputs(25, 9, 40)
    values = signed_error(inputs)
    sampled = small_rule("anchors_sampled", 9, 40, num_anchors=6, topk=39)
    whole = small_rule("anchors", 9, 40, num_anchors=6)
    assert_close(apply(sampled, values, inputs), apply(whole, values, inputs), tolerance=1e-12)


@pytest.mark.parametrize(("name", "num_anchors"), [("anchors", 128), ("anchors_sampled", 18)])
def test_anchors_by_default(name: str, num_anchors: int) -> None:
    """Sampled they cost little, and are enough to span everything."""
    assert make_feedback(name, 9, 40).num_anchors == num_anchors


def test_error_falls_with_the_ridge() -> None:
    inputs = make_inputs(25, 9, 40)
    values = signed_error(inputs)
    exact = values @ inputs.weight
    errors = [
        float((apply(small_rule("anchors", 9, 40, num_anchors=20, ridge=ridge), values, inputs) - exact).norm())
        for ridge in (1e-1, 1e-3, 1e-5)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_anchors_are_tokens_that_count() -> None:
    """Hidden states of ignored tokens change nothing, whatever they hold."""
    inputs = make_inputs(9, 5, 40, ignored=4)
    rule = small_rule("anchors", 5, 40, num_anchors=7)
    feedback = run(inputs, rule).feedback
    inputs.hidden[inputs.target == -100] = 1e30
    assert torch.equal(run(inputs, rule).feedback, feedback)


@pytest.mark.parametrize(("rows", "width"), [(4, 9), (9, 9), (20, 9), (1, 1)])
def test_ridge_rows_solves_the_smaller_system_of_two(rows: int, width: int) -> None:
    hidden = torch.randn(rows, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = 0.1 * hidden.square().sum() / rows
    by_rows = torch.linalg.solve(hidden @ hidden.T + shift * torch.eye(rows, dtype=torch.float64), hidden)
    by_columns = hidden @ torch.linalg.inv(hidden.T @ hidden + shift * torch.eye(width, dtype=torch.float64))
    actual = ridge_rows(hidden, torch.tensor(rows), 0.1)
    assert_close(actual, by_rows, tolerance=1e-9)
    assert_close(actual, by_columns, tolerance=1e-9)


def test_ridge_rows_leaves_out_rows_of_zero() -> None:
    hidden = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden[[1, 4]] = 0
    is_counted = hidden.any(1)
    actual = ridge_rows(hidden, torch.tensor(4), 0.1)
    assert not actual[~is_counted].any()
    assert_close(actual[is_counted], ridge_rows(hidden[is_counted], torch.tensor(4), 0.1))


def test_ridge_rows_of_nothing_is_zero() -> None:
    for ridge in (0.0, 0.1):
        assert torch.equal(ridge_rows(torch.zeros(3, 5), torch.tensor(0), ridge), torch.zeros(3, 5))
