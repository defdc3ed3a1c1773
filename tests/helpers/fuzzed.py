"""Random exits for hypothesis: every shape, layout, dtype and option that an exit takes, in odd combinations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.cases import Inputs, make_inputs, small_rule
from localexit.feedback import Feedback, feedback_options

# Examples a rule: of `make test-ci`, and of `make test-all`.
NUM_EXAMPLES = [pytest.param(200, marks=pytest.mark.slow), pytest.param(2000, marks=pytest.mark.long)]

SIZES = st.sampled_from([0, 1, 2, 3, 5, 7, 11, 13])
WIDTHS = st.sampled_from([1, 2, 3, 7, 8])
VOCABS = st.sampled_from([1, 2, 3, 7, 13, 31, 127, 128, 129])
LAYOUTS = ("contiguous", "transposed", "strided", "expanded")
# Ranks down to one, k beyond every vocabulary, more anchors than tokens and than dimensions.
RULE_OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "rank": st.sampled_from([1, 2, 5]),
    "residual_rank": st.sampled_from([1, 4]),
    "topk": st.sampled_from([0, 1, 3, 200]),
    "num_draws": st.sampled_from([1, 4]),
    "num_anchors": st.sampled_from([1, 4, 30]),
    "num_pairs": st.sampled_from([1, 30]),
    "mass_threshold": st.sampled_from([0.1, 0.6, 1.0]),
    "nucleus_cap": st.sampled_from([1, 200]),
    "gain": st.sampled_from([-1.0, 0.3]),
    "residual_gain": st.sampled_from([0.0, 0.7]),
}


@dataclass(frozen=True, kw_only=True)
class Exit:
    """One exit.

    Attributes:
        inputs: fp64 tensors.
        layout: of hidden, weight and bias, which another dtype loses.
        rule: the rule, small.
        options: for `exit_cross_entropy`, the loss's.
        execution: for `exit_cross_entropy` too, but nothing may depend on them.
    """

    inputs: Inputs
    layout: str
    rule: Feedback
    options: dict[str, Any]
    execution: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Inputs:
        """The inputs in another dtype and the same layout."""
        return laid_out(self.inputs.to(dtype), self.layout)


def fuzz_settings(num_examples: int) -> settings:
    """The same examples in every run, so that a failure is nobody's bad luck."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=num_examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks
    )


def assert_near(actual: Tensor, expected: Tensor, *, tolerance: float, floor: float) -> None:
    """Within `tolerance` of the largest number, or within `floor`: where terms cancel, their rounding is left."""
    assert actual.shape == expected.shape
    if actual.numel():
        difference = float((actual.double() - expected.double()).abs().max())
        allowed = tolerance * float(expected.double().abs().max()) + floor
        assert difference <= allowed, f"differs by {difference:.3g}, {allowed:.3g} allowed"


@st.composite
def exits(draw: st.DrawFn, name: str) -> Exit:
    """Any exit with the rule `name`."""
    inputs = make_inputs(
        draw(SIZES), draw(WIDTHS), draw(VOCABS), bias=draw(st.booleans()), seed=draw(st.integers(0, 2**31))
    )
    layout = draw(st.sampled_from(LAYOUTS))
    inputs = laid_out(inputs, layout)
    ignore_index = draw(st.sampled_from([-100, -1, 0, 5]))
    is_ignored = torch.tensor([draw(st.booleans()) for _ in range(inputs.target.numel())], dtype=torch.bool)
    target = inputs.target.masked_fill(is_ignored.reshape(inputs.target.shape), ignore_index)
    inputs = replace(inputs, target=target.to(draw(st.sampled_from([torch.int32, torch.int64]))))
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.9])),
        "z_loss": draw(st.sampled_from([0.0, 0.01, 1.0])),
        "softcap": draw(st.sampled_from([None, 0.5, 30.0])),
    }
    if draw(st.booleans()):
        options["token_weight"] = _weights(inputs.target, draw(st.integers(0, 99)))
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["num_items"] = draw(st.sampled_from([1, 3.5, 100]))
    execution = {
        "preset": draw(st.sampled_from(["fast", "memory"])),
        "chunk_bytes": draw(st.sampled_from([None, 1, 3 * 8 * inputs.vocab])),
    }
    return Exit(inputs=inputs, layout=layout, rule=draw(rules(name, inputs)), options=options, execution=execution)


@st.composite
def rules(draw: st.DrawFn, name: str, inputs: Inputs) -> Feedback:
    """The rule `name` with any of its options."""
    options = {key: draw(RULE_OPTIONS[key]) for key in feedback_options(name) if key in RULE_OPTIONS}
    options |= {key: min(rank, inputs.width) for key, rank in options.items() if key in ("rank", "residual_rank")}
    if name == "hybrid":
        options["rank_exact"] = draw(st.integers(0, options["rank"]))
    return small_rule(name, inputs.width, inputs.vocab, seed=draw(st.integers(0, 2**31)), **options)


def laid_out(inputs: Inputs, layout: str) -> Inputs:
    """The same numbers at other places in memory; "expanded" gives all tokens the first one's hidden state."""
    if layout == "expanded":
        return replace(inputs, hidden=inputs.hidden[:1].expand(len(inputs.hidden), -1))
    place = {"contiguous": Tensor.contiguous, "transposed": _transposed, "strided": _strided}[layout]
    bias = None if inputs.bias is None else place(inputs.bias)
    return replace(inputs, hidden=place(inputs.hidden), weight=place(inputs.weight), bias=bias)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.dim() == 2 else tensor


def _strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


def _weights(target: Tensor, seed: int) -> Tensor:
    """Of both signs, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(target.shape, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(target.shape, generator=generator) < 0.2, 0, weights)
