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

# Relative to the largest number; what plain sums in the dtype may lose.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}


def upstream_of(case: Exit) -> torch.Tensor:
    """What reaches the loss from above: one number, or one a token."""
    if case.options["reduction"] != "none":
        return torch.tensor(-0.7, dtype=torch.float64)
    return torch.linspace(-1, 2, case.inputs.target.numel(), dtype=torch.float64).reshape(case.inputs.target.shape)


def size_of_terms(case: Exit, upstream: torch.Tensor) -> float:
    """An upper bound of the sum of |terms| of any gradient: what is left after they cancel has their rounding."""
    inputs, options = case.inputs, case.options
    weights = options.get("token_weight", torch.ones(inputs.target.shape)) * upstream
    largest = max(1.0, float(inputs.hidden.abs().max())) if inputs.hidden.numel() else 1.0
    logits = float((inputs.hidden @ inputs.weight.T).abs().max()) if inputs.hidden.numel() else 0.0
    return float(weights.abs().sum()) * largest * (1 + 2 * options["z_loss"] * (logits + 8))


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
        dtype = list(TOLERANCE)[case.inputs.vocab % 3]
        inputs = case.inputs.to(dtype)
        options: dict[str, Any] = dict(case.options)
        if "token_weight" in options:
            options["token_weight"] = options["token_weight"].float()
        upstream = upstream_of(case).float()
        outcome = run(inputs, case.rule, upstream=upstream, **options, **case.execution)
        truth = expected(inputs, case.rule, upstream=upstream, **options)
        assert outcome.loss.dtype == torch.float32
        assert outcome.feedback.dtype == outcome.weight_grad.dtype == dtype
        assert torch.isfinite(outcome.feedback).all()
        floor = 4 * torch.finfo(torch.float32).eps * size_of_terms(case, upstream)
        for key, tensor in outcome.items().items():
            if key != "feedback":
                assert_near(tensor, truth.items()[key], tolerance=TOLERANCE[dtype], floor=floor)
        assert outcome.bias_grad is None or outcome.bias_grad.dtype == dtype

    check()
