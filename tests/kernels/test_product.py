"""The product that takes its exponentials itself, against the product and the pass of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.plain import plain_pass
from localexit.exits.chunked import ExitCall
from localexit.exits.loss import LossOptions, tile_error
from localexit.feedback import make_feedback
from localexit.feedback.groups import GROUP, reduce_groups
from localexit.kernels import stages
from localexit.kernels.launch import ErrorPass, product_pass, product_tile, takes_product
from localexit.kernels.stages import TRITON

# The interpreter computes with numpy, which warns of the infinities that the kernels rely on.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")


# The interpreter's dot knows no bf16, and it truncates to bf16: all is fp32 here, and bf16 in tests/gpu.
def make_case(num_rows: int, width: int, vocab_size: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows + vocab_size)
    hidden = torch.randn(num_rows, width, generator=generator)
    weight = torch.randn(vocab_size, width, generator=generator) * spread / width**0.5
    return hidden, weight, torch.randint(vocab_size, (num_rows,), generator=generator)


def run_pass(
    hidden: Tensor, weight: Tensor, target: Tensor, options: LossOptions, *, out: Tensor, need_groups: bool = False
) -> ErrorPass:
    """`product_pass` of rows that all count, with a weight of 3."""
    num_rows = len(hidden)
    is_counted, row_weight = torch.ones(num_rows, dtype=torch.bool), torch.full((num_rows,), 3.0)
    clean = torch.full((num_rows, hidden.shape[1]), torch.nan)
    rows = {"is_counted": is_counted, "row_weight": row_weight, "clean": clean}
    result = product_pass(hidden, weight, target, options, **rows, out=out, need_groups=need_groups)
    assert result.weighted_scale is not None
    assert torch.equal(result.weighted_scale, 3 * result.scale)
    assert torch.equal(clean, hidden)
    return result


# 130 rows: more than a tile; 520 columns: three tiles, the last of less than a group. With a spread of 60 maxima are
# far more than 60 above gold: repaired.
@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0, 60.0])
@pytest.mark.parametrize(("num_rows", "width", "vocab_size"), [(3, 8, 8), (130, 72, 520), (5, 64, 256)])
def test_it_equals_the_plain_step(num_rows: int, width: int, vocab_size: int, spread: float) -> None:
    hidden, weight, target = make_case(num_rows, width, vocab_size, spread)
    options = LossOptions(z_loss=1e-3)
    expected_error = (hidden.double() @ weight.double().T).float()
    expected = plain_pass(expected_error, target, options)
    values = torch.full((num_rows, vocab_size), torch.nan)
    result = run_pass(hidden, weight, target, options, out=values, need_groups=True)
    error = values * result.scale[:, None]
    assert (error - expected_error).abs().max() <= 1e-5 * expected_error.abs().max()
    assert torch.allclose(result.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert torch.allclose(result.log_prob, expected.log_prob, rtol=1e-5, atol=1e-5)
    assert torch.allclose(result.gold_logit, expected.gold_logit, rtol=1e-5, atol=1e-5)
    without_gold = values.scatter(1, target[:, None], 0.0)
    assert result.group_max.shape == (num_rows, -(-vocab_size // GROUP))
    assert torch.equal(result.group_max, reduce_groups(without_gold, torch.amax))
    assert torch.allclose(result.group_sum, reduce_groups(without_gold, torch.sum), rtol=1e-5)


def test_a_confident_target_keeps_its_small_error() -> None:
    """Gold at 1 - 1e-6: p - 1 in bf16 terms would be zero, or a rounding."""
    hidden = torch.zeros(1, 16)
    hidden[0, 0] = 1.0
    weight = torch.zeros(304, 16)
    weight[7, 0] = 19.5
    target = torch.tensor([7])
    values = torch.empty(1, 304)
    result = run_pass(hidden, weight, target, LossOptions(), out=values)
    others = 303 * torch.exp(torch.tensor(-19.5, dtype=torch.float64))
    assert float(values[0, 7] * result.scale[0]) == pytest.approx(float(-others / (1 + others)), rel=1e-4)


@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_rows_that_do_not_count_are_taken_as_zero(spread: float) -> None:
    """Whatever they hold, and from hidden states that lie column by column."""
    hidden, weight, target = make_case(130, 72, 520, spread)
    is_counted = torch.ones(130, dtype=torch.bool)
    is_counted[[3, 129]] = False
    zeros = torch.where(is_counted[:, None], hidden, 0)
    rows = {"row_weight": torch.linspace(-1, 1, 130), "need_groups": True}
    results, outs, cleans = [], torch.full((2, 130, 520), torch.nan), torch.full((2, 130, 72), torch.nan)
    poisoned = torch.where(is_counted[:, None], hidden, torch.nan).T.contiguous().T
    everything = torch.ones(130, dtype=torch.bool)
    for given, counts, out, clean in (
        (poisoned, is_counted, outs[0], cleans[0]),
        (zeros, everything, outs[1], cleans[1]),
    ):
        results.append(
            product_pass(given, weight, target, LossOptions(), is_counted=counts, clean=clean, out=out, **rows)
        )
    assert torch.equal(cleans[0], zeros)
    assert torch.equal(outs[0], outs[1])
    for part in ("loss", "gold_logit", "log_prob", "scale", "weighted_scale", "group_max", "group_sum"):
        assert torch.equal(getattr(results[0], part), getattr(results[1], part))


def test_a_common_offset_changes_nothing() -> None:
    hidden, weight, target = make_case(4, 64, 256, 2.0)
    hidden[:, 0], weight[:, 0] = 100.0, 0.0
    shifted = weight.clone()
    shifted[:, 0] = 100.0
    results = []
    for w in (weight, shifted):
        values = torch.empty(4, 256)
        result = run_pass(hidden, w, target, LossOptions(), out=values)
        results.append((result.loss, values * result.scale[:, None]))
    assert torch.allclose(results[0][0], results[1][0], atol=5e-3)
    assert torch.allclose(results[0][1], results[1][1], atol=5e-3)


def test_a_final_tile_equals_the_plain_step() -> None:
    hidden, weight, target = make_case(130, 72, 520, 3.0)
    plain = (hidden.double() @ weight.double().T).float()
    rows = plain_pass(plain.clone(), target, LossOptions())
    is_counted = torch.ones(130, dtype=torch.bool)
    is_counted[3] = False
    hidden[3] = torch.nan
    for columns in (slice(0, 256), slice(256, 520)):
        expected, values = plain[:, columns].clone(), torch.full((130, columns.stop - columns.start), torch.nan)
        known = (target, rows.gold_logit, rows.log_prob, is_counted)
        tile_error(expected, *known, LossOptions(), 520, None, columns.start)
        product_tile(hidden, weight[columns], *known, values, columns.start)
        assert torch.allclose(values, expected, rtol=1e-4, atol=1e-6)
        assert not values[3].any()


def test_what_it_takes() -> None:
    weight = torch.zeros(256, 64, dtype=torch.bfloat16)
    assert takes_product(weight)
    assert not takes_product(weight.float())
    assert not takes_product(weight[:0])
    assert not takes_product(torch.zeros(64, 256, dtype=torch.bfloat16).T)
    assert not takes_product(torch.zeros(257, 64, dtype=torch.bfloat16))
    assert not takes_product(torch.zeros(256, 60, dtype=torch.bfloat16))
    assert not takes_product(torch.zeros(256 * 64 + 1, dtype=torch.bfloat16)[1:].view(256, 64))


def test_what_losses_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "takes_product", lambda _: True)
    weight = torch.zeros(256, 64)

    def is_fused(bias: Tensor | None = None, **options: Any) -> tuple[bool, bool]:
        call = ExitCall(
            hidden=weight, weight=weight, bias=bias, target=torch.zeros(256, dtype=torch.int64),
            row_weight=weight[:, 0], compute_dtype=torch.float32, rule=make_feedback("dense", 64, 256),
            need_hidden=True, need_weight=True, need_bias=True, need_stats=options.pop("need_stats", False),
            is_filtered=False, options=LossOptions(**options),
        )  # fmt: skip
        return TRITON.fused_product(call, weight) is not None, TRITON.fused_tile(call, weight) is not None

    assert is_fused() == (True, True)
    assert is_fused(z_loss=0.1) == (True, False)
    assert is_fused(need_stats=True) == (False, True)
    assert is_fused(softcap=5.0) == is_fused(label_smoothing=0.1) == is_fused(torch.zeros(256)) == (False, False)
