"""Eq. (5) to (7): which token is coded where, also when buckets collide and errors tie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers.budget import assert_close
from helpers.cases import make_inputs, run, small_rule
from helpers.direct import apply, cross_entropy_error, signed_error
from localexit import Dense, make_feedback
from localexit.feedback import Error
from localexit.feedback.codes import sketch_matrix
from localexit.feedback.factorized import hybrid_code

VOCAB = 12


def code_of(values: Tensor, target: Tensor, *, topk: int, buckets: int) -> tuple[Tensor, Tensor]:
    """Head and tail of the hybrid code, with one-hot head codes: the head shows which tokens it holds."""
    bucket = torch.arange(VOCAB, dtype=torch.int32) % buckets
    sign = torch.ones(VOCAB, dtype=torch.int8)
    error = Error(values=values, scale=values.new_ones(len(values)))
    code = hybrid_code(
        error,
        target,
        exact=torch.eye(VOCAB, dtype=torch.float64),
        sketch=sketch_matrix(bucket, sign, buckets, torch.float64),
        topk=topk,
    )
    return code[:, :VOCAB], code[:, VOCAB:]


ERRORS = {
    "random": lambda: torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "all_equal": lambda: torch.ones(5, VOCAB, dtype=torch.float64),
    "two_values": lambda: (torch.arange(VOCAB, dtype=torch.float64) % 2 + 1).expand(5, -1),
    "gold_largest": lambda: 0.1 + torch.eye(VOCAB, dtype=torch.float64)[:5],
}


@pytest.mark.parametrize("buckets", [1, 3, 12])
@pytest.mark.parametrize("topk", [0, 1, 4, 11, 50])
@pytest.mark.parametrize("error", ERRORS)
def test_every_token_counts_once_in_the_head_or_in_the_tail(error: str, topk: int, buckets: int) -> None:
    values, target = ERRORS[error](), torch.arange(5)
    head, tail = code_of(values, target, topk=topk, buckets=buckets)
    is_in_head = head != 0
    assert (is_in_head.sum(1) == min(1 + topk, VOCAB)).all()
    assert is_in_head[torch.arange(5), target].all()
    assert torch.equal(head[is_in_head], values[is_in_head])
    rest = torch.where(is_in_head, 0, values)
    expected = torch.stack([rest[:, b::buckets].sum(1) for b in range(buckets)], 1)
    assert torch.allclose(tail, expected, atol=1e-14)
    without_gold = rest.scatter(1, target[:, None], 0).abs().amax(1)
    smallest = torch.where(is_in_head.scatter(1, target[:, None], False), values.abs(), torch.inf).amin(1)
    assert (smallest >= without_gold).all()


def test_topk_is_by_magnitude() -> None:
    values = torch.tensor([[0.1, -5.0, 0.2, 4.0, *[0.0] * 8]], dtype=torch.float64)
    head, _ = code_of(values, torch.tensor([0]), topk=2, buckets=3)
    assert head[0].nonzero()[:, 0].tolist() == [0, 1, 3]


@pytest.mark.parametrize(("rank", "rank_exact"), [(5, 0), (5, 5), (1, 0), (1, 1)])
def test_hybrid_without_a_head_or_without_a_tail(rank: int, rank_exact: int) -> None:
    inputs = make_inputs(7, 9, 40)
    rule = small_rule("hybrid", 9, 40, rank=rank, rank_exact=rank_exact)
    values = cross_entropy_error(inputs)
    feedback = apply(rule, values, inputs)
    assert feedback.shape == (7, 9)
    if rank_exact == 0:
        sketch = sketch_matrix(rule.bucket, rule.sign, rank, torch.float64)
        assert_close(feedback, 0.9 * values @ sketch @ rule.expander.double().T)


@pytest.mark.parametrize("name", ["dense", "sketch", "hybrid"])
def test_gain_multiplies_and_the_expander_spans_the_feedback(name: str) -> None:
    inputs = make_inputs(7, 9, 40)
    values = signed_error(inputs)
    once, twice = (apply(small_rule(name, 9, 40, gain=gain), values, inputs) for gain in (0.5, 1.0))
    assert_close(2 * once, twice)
    expander = small_rule(name, 9, 40).expander.double()
    assert_close(twice @ expander @ expander.T, twice, tolerance=1e-6)


def test_dense_feedback_is_exact_at_its_initial_weight() -> None:
    rule = Dense(32, 400, rank=16, gain=0.5 * 32**0.5).double()
    assert torch.equal(rule.initial_weight(), rule.initial_weight(std=0.02))
    weight = rule.initial_weight(std=0.5)
    assert torch.linalg.matrix_rank(weight) == 16
    assert float(weight.std()) == pytest.approx(0.5, rel=0.05)
    inputs = replace(make_inputs(7, 32, 400), weight=weight)
    exact = run(inputs, make_feedback("transport", 32, 400)).feedback
    assert_close(run(inputs, rule).feedback, exact, tolerance=1e-12)


def test_initial_weight_refuses_a_negative_size() -> None:
    with pytest.raises(ValueError, match="std must be a finite number of at least 0, got -1"):
        Dense(8, 40).initial_weight(std=-1)
