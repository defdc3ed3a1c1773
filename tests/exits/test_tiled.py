"""The memory preset: dW by vocabulary tiles gives what the loop over chunks gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from localexit import exit_cross_entropy, exit_step, make_feedback
from localexit.exits import functional, operators, tiled
from localexit.exits.chunked import ExitCall, ExitResult, run_exit
from localexit.exits.reference import reference_exit

NUM_TOKENS, HIDDEN, VOCAB = 13, 8, 301
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "softcap, z-loss": {"softcap": 5.0, "z_loss": 0.05},
    "label smoothing": {"label_smoothing": 0.1},
    "everything": {"softcap": 5.0, "z_loss": 0.05, "label_smoothing": 0.1, "num_items": 5.0},
}


@pytest.fixture(autouse=True, params=[1, 40, 10**6], ids=["a column a tile", "many tiles", "one tile"])
def _tile_columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiled.TILE_BYTES, "cpu", request.param * NUM_TOKENS * 8)


def make_case() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)
    target[4] = -100
    hidden = normal(NUM_TOKENS, HIDDEN)
    hidden[4] = torch.nan
    return {
        "hidden": hidden,
        "weight": normal(VOCAB, HIDDEN),
        "bias": normal(VOCAB),
        "target": target,
        "token_weight": normal(NUM_TOKENS),
    }


def relative(a: Tensor | None, b: Tensor) -> float:
    assert a is not None
    return float((a.detach() - b).norm() / b.norm())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_autograd_equals_the_oracle(options: dict[str, Any]) -> None:
    case, rule = make_case(), make_feedback("dense", HIDDEN, VOCAB)
    leaves = [case[key].requires_grad_() for key in ("hidden", "weight", "bias")]
    hidden, weight, bias = leaves
    extra = {"linear_bias": bias, "token_weight": case["token_weight"], **options}
    loss = exit_cross_entropy(hidden, weight, case["target"], feedback=rule, preset="memory", **extra)
    (3 * loss).backward()
    expected = reference_exit(hidden, weight, case["target"], feedback=rule, **extra)
    assert relative(loss, expected.loss) < 1e-12
    wanted = (expected.feedback, expected.weight_grad, expected.bias_grad)
    assert max(relative(leaf.grad, 3 * one) for leaf, one in zip(leaves, wanted, strict=True)) < 1e-12


def test_a_gradient_per_token() -> None:
    case, rule = make_case(), make_feedback("dense", HIDDEN, VOCAB)
    hidden, weight = (case[key].requires_grad_() for key in ("hidden", "weight"))
    upstream = torch.randn(NUM_TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    losses = exit_cross_entropy(hidden, weight, case["target"], feedback=rule, reduction="none", preset="memory")
    losses.backward(upstream)
    expected = reference_exit(hidden, weight, case["target"], feedback=rule, reduction="none", upstream=upstream)
    assert relative(hidden.grad, expected.feedback) < 1e-12
    assert relative(weight.grad, expected.weight_grad) < 1e-12


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_adds_to_the_accumulators(options: dict[str, Any]) -> None:
    case, rule = make_case(), make_feedback("anchors", HIDDEN, VOCAB)
    arguments = (case["hidden"], case["weight"], case["target"])
    extra = {"feedback": rule, "linear_bias": case["bias"], "token_weight": case["token_weight"], **options}
    grad_weight = torch.ones(VOCAB, HIDDEN, dtype=torch.float64)
    grad_bias = torch.ones(VOCAB, dtype=torch.float64)
    step = exit_step(*arguments, grad_weight=grad_weight, grad_bias=grad_bias, preset="memory", **extra)
    expected = reference_exit(*arguments, **extra)
    assert relative(step.feedback, expected.feedback) < 1e-10
    assert relative(grad_weight - 1, expected.weight_grad) < 1e-12
    assert relative(grad_bias - 1, expected.bias_grad) < 1e-12


def test_the_pass_over_the_chunks_makes_no_dw(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles make it: once, not twice."""
    asked: list[tuple[bool, bool, bool]] = []

    def watched(call: ExitCall, **options: Any) -> ExitResult:
        asked.append((call.need_hidden, call.need_weight, call.need_bias))
        return run_exit(call, **options)

    monkeypatch.setattr(functional, "run_exit", watched)
    case = make_case()
    sums = {"grad_weight": torch.zeros_like(case["weight"]), "grad_bias": torch.zeros_like(case["bias"])}
    arguments = (case["hidden"], case["weight"], case["target"])
    rule = make_feedback("dense", HIDDEN, VOCAB)
    exit_step(*arguments, feedback=rule, linear_bias=case["bias"], preset="memory", **sums)
    assert asked == [(True, False, False)]
    assert all(tensor.any() for tensor in sums.values())


def test_the_chunks_have_the_room_of_a_dw_that_is_still_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    lent: list[int] = []

    def watched(call: ExitCall, **options: Any) -> ExitResult:
        lent.append(call.spare_bytes)
        return run_exit(call, **options)

    monkeypatch.setattr(operators, "run_exit", watched)
    case, rule = make_case(), make_feedback("dense", HIDDEN, VOCAB)
    for preset, is_frozen in (("memory", False), ("memory", True), ("fast", False)):
        weight = case["weight"].detach().requires_grad_(not is_frozen)
        exit_cross_entropy(case["hidden"], weight, case["target"], feedback=rule, preset=preset)
    assert lent == [case["weight"].nbytes, 0, 0]


