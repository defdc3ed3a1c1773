"""A whole exit on the Triton stages against the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from localexit.exits import functional, tiled
from localexit.exits.chunked import PLAIN, Stages
from localexit.exits.functional import Preset, WeightGrad, exit_step
from localexit.exits.reference import reference_exit
from localexit.feedback import RULES, Feedback, WeightMirror, make_feedback
from localexit.kernels import stages
from localexit.kernels.stages import TRITON

# The interpreter computes with numpy, which warns of the infinities that the kernels rely on.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

NUM_TOKENS, HIDDEN, VOCAB = 7, 24, 300
RULE_NAMES = [name for name, entry in RULES.items() if not entry.rule.needs_logits]


@pytest.fixture(autouse=True)
def _triton_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """`supported` asks for a GPU; the interpreter needs none."""
    monkeypatch.setattr(functional, "stages_of", lambda _: TRITON)


def make_rule(name: str) -> Feedback:
    rule = make_feedback(name, HIDDEN, VOCAB, seed=3)
    if isinstance(rule, WeightMirror):
        rule.rows.normal_(generator=torch.Generator().manual_seed(5))
    return rule


def make_case() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator) * 0.3
    bias = torch.randn(VOCAB, generator=generator)
    target = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)
    target[2] = -100
    hidden[2] = torch.nan
    token_weight = torch.randn(NUM_TOKENS, generator=generator)
    return hidden, weight, bias, target, token_weight


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-20))


@pytest.mark.parametrize("preset", ["fast", "memory"])
@pytest.mark.parametrize("name", ["dense", "mirror_sampled", "transport_sampled"])
def test_layout_of_the_arguments_changes_nothing(name: str, preset: Preset) -> None:
    hidden, weight, bias, target, token_weight = make_case()
    grads = []
    for strided in (False, True):
        given = {"linear_bias": bias, "token_weight": token_weight, "target": target, "input": hidden}
        if strided:
            given = {key: torch.stack([value, value + 1], dim=-1)[..., 0] for key, value in given.items()}
        grad_weight, grad_bias = torch.zeros(VOCAB, HIDDEN), torch.zeros(VOCAB)
        step = exit_step(
            linear_weight=weight.T.contiguous().T if strided else weight,
            feedback=make_rule(name),
            grad_weight=grad_weight,
            grad_bias=grad_bias,
            preset=preset,
            **given,
        )
        assert step.feedback is not None
        grads.append((step.loss, step.feedback, grad_weight, grad_bias))
    for plain, strided_one in zip(*grads, strict=True):
        torch.testing.assert_close(strided_one, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_rows", [2, 100])
@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-2, "softcap": 5.0}], ids=["plain", "z_loss-softcap"])
@pytest.mark.parametrize("name", RULE_NAMES)
def test_exit_equals_the_oracle(name: str, options: dict[str, Any], chunk_rows: int) -> None:
    hidden, weight, bias, target, token_weight = make_case()
    rule = make_rule(name)
    grad_weight, grad_bias = torch.zeros(VOCAB, HIDDEN), torch.zeros(VOCAB)
    step = exit_step(
        hidden,
        weight,
        target,
        feedback=rule,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
        linear_bias=bias,
        token_weight=token_weight,
        chunk_bytes=chunk_rows * VOCAB * 4,
        return_stats=True,
        **options,
    )
    expected = reference_exit(
        hidden, weight, target, feedback=rule, linear_bias=bias, token_weight=token_weight, **options
    )
    assert relative(step.loss, expected.loss) < 1e-5
    assert relative(step.feedback, expected.feedback) < 1e-4
    assert relative(grad_weight, expected.weight_grad) < 1e-5
    assert relative(grad_bias, expected.bias_grad) < 1e-5
    assert step.stats is not None
    assert torch.equal(step.stats.argmax, expected.argmax)
    assert torch.allclose(step.stats.entropy.double(), expected.entropy, atol=1e-4)


@pytest.mark.parametrize("chunk_rows", [2, 100])
@pytest.mark.parametrize("name", RULE_NAMES)
def test_with_the_product_in_the_kernel_it_equals_the_oracle(
    name: str, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def take(weight: Tensor) -> bool:
        taken.append(weight.shape)
        return True

    monkeypatch.setattr(stages, "takes_product", take)
    hidden, weight, _, target, token_weight = make_case()
    weight = weight[:296].contiguous()
    target = torch.where(target < 296, target, 1)
    rule = make_feedback(name, HIDDEN, 296, seed=3)
    if isinstance(rule, WeightMirror):
        rule.rows.normal_(generator=torch.Generator().manual_seed(5))
    grad_weight = torch.zeros(296, HIDDEN)
    options: dict[str, Any] = {"feedback": rule, "token_weight": token_weight, "z_loss": 1e-2}
    step = exit_step(hidden, weight, target, grad_weight=grad_weight, chunk_bytes=chunk_rows * 296 * 4, **options)
    expected = reference_exit(hidden, weight, target, **options)
    assert taken
    assert relative(step.loss, expected.loss) < 1e-5
    assert relative(step.feedback, expected.feedback) < 1e-4
    assert relative(grad_weight, expected.weight_grad) < 1e-5


def test_poisoned_buffers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is read was written: memory that starts as NaN gives the same result."""
    hidden, weight, _, target, _ = make_case()
    rule = make_rule("mirror_sampled")
    clean = exit_step(hidden, weight, target, feedback=rule).feedback
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: Any, **options: Any) -> Tensor:
        tensor = new_empty(self, *args, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(77)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    assert torch.equal(exit_step(hidden, weight, target, feedback=rule).feedback, clean)


def test_nan_in_the_weight_after_dw_does_not_reach_the_feedback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage boundary of the transport proof, on the kernels."""
    hidden, weight, _, target, _ = make_case()
    rule = make_rule("mirror_sampled")
    clean = exit_step(hidden, weight, target, feedback=rule).feedback

    def poisoning(*args: Any) -> Tensor:
        weight.fill_(torch.nan)
        return TRITON.feedback(*args)

    poisoned = replace(TRITON, feedback=poisoning)
    monkeypatch.setattr(functional, "stages_of", lambda _: poisoned)
    assert torch.equal(exit_step(hidden, weight, target, feedback=rule).feedback, clean)


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-2, "softcap": 5.0}, {"label_smoothing": 0.1}])
def test_the_memory_preset_equals_the_oracle(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiled.TILE_BYTES, "cpu", 64 * NUM_TOKENS * 4)
    hidden, weight, bias, target, token_weight = make_case()
    rule = make_rule("anchors")
    grad_weight, grad_bias = torch.zeros(VOCAB, HIDDEN), torch.zeros(VOCAB)
    extra = {"feedback": rule, "linear_bias": bias, "token_weight": token_weight, **options}
    step = exit_step(hidden, weight, target, grad_weight=grad_weight, grad_bias=grad_bias, preset="memory", **extra)
    expected = reference_exit(hidden, weight, target, **extra)
    assert relative(step.feedback, expected.feedback) < 1e-4
    assert relative(grad_weight, expected.weight_grad) < 1e-5
    assert relative(grad_bias, expected.bias_grad) < 1e-5


def test_the_memory_preset_with_the_product_in_the_kernel_equals_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "takes_product", lambda _: True)
    monkeypatch.setitem(tiled.TILE_BYTES, "cpu", 128 * NUM_TOKENS * 4)
    hidden, weight, _, target, token_weight = make_case()
    grad_weight = torch.zeros(VOCAB, HIDDEN)
    extra: dict[str, Any] = {"feedback": make_rule("anchors"), "token_weight": token_weight}
    exit_step(hidden, weight, target, grad_weight=grad_weight, preset="memory", **extra)
    assert relative(grad_weight, reference_exit(hidden, weight, target, **extra).weight_grad) < 1e-5


@pytest.mark.parametrize("chunk_rows", [2, 100])
@pytest.mark.parametrize("name", ["dense", "mirror_sampled"])
def test_a_filtered_dw_equals_the_plain_one(name: str, chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, target, token_weight = make_case()
    # Peaked: most groups of tokens have no error worth the name.
    hidden = hidden + 0.9 * weight[target.clamp_min(0)] / weight.std()
    weight = 4 * weight

    def grad(stages: Stages, weight_grad: WeightGrad) -> Tensor:
        monkeypatch.setattr(functional, "stages_of", lambda _: stages)
        total = torch.full((VOCAB, HIDDEN), 1e-6)
        options = {"feedback": make_rule(name), "token_weight": token_weight, "chunk_bytes": chunk_rows * VOCAB * 4}
        exit_step(hidden, weight, target, grad_weight=total, weight_grad=weight_grad, **options)
        return total - 1e-6

    filtered = grad(TRITON, "filtered")
    assert relative(filtered, grad(PLAIN, "filtered").double()) < 1e-4
    assert relative(filtered, grad(PLAIN, "exact").double()) > 1e-3


def test_a_filtered_dw_is_added_to_an_accumulator_that_lies_column_by_column() -> None:
    hidden, weight, _, target, _ = make_case()
    totals = torch.zeros(VOCAB, HIDDEN), torch.zeros(HIDDEN, VOCAB).T
    for total in totals:
        exit_step(hidden, weight, target, feedback=make_rule("dense"), grad_weight=total, weight_grad="filtered")
    assert bool(totals[0].any())
    assert torch.equal(*totals)
