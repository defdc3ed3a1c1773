"""The loop over chunks: how large they are, whose draws are whose, and which targets are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.cases import make_inputs, small_rule
from localexit import exit_cross_entropy, exit_step
from localexit.exits import chunked
from localexit.exits.chunked import PLAIN, ExitCall, chunk_rows
from localexit.exits.loss import LossOptions

MIB = 2**20


@pytest.mark.parametrize(
    ("num_rows", "chunk_bytes", "expected"),
    [(100, 400, 100), (100, 399, 50), (100, 120, 25), (100, 4, 1), (100, 1, 1), (7, 16, 4), (1, 10**9, 1)],
)
def test_a_chunk_is_what_fits_spread_evenly(num_rows: int, chunk_bytes: int, expected: int) -> None:
    assert chunk_rows(num_rows, 2, 2, chunk_bytes) == expected


def call(name: str, **changes: Any) -> ExitCall:
    inputs = make_inputs(7, 9, 40)
    arguments: dict[str, Any] = {
        "hidden": inputs.hidden,
        "weight": inputs.weight,
        "bias": None,
        "target": inputs.target,
        "row_weight": torch.ones(7),
        "compute_dtype": torch.float64,
        "options": LossOptions(),
        "rule": small_rule(name, 9, 40),
    }
    return ExitCall(**(arguments | changes))


def test_chunks_by_default() -> None:
    """The memory preset's are bounded on any device; a rule that reads the logits halves them, for its copy."""
    on_cpu = PLAIN.chunk_bytes["cpu"]
    assert chunked._default_chunk_bytes(call("dense"), PLAIN) == on_cpu
    assert chunked._default_chunk_bytes(call("parallel"), PLAIN) == on_cpu // 2
    assert chunked._default_chunk_bytes(call("parallel", need_hidden=False), PLAIN) == on_cpu
    large = replace(PLAIN, chunk_bytes={"cpu": 512 * MIB})
    assert chunked._default_chunk_bytes(call("dense"), large) == 512 * MIB
    assert chunked._default_chunk_bytes(call("dense", preset="memory"), large) == 96 * MIB
    assert chunked._default_chunk_bytes(call("dense", preset="memory", spare_bytes=4 * MIB), large) == 100 * MIB
    assert chunked._default_chunk_bytes(call("dense", preset="memory", spare_bytes=MIB), PLAIN) == on_cpu


@pytest.mark.parametrize("name", ["transport_sampled", "mirror_sampled"])
def test_draws_belong_to_the_token_and_not_to_its_micro_batch(name: str) -> None:
    inputs, rule = make_inputs(12, 9, 40), small_rule(name, 9, 40)
    whole = exit_step(inputs.hidden, inputs.weight, inputs.target, feedback=rule, reduction="sum").feedback
    assert whole is not None
    assert whole.any()
    for start in (0, 4, 8):
        rows = slice(start, start + 4)
        part = exit_step(
            inputs.hidden[rows], inputs.weight, inputs.target[rows], feedback=rule, reduction="sum", first_row=start
        ).feedback
        assert part is not None
        assert torch.allclose(part, whole[rows], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bad", [40, -1])
@pytest.mark.parametrize("use", [exit_cross_entropy, exit_step])
def test_targets_outside_the_vocabulary_are_refused(use: Callable[..., Any], bad: int) -> None:
    inputs = make_inputs(7, 9, 40)
    inputs.target[3] = bad
    with pytest.raises(ValueError, match=f"target has 1 values outside 0..39, the first is {bad}"):
        use(inputs.hidden, inputs.weight, inputs.target, feedback=small_rule("dense", 9, 40))


@pytest.mark.parametrize("chunk_bytes", [None, 3 * 40 * 8])
def test_a_step_adds_to_the_gradients_that_it_is_given(chunk_bytes: int | None) -> None:
    inputs, rule = make_inputs(7, 9, 40, bias=True), small_rule("dense", 9, 40)
    weight, bias = inputs.weight.clone().requires_grad_(), inputs.bias.clone().requires_grad_()
    exit_cross_entropy(inputs.hidden, weight, inputs.target, feedback=rule, linear_bias=bias).backward()
    totals = torch.ones_like(inputs.weight), torch.ones_like(inputs.bias)
    exit_step(
        inputs.hidden,
        inputs.weight,
        inputs.target,
        feedback=rule,
        linear_bias=inputs.bias,
        grad_weight=totals[0],
        grad_bias=totals[1],
        chunk_bytes=chunk_bytes,
    )
    for total, grad in zip(totals, (weight.grad, bias.grad), strict=True):
        torch.testing.assert_close(total, 1 + grad)
