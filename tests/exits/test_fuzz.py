"""Random exits against the fp64 oracle: no crash, the right numbers, the right dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given

from helpers.cases import RULES, expected, run
from helpers.fuzzed import NUM_EXAMPLES, Exit, assert_near, exits, fuzz_settings

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:feedback 'parallel:UserWarning", "ignore:the nucleus of some tokens:UserWarning"
    ),
    pytest.mark.timeout(1800),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def upstream_of(case: Exit) -> torch.Tensor:
    """What reaches the loss from above: one number, or one a token."""
    if case.options["reduction"] != "none":
        return torch.tensor(-0.7, dtype=torch.float64)
    return torch.linspace(-1, 2, case.inputs.target.numel(), dtype=torch.float64).reshape(case.inputs.target.shape)


def largest_logit(case: Exit) -> float:
    """Of the products h Wᵀ, without bias."""
    return float((case.inputs.hidden @ case.inputs.weight.T).abs().max()) if case.inputs.hidden.numel() else 0.0


def size_of_terms(case: Exit, upstream: torch.Tensor) -> float:
    """An upper bound of the sum of |terms| of loss and gradients: what is left after they cancel has their rounding."""
    inputs, options = case.inputs, case.options
    counted = inputs.target != options["ignore_index"]
    weights = options.get("token_weight", torch.ones(inputs.target.shape)) * upstream.abs().clamp_min(1)
    if options["reduction"] == "mean":
        weights = weights / options.get("num_items", max(int(counted.sum()), 1))
    largest = max(1.0, float(inputs.hidden.abs().max())) if inputs.hidden.numel() else 1.0
    # 8 for the bias and the logarithm of the vocabulary's size.
    return float(weights[counted].abs().sum()) * largest * (1 + 2 * options["z_loss"] * (largest_logit(case) + 8))


@pytest.mark.parametrize("num_examples", NUM_EXAMPLES)
@pytest.mark.parametrize("name", RULES)
def test_fp64_is_the_oracle(name: str, num_examples: int) -> None:
    @fuzz_settings(num_examples)
    @given(exits(name))
    def check(case: Exit) -> None:
        upstream = upstream_of(case)
        actual = run(case.inputs, case.rule, upstream=upstream, **case.options, **case.execution).items()
        truth = expected(case.inputs, case.rule, upstream=upstream, **case.options).items()
        assert actual.keys() == truth.keys()
        for key, tensor in actual.items():
            assert tensor.dtype == torch.float64
            assert torch.isfinite(tensor).all(), key
            assert_near(tensor, truth[key], tolerance=1e-8, floor=1e-13 * size_of_terms(case, upstream))

    check()


@pytest.mark.parametrize("num_examples", NUM_EXAMPLES)
@pytest.mark.parametrize("name", RULES)
def test_no_dtype_changes_and_sums_stay_accurate(name: str, num_examples: int) -> None:
    """Loss, dW and db; the feedback is finite. Which tokens a rule keeps or draws may hang on a rounding."""

    @fuzz_settings(num_examples)
    @given(exits(name))
    def check(case: Exit) -> None:
        dtype = DTYPES[case.inputs.vocab % 3]
        inputs = case.to(dtype)
        options: dict[str, Any] = dict(case.options)
        if "token_weight" in options:
            options["token_weight"] = options["token_weight"].float()
        upstream = upstream_of(case).float()
        outcome = run(inputs, case.rule, upstream=upstream, **options, **case.execution)
        truth = expected(inputs, case.rule, upstream=upstream, **options)
        assert outcome.loss.dtype == torch.float32
        assert outcome.feedback.dtype == outcome.weight_grad.dtype == dtype
        assert torch.isfinite(outcome.feedback).all()
        # Each product h Wᵀ is rounded to the dtype, and a term moves by at most twice what its logits do: eps times the
        # largest one. What comes out is rounded once more, near zero to the smallest numbers that the dtype has.
        info = torch.finfo(dtype)
        moved = 4 * torch.finfo(torch.float32).eps + info.eps * (largest_logit(case) + info.smallest_normal)
        floor = moved * size_of_terms(case, upstream) + info.eps * info.smallest_normal
        for key, tensor in outcome.items().items():
            if key != "feedback":
                assert_near(tensor, truth.items()[key], tolerance=2 * info.eps, floor=floor)
        assert outcome.bias_grad is None or outcome.bias_grad.dtype == dtype

    check()
