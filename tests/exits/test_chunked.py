"""The loop over chunks: how large they are, whose draws are whose, and which targets are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.budget import assert_close
from helpers.cases import make_inputs, small_rule
from localexit import exit_cross_entropy, exit_step
from localexit.exits import chunked
from localexit.exits.chunked import PLAIN, ExitCall, chunk_rows, measure, run_exit
from localexit.exits.loss import LossOptions, RowResult
from localexit.exits.reference import reference_exit
from localexit.exits.tiled import _tile_columns
from localexit.feedback import Anchors

MIB = 2**20


@pytest.mark.parametrize(
    ("num_rows", "chunk_bytes", "expected"),
    [
        (100, 400, 100),
        (100, 399, 50),
        (100, 120, 25),
        (100, 4, 1),
        (100, 1, 1),
        (7, 16, 4),
        (1, 10**9, 1),
        (1000, 1024, 256),
        (1000, 1023, 250),
    ],
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
        "need_hidden": True,
        "need_weight": True,
        "need_bias": False,
        "need_stats": False,
        "is_filtered": False,
    }
    return ExitCall(**(arguments | changes))


def test_chunks_by_default() -> None:
    """The memory preset's are bounded on any device; a rule that reads the logits halves them, for its copy."""
    assert PLAIN.chunk_bytes == {"cpu": 64 * MIB, "cuda": 512 * MIB}
    on_cpu = PLAIN.chunk_bytes["cpu"]
    assert chunked._default_chunk_bytes(call("dense"), PLAIN) == on_cpu
    assert chunked._default_chunk_bytes(call("parallel"), PLAIN) == on_cpu // 2
    assert chunked._default_chunk_bytes(call("parallel", need_hidden=False), PLAIN) == on_cpu
    large = replace(PLAIN, chunk_bytes={"cpu": 512 * MIB})
    assert chunked._default_chunk_bytes(call("dense"), large) == 512 * MIB
    assert chunked._default_chunk_bytes(call("dense", preset="memory"), large) == 96 * MIB
    assert chunked._default_chunk_bytes(call("dense", preset="memory", spare_bytes=4 * MIB), large) == 100 * MIB
    assert chunked._default_chunk_bytes(call("dense", preset="memory", spare_bytes=MIB), PLAIN) == on_cpu


@pytest.mark.parametrize(
    ("device", "num_rows", "hidden_bytes", "expected"),
    [
        ("cpu", 1024, 16 * MIB, 16384),
        ("cpu", 1, 0, 16 * MIB),
        ("cuda", 1024, 16 * MIB, 40960),
        ("cpu", 100_000, 0, 128),
        ("cpu", 200_000, 0, 83),
        ("cpu", 10**9, 0, 1),
    ],
    ids=["cpu", "one token", "with the hidden states on a GPU", "cut to where a tile begins", "narrow", "a column"],
)
def test_tiles_by_default(device: str, num_rows: int, hidden_bytes: int, expected: int) -> None:
    """Of 64 MiB on a CPU; on a GPU of 176 MiB, together with the hidden states. They begin at multiples of 128."""
    hidden: Any = SimpleNamespace(device=torch.device(device), is_cuda=device == "cuda", nbytes=hidden_bytes)
    assert _tile_columns(num_rows, 4, hidden) == expected


@pytest.mark.parametrize(
    ("is_cuda", "compute_dtype", "expected"),
    [
        (True, torch.bfloat16, torch.bfloat16),
        (True, torch.float16, torch.float32),
        (True, torch.float32, torch.float32),
        (False, torch.bfloat16, torch.float32),
        (False, torch.float64, torch.float64),
    ],
)
def test_the_dtype_of_products_with_the_error(is_cuda: bool, compute_dtype: torch.dtype, expected: torch.dtype) -> None:
    """A GPU sums those of bf16 in fp32; fp16 cannot hold errors of a mean over many tokens."""
    asked: Any = SimpleNamespace(hidden=SimpleNamespace(is_cuda=is_cuda), compute_dtype=compute_dtype)
    assert PLAIN.value_dtype(asked) == expected


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_feedback_in_fp16_waits_in_fp32_for_the_factor_from_above(dtype: torch.dtype, expected: torch.dtype) -> None:
    inputs = make_inputs(7, 9, 40)
    tensors = {"hidden": inputs.hidden.to(dtype), "weight": inputs.weight.to(dtype), "compute_dtype": dtype}
    result = run_exit(call("dense", **tensors, row_weight=torch.full((7,), 1e-9)))
    assert result.feedback is not None
    assert result.feedback.dtype == expected
    assert result.feedback.any(dim=1).all()