def test_frozen_parts_get_nothing() -> None:
    case, rule = make_case(), make_feedback("dense", HIDDEN, VOCAB)
    hidden = case["hidden"].requires_grad_()
    exit_cross_entropy(hidden, case["weight"], case["target"], feedback=rule, preset="memory").backward()
    assert hidden.grad is not None
    assert case["weight"].grad is None


def test_no_tokens() -> None:
    rule = make_feedback("dense", HIDDEN, VOCAB)
    weight = torch.randn(VOCAB, HIDDEN, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64)
    exit_cross_entropy(torch.empty(0, HIDDEN), weight, target, feedback=rule, preset="memory").backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_double_backward_is_refused() -> None:
    case, rule = make_case(), make_feedback("dense", HIDDEN, VOCAB)
    weight = case["weight"].requires_grad_()
    loss = exit_cross_entropy(case["hidden"], weight, case["target"], feedback=rule, preset="memory")
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()


def test_compiled_and_checked_as_an_operator() -> None:
    case, rule = make_case(), make_feedback("dense", HIDDEN, VOCAB)
    weight, hidden = case["weight"].requires_grad_(), case["hidden"]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return exit_cross_entropy(hidden, weight, target, feedback=rule, preset="memory")

    compiled(hidden, weight, case["target"]).backward()
    expected = reference_exit(hidden, weight, case["target"], feedback=rule)
    assert relative(weight.grad, expected.weight_grad) < 1e-12


def test_autocast_around_the_backward_does_not_change_dw_and_db() -> None:
    case = make_case()
    rule = make_feedback("dense", HIDDEN, VOCAB, seed=0)
    grads = []
    for dtype in (torch.float64, torch.float32):
        weight = case["weight"].to(dtype, copy=True).requires_grad_()
        bias = case["bias"].to(dtype, copy=True).requires_grad_()
        loss = exit_cross_entropy(
            case["hidden"].to(dtype), weight, case["target"], feedback=rule, linear_bias=bias, preset="memory"
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loss.backward()
        grads.append((weight.grad, bias.grad))
    for ours, exact in zip(*reversed(grads), strict=True):
        assert relative(ours, exact) < 1e-5


def test_an_unknown_preset() -> None:
    case, rule = make_case(), make_feedback("dense", HIDDEN, VOCAB)
    with pytest.raises(ValueError, match=r"preset must be one of 'fast', 'memory', got 'small'"):
        exit_cross_entropy(case["hidden"], case["weight"], case["target"], feedback=rule, preset="small")  # type: ignore[arg-type]


@pytest.mark.parametrize(("offset", "peak"), [(0.0, 2.2), (1e4, 0.5)], ids=["confident", "far from zero"])
def test_dw_is_as_good_as_plain_pytorch(offset: float, peak: float) -> None:
    """In fp32, where a probability near one, or a rounded log-sum-exp, would lose what is small next to it."""
    width, generator = 64, torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, width, generator=generator)
    target = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)
    hidden = 0.1 * torch.randn(NUM_TOKENS, width, generator=generator)
    hidden += peak * torch.nn.functional.normalize(weight[target])
    bias = torch.full((VOCAB,), offset)

    def plain_grad(dtype: torch.dtype) -> Tensor:
        leaf = weight.to(dtype).requires_grad_()
        logits = torch.nn.functional.linear(hidden.to(dtype), leaf, bias.to(dtype))
        torch.nn.functional.cross_entropy(logits, target).backward()
        assert leaf.grad is not None
        return leaf.grad.double()

    total, rule = torch.zeros_like(weight), make_feedback("dense", width, VOCAB)
    exit_step(hidden, weight, target, feedback=rule, linear_bias=bias, grad_weight=total, preset="memory")
    exact = plain_grad(torch.float64)
    assert relative(total.double(), exact) < 2 * relative(plain_grad(torch.float32), exact) + 1e-7


def test_in_bf16_the_logits_of_a_tile_are_as_exact_as_those_of_a_chunk() -> None:
    case = make_case()
    rule = make_feedback("dense", HIDDEN, VOCAB, seed=0)
    hidden, weight, target = 3 * case["hidden"].bfloat16(), case["weight"].bfloat16(), case["target"]
    totals = [torch.zeros(VOCAB, HIDDEN) for _ in range(2)]
    for total, preset in zip(totals, ("fast", "memory"), strict=True):
        exit_step(hidden, weight, target, feedback=rule, grad_weight=total, preset=preset)
    assert relative(totals[1], totals[0]) < 1e-5


def test_the_gradient_of_a_bf16_weight_is_that_of_the_other_preset() -> None:
    case = make_case()
    rule = make_feedback("dense", HIDDEN, VOCAB, seed=0)
    grads = []
    for preset in ("fast", "memory"):
        weight = case["weight"].bfloat16().requires_grad_()
        exit_cross_entropy(case["hidden"].bfloat16(), weight, case["target"], feedback=rule, preset=preset).backward()
        assert weight.grad is not None
        grads.append(weight.grad.float())
    # Both are rounded to bf16 once.
    assert relative(grads[1], grads[0]) < 2**-8
