"""Each kernel against the plain step it replaces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.plain import plain_pass
from localexit.exits.chunked import plain_scaled
from localexit.exits.loss import LossOptions
from localexit.feedback.base import Error
from localexit.kernels.launch import error_pass, scaled, select, weighted_rows

# The interpreter computes with numpy, which warns of the infinities that the kernels rely on.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

ROWS = 5
OPTIONS = {
    "plain": LossOptions(),
    "softcap": LossOptions(softcap=5.0),
    "z_loss": LossOptions(z_loss=0.1),
    "smoothing": LossOptions(label_smoothing=0.1, z_loss=1e-3),
}


def far(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest entry."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-20))


def logits_of(vocab_size: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocab_size + int(spread))
    logits = torch.randn(ROWS, vocab_size, generator=generator) * spread
    bias = torch.randn(vocab_size, generator=generator)
    return logits, bias, torch.randint(vocab_size, (ROWS,), generator=generator)


# 1: less than a group; 300: not a multiple of a group. Spreads beyond 20 put maxima more than 60 above gold: repaired.
@pytest.mark.parametrize("vocab_size", [1, 300, 1024])
@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0, 60.0, 200.0])
@pytest.mark.parametrize("name", OPTIONS)
def test_error_pass_equals_the_plain_step(vocab_size: int, spread: float, name: str) -> None:
    options = OPTIONS[name]
    logits, bias, target = logits_of(vocab_size, spread)
    expected_error = logits + bias
    expected = plain_pass(expected_error, target, options, bias=bias, need_stats=True)
    values = logits.clone()
    result = error_pass(values, target, options, bias=bias, need_stats=True, need_groups=True)
    # 1 - tanh² of the plain step is off by its own rounding where the cap saturates.
    budget = 1e-4 if options.softcap else 1e-5
    # At V = 1 the error is zero but for rounding.
    floor = expected_error.abs().max().clamp_min(1e-3)
    assert (values * result.scale[:, None] - expected_error).abs().max() / floor < budget
    assert far(result.loss, expected.loss) < 1e-5 or float((result.loss - expected.loss).abs().max()) < 1e-5
    assert far(result.gold_logit - result.log_prob, expected.lse) < 1e-5
    assert torch.allclose(result.log_prob, expected.log_prob, rtol=1e-5, atol=1e-5)
    assert torch.allclose(result.entropy, expected.entropy, rtol=1e-4, atol=1e-4)
    capped = (
        logits + bias if options.softcap is None else options.softcap * torch.tanh((logits + bias) / options.softcap)
    )
    assert torch.allclose(capped.gather(1, result.argmax[:, None])[:, 0], capped.amax(1), rtol=1e-6)


def test_a_saturated_soft_cap_is_not_an_overflow() -> None:
    """Six tokens at the cap and gold at its negative: no entry is beyond exp(60), but their sum is."""
    logits = torch.zeros(1, 300)
    logits[0, :6], logits[0, 200] = 90.0, -120.0
    options = LossOptions(softcap=30.0)
    expected_error = logits.clone()
    expected = plain_pass(expected_error, torch.tensor([200]), options)
    result = error_pass(logits, torch.tensor([200]), options, bias=None)
    assert torch.allclose(result.loss, expected.loss, rtol=1e-5)
    assert (logits * result.scale[:, None] - expected_error).abs().max() < 1e-5


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_error_pass_does_not_mind_a_common_offset(offset: float) -> None:
    logits, _, target = logits_of(300, 3.0)
    shifted = (logits + offset).contiguous()
    expected = (shifted - offset).clone()
    plain_pass(expected, target, LossOptions())
    result = error_pass(shifted, target, LossOptions(), bias=None)
    assert far(shifted * result.scale[:, None], expected) < 1e-4


def test_confident_targets_keep_their_error() -> None:
    """p_gold = 1 - 1e-9 in bf16: p - 1 would be zero, or one rounding of 1."""
    logits = torch.zeros(1, 256, dtype=torch.bfloat16)
    logits[0, 7] = 26.0
    expected = logits.double()
    plain_pass(expected, torch.tensor([7]), LossOptions())
    result = error_pass(logits, torch.tensor([7]), LossOptions(), bias=None)
    error = logits.double() * result.scale.double()[:, None]
    assert far(error, expected) < 2**-8
    assert abs(float(error.sum())) < 0.01 * float(error.abs().max())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_logits_make_a_non_finite_loss(bad: float) -> None:
    logits, _, target = logits_of(300, 1.0)
    logits[2, 5] = bad
    result = error_pass(logits, target, LossOptions(), bias=None)
    assert result.loss.isfinite().tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("vocab_size", [20, 300, 1024])
@pytest.mark.parametrize("topk", [0, 1, 5, 16])
@pytest.mark.parametrize("spread", [1.0, 20.0, 100.0])
def test_select_equals_the_plain_step(vocab_size: int, topk: int, spread: float) -> None:
    logits, _, target = logits_of(vocab_size, spread)
    result = error_pass(logits, target, LossOptions(), bias=None, need_groups=True)
    uniforms = torch.rand(ROWS, 7, generator=torch.Generator().manual_seed(3))
    scale = torch.randn(ROWS, generator=torch.Generator().manual_seed(4))
    ids, weights = select(logits, scale, target, uniforms, result.group_max, result.group_sum, topk)
    plain = Error(values=logits, scale=scale)
    expected_ids, expected_weights = plain.select(topk, uniforms, target)
    kept = slice(1 + topk)
    assert torch.equal(ids[:, 0], target)
    # Ties may be broken either way: compare magnitudes.
    assert torch.equal(logits.gather(1, ids[:, kept]).abs(), logits.gather(1, expected_ids[:, kept]).abs())
    assert torch.equal(weights[:, kept], plain.gather(ids[:, kept]))
    assert torch.equal(ids[:, 1 + topk :], expected_ids[:, 1 + topk :])
    assert torch.allclose(weights[:, 1 + topk :], expected_weights[:, 1 + topk :], rtol=1e-4)


def test_select_without_draws() -> None:
    logits, _, target = logits_of(300, 1.0)
    result = error_pass(logits, target, LossOptions(), bias=None, need_groups=True)
    scale = torch.ones(ROWS)
    ids, weights = select(logits, scale, target, torch.empty(ROWS, 0), result.group_max, result.group_sum, 4)
    plain = Error(values=logits, scale=scale)
    assert torch.equal(ids, torch.cat([target[:, None], plain.topk(4, target)], dim=1))
    assert torch.equal(weights, plain.gather(ids))


def test_weighted_rows_equals_the_plain_step() -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (ROWS, 9), generator=generator)
    weights = torch.randn(ROWS, 9, generator=generator)
    rows = torch.randn(50, 33, generator=generator)
    expected = (weights[..., None] * rows[ids]).sum(1)
    assert far(weighted_rows(ids, weights, rows), expected) < 1e-6


@pytest.mark.parametrize("shape", [(0, 3), (7, 5), (70, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_equals_the_plain_step(shape: tuple[int, int], dtype: torch.dtype) -> None:
    source, factor = torch.randn(*shape), torch.tensor(0.3)
    for given in (source, source.T):
        got = scaled(given, factor, dtype)
        assert got.dtype == dtype
        # The interpreter cuts a number off where a GPU rounds it.
        torch.testing.assert_close(got, plain_scaled(given, factor, dtype), rtol=torch.finfo(dtype).eps, atol=0.0)