def in_fp32(total: torch.Tensor | None, values: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
    """What a GPU's product of bf16 adds to a sum in fp32."""
    return values.T @ scaled if total is None else total.addmm_(values.T.to(total.dtype), scaled.to(total.dtype))


@pytest.mark.parametrize(
    ("weight_dtype", "num_chunks", "expected"),
    [
        (torch.bfloat16, 1, torch.bfloat16),
        (torch.bfloat16, 2, torch.float32),
        (torch.float32, 1, torch.float32),
        (torch.float32, 2, torch.float32),
    ],
)
def test_products_in_bf16_are_summed_in_fp32(weight_dtype: torch.dtype, num_chunks: int, expected: torch.dtype) -> None:
    """As on a GPU. A single product in the dtype of the gradient is the gradient: nothing is summed."""
    stages = replace(PLAIN, value_dtype=lambda _: torch.bfloat16, add_weight_grad=in_fp32)
    inputs = make_inputs(8, 9, 40)
    tensors = {"hidden": inputs.hidden.bfloat16(), "weight": inputs.weight.to(weight_dtype), "target": inputs.target}
    options = {"row_weight": torch.ones(8), "compute_dtype": torch.bfloat16, "need_bias": True}
    result = run_exit(call("dense", **tensors, **options, chunk_bytes=8 * 40 * 4 // num_chunks), stages=stages)
    assert result.weight_grad is not None
    assert result.bias_grad is not None
    assert (result.weight_grad.dtype, result.bias_grad.dtype) == (expected, torch.float32)
    exact = reference_exit(
        tensors["hidden"].double(), tensors["weight"].bfloat16().double(), inputs.target,
        feedback=small_rule("dense", 9, 40), reduction="sum",
    )  # fmt: skip
    assert_close(result.weight_grad.double(), exact.weight_grad, tolerance=2e-2)
    assert_close(result.bias_grad.double(), exact.bias_grad, tolerance=2e-2)


@pytest.mark.parametrize(("num_chunks", "expected"), [(1, 0), (2, 1)])
def test_anchors_are_measured_again_only_where_their_logits_are_gone(
    num_chunks: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def watched(*arguments: torch.Tensor) -> Anchors:
        measured.append(len(arguments[0]))
        return measure(*arguments)

    monkeypatch.setattr(chunked, "measure", watched)
    inputs = make_inputs(8, 9, 40)
    options = {"feedback": small_rule("anchors", 9, 40), "chunk_bytes": 8 * 40 * 8 // num_chunks}
    exit_step(inputs.hidden, inputs.weight, inputs.target, **options)
    assert len(measured) == expected


class Watched:
    """Stages that note what they are asked for, and do logits and error at once if told so, as kernels do."""

    def __init__(self, *, is_fused: bool) -> None:
        self.need_groups: list[bool] = []
        self.stages = replace(PLAIN, loss_and_error=self.loss_and_error)
        if is_fused:
            self.stages = replace(self.stages, fused_product=self.fused_product, has_bias=False)

    def loss_and_error(self, *arguments: Any, **options: Any) -> RowResult:
        self.need_groups.append(options["need_groups"])
        return PLAIN.loss_and_error(*arguments, **options)

    def fused_product(self, call: ExitCall, weight: torch.Tensor) -> Any:
        def run(
            hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, options: LossOptions,
            *, is_counted: torch.Tensor, row_weight: torch.Tensor, clean: torch.Tensor, out: torch.Tensor,
            need_groups: bool,
        ) -> RowResult:  # fmt: skip
            del row_weight
            clean.copy_(torch.where(is_counted[:, None], hidden, 0))
            PLAIN.logits(clean, weight, None, out)
            needs = {"need_error": True, "need_logits": False, "need_groups": need_groups, "need_stats": False}
            result = self.loss_and_error(out, target, options, **needs)
            out.div_(4)
            return replace(result, scale=out.new_full((len(out),), 4.0))

        return run


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dense", {}, False),
        ("dense", {"is_filtered": True}, True),
        ("dense", {"is_filtered": True, "need_weight": False}, False),
        ("hybrid", {}, True),
        ("hybrid", {"need_hidden": False}, False),
        ("anchors", {"anchor_rows": torch.tensor([1, 4])}, False),
    ],
)
def test_groups_are_asked_for_by_what_selects_in_any_way_of_calling(
    name: str, options: dict[str, Any], expected: bool, is_fused: bool
) -> None:
    """A fused product may leave a factor of the error to others, and gives what the plain steps give."""
    watched = Watched(is_fused=is_fused)
    result = run_exit(call(name, **options), stages=watched.stages)
    assert watched.need_groups == [expected]
    plain = run_exit(call(name, **options))
    for part in ("loss", "log_prob", "feedback", "weight_grad"):
        ours, theirs = getattr(result, part), getattr(plain, part)
        assert (ours is None) == (theirs is None)
        # What is small enough to be left out depends on the factor: kernels see to that themselves.
        if theirs is not None and not (is_fused and options.get("is_filtered")):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


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
