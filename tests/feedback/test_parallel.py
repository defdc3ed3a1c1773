"""Eq. (8) and (9): what the logits reveal along h, and a coded residual orthogonal to it."""

from __future__ import annotations

import pytest
import torch

from helpers.budget import assert_close
from helpers.cases import make_inputs, run, small_rule
from helpers.direct import apply, cross_entropy_error, signed_error
from localexit.feedback import Tokens
from localexit.feedback.parallel import nucleus, orthogonal_residual, parallel_feedback


def test_parallel_is_the_exact_gradient_along_the_hidden_state() -> None:
    inputs = make_inputs(7, 9, 40)
    values = signed_error(inputs)
    exact = values @ inputs.weight
    unit = inputs.hidden / inputs.hidden.norm(dim=1, keepdim=True)
    expected = (exact * unit).sum(1, keepdim=True) * unit
    assert_close(apply(small_rule("parallel", 9, 40), values, inputs), expected, tolerance=1e-12)


def test_a_hidden_state_of_zero_gets_nothing() -> None:
    assert not parallel_feedback(torch.zeros(2, 3), torch.ones(2)).any()
    inputs = make_inputs(5, 9, 40)
    inputs.hidden[2] = 0
    for name in ("parallel", "parallel_gold", "parallel_topmass"):
        feedback = run(inputs, small_rule(name, 9, 40)).feedback
        assert torch.isfinite(feedback).all()
        assert not small_rule(name, 9, 40).residual or feedback[2].any()


@pytest.mark.parametrize("name", ["parallel_gold", "parallel_topmass"])
def test_the_residual_is_orthogonal_to_the_hidden_state(name: str) -> None:
    inputs = make_inputs(7, 9, 40)
    values = signed_error(inputs)
    with_residual = apply(small_rule(name, 9, 40), values, inputs)
    residual = with_residual - apply(small_rule("parallel", 9, 40), values, inputs)
    assert residual.norm() > 0.01 * with_residual.norm()
    assert float((residual * inputs.hidden).sum(1).abs().max()) < 1e-12 * float(with_residual.norm())


def test_the_columns_of_the_residual_have_unit_length() -> None:
    """R(h) c for c a unit vector is a unit vector."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    base = torch.linalg.qr(torch.randn(9, 3, generator=generator, dtype=torch.float64)).Q
    for column in range(3):
        code = torch.eye(3, dtype=torch.float64)[column].expand(4, -1)
        assert torch.allclose(orthogonal_residual(hidden, code, base).norm(dim=1), torch.ones(4, dtype=torch.float64))


def tokens_with(probabilities: list[float], *, softcap: float | None = None) -> Tokens:
    logits = torch.tensor([probabilities], dtype=torch.float64).log()
    raw = logits if softcap is None else softcap * torch.atanh(logits / softcap)
    return Tokens(
        hidden=torch.ones(1, 1),
        target=torch.tensor([0]),
        logits=raw,
        log_normaliser=torch.zeros(1, dtype=torch.float64),
        softcap=softcap,
    )


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("threshold", "expected"), [(0.3, [1]), (0.45, [1, 3]), (0.8, [1, 3, 0]), (1.0, [1, 3, 0, 2])])
def test_the_nucleus_includes_the_token_that_crosses_the_threshold(
    threshold: float, expected: list[int], softcap: float | None
) -> None:
    ids, is_inside, is_cut = nucleus(tokens_with([0.2, 0.4, 0.1, 0.3], softcap=softcap), threshold, 4)
    assert ids[is_inside].tolist() == expected
    assert not is_cut.any()


def test_a_nucleus_that_does_not_fit_is_cut_and_says_so() -> None:
    ids, is_inside, is_cut = nucleus(tokens_with([0.2, 0.4, 0.1, 0.3]), 0.8, 2)
    assert ids[is_inside].tolist() == [1, 3]
    assert is_cut.all()
    inputs = make_inputs(7, 9, 40)
    with pytest.warns(UserWarning, match="nucleus_cap=2 and was cut"):
        run(inputs, small_rule("parallel_topmass", 9, 40, nucleus_cap=2))


def test_a_cut_nucleus_of_ignored_tokens_is_not_reported() -> None:
    inputs = make_inputs(7, 9, 40, ignored=7)
    run(inputs, small_rule("parallel_topmass", 9, 40, nucleus_cap=2))


def test_topmass_is_gold_alone_at_a_tiny_threshold_on_the_gold_token() -> None:
    """Gold in the nucleus is counted once."""
    inputs = make_inputs(7, 9, 40)
    inputs.target[:] = (inputs.hidden @ inputs.weight.T).argmax(1)
    values = cross_entropy_error(inputs)
    topmass = apply(small_rule("parallel_topmass", 9, 40, mass_threshold=1e-9), values, inputs)
    assert_close(topmass, apply(small_rule("parallel_gold", 9, 40), values, inputs), tolerance=1e-12)
