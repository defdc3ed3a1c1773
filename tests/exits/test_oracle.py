"""Every rule and option against the fp64 oracle, in fp64 by number and in lower precision by budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.budget import assert_close, assert_within_budget
from helpers.cases import IGNORED, RULES, Inputs, expected, make_inputs, run, small_rule
from helpers.plain import plain_exit
from localexit import exit_cross_entropy, exit_step
from localexit.exits.reference import reference_exit
from localexit.feedback import Feedback

OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "num_items": {"num_items": 3},
    "num_items_tensor": {"num_items": torch.tensor(3)},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.3},
    "softcap": {"softcap": 2.0},
    "everything": {"label_smoothing": 0.1, "z_loss": 0.3, "softcap": 2.0, "num_items": 11},
}

# (N, D, V) and what it adds
SHAPES = {
    "no_token": (0, 5, 11),
    "one_token": (1, 5, 11),
    "many_tokens": (257, 7, 40),
    "vocabulary_of_two_draw_groups": (7, 9, 256),
    "one_more_than_a_draw_group": (7, 9, 129),
    "one_word": (5, 9, 1),
    "two_words": (5, 9, 2),
    "width_one": (6, 1, 20),
}


def signed_weights(inputs: Inputs) -> Tensor:
    """Token weights of both signs, one zero, NaN on an ignored row."""
    weights = torch.linspace(-1.5, 2.0, inputs.target.numel(), dtype=torch.float64).reshape(inputs.target.shape)
    weights[inputs.target == IGNORED] = torch.nan
    return weights


def assert_matches_oracle(inputs: Inputs, rule: Feedback, *, tolerance: float = 1e-10, **options: Any) -> None:
    actual, truth = run(inputs, rule, **options).items(), expected(inputs, rule, **options).items()
    assert actual.keys() == truth.keys()
    for name, tensor in actual.items():
        assert torch.isfinite(tensor).all(), name
        assert_close(tensor, truth[name], tolerance=tolerance)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", RULES)
def test_options(name: str, option: str) -> None:
    inputs = make_inputs(bias=True, ignored=2)
    assert_matches_oracle(inputs, small_rule(name, inputs.width, inputs.vocab), **OPTIONS[option])


@pytest.mark.parametrize("name", RULES)
def test_without_bias(name: str) -> None:
    inputs = make_inputs()
    assert_matches_oracle(inputs, small_rule(name, inputs.width, inputs.vocab))


@pytest.mark.parametrize("option", ["mean", "everything"])
@pytest.mark.parametrize("name", RULES)
def test_token_weights_of_both_signs(name: str, option: str) -> None:
    inputs = make_inputs(bias=True, ignored=2)
    rule = small_rule(name, inputs.width, inputs.vocab)
    assert_matches_oracle(inputs, rule, token_weight=signed_weights(inputs), **OPTIONS[option])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", RULES)
def test_shapes(name: str, shape: str) -> None:
    inputs = make_inputs(*SHAPES[shape], bias=True, ignored=min(2, SHAPES[shape][0] // 2))
    assert_matches_oracle(inputs, small_rule(name, inputs.width, inputs.vocab), **OPTIONS["everything"])


@pytest.mark.parametrize("is_weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("name", RULES)
def test_reduction_none_with_any_upstream_gradient(name: str, is_weighted: bool) -> None:
    inputs = make_inputs(bias=True, ignored=2)
    rule = small_rule(name, inputs.width, inputs.vocab)
    upstream = torch.randn(inputs.target.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    upstream[inputs.target == IGNORED] = torch.nan
    weight = signed_weights(inputs) if is_weighted else None
    options = {"reduction": "none", "token_weight": weight, "label_smoothing": 0.1, "softcap": 3.0}
    assert_matches_oracle(inputs, rule, upstream=upstream, **options)


@pytest.mark.parametrize("upstream", [1.0, -0.3, 0.0])
@pytest.mark.parametrize("name", RULES)
def test_scalar_upstream_gradient(name: str, upstream: float) -> None:
    inputs = make_inputs()
    rule = small_rule(name, inputs.width, inputs.vocab)
    assert_matches_oracle(inputs, rule, upstream=torch.tensor(upstream, dtype=torch.float64))


@pytest.mark.parametrize("rows_a_chunk", [1, 2, 3, 6])
@pytest.mark.parametrize("name", RULES)
def test_feedback_does_not_depend_on_the_chunk_size(name: str, rows_a_chunk: int) -> None:
    inputs = make_inputs(bias=True, ignored=2)
    rule = small_rule(name, inputs.width, inputs.vocab)
    whole = run(inputs, rule).items()
    chunked = run(inputs, rule, chunk_bytes=rows_a_chunk * inputs.vocab * 8).items()
    for key, tensor in chunked.items():
        assert_close(tensor, whole[key], tolerance=1e-13)


def transposed(inputs: Inputs) -> Inputs:
    hidden = inputs.hidden.T.contiguous().T.reshape(2, 3, -1).transpose(0, 1)
    return replace(inputs, hidden=hidden, target=inputs.target.reshape(2, 3).T)


def expanded(inputs: Inputs) -> Inputs:
    """One hidden state for all tokens, by stride 0."""
    return replace(inputs, hidden=inputs.hidden[:1].expand(6, -1))


def strided(inputs: Inputs) -> Inputs:
    return replace(inputs, hidden=torch.stack([inputs.hidden, inputs.hidden], -1)[..., 0])


@pytest.mark.parametrize("layout", [transposed, expanded, strided])
@pytest.mark.parametrize("name", RULES)
def test_hidden_states_of_any_layout(name: str, layout: Any) -> None:
    inputs = layout(make_inputs(6, 9, 40))
    assert not inputs.hidden.is_contiguous()
    assert_matches_oracle(inputs, small_rule(name, inputs.width, inputs.vocab))


def make_twins(inputs: Inputs, rule: Feedback) -> Inputs:
    """Tokens 2i and 2i + 1 get the same row of W and the same codes: it does not matter which of them a top-k takes."""
    for buffer in rule.buffers():
        if buffer.shape[:1] == (inputs.vocab,):
            buffer[1::2] = buffer[::2]
    weight = inputs.weight.clone()
    weight[1::2] = weight[::2]
    return replace(inputs, weight=weight)


@pytest.mark.parametrize("name", RULES)
def test_equal_logits(name: str) -> None:
    inputs = make_inputs(7, 9, 140)
    rule = small_rule(name, inputs.width, inputs.vocab)
    assert_matches_oracle(make_twins(inputs, rule), rule)


@pytest.mark.parametrize("name", RULES)
def test_all_logits_equal(name: str) -> None:
    """W = 0: which tokens a top-k or a nucleus takes is anyone's choice; without them the oracle agrees."""
    inputs = make_inputs(7, 9, 140)
    inputs = replace(inputs, weight=torch.zeros_like(inputs.weight))
    rule = small_rule(name, inputs.width, inputs.vocab)
    chooses = not rule.is_additive or name == "parallel_topmass"
    if chooses:
        assert torch.isfinite(run(inputs, rule).feedback).all()
    else:
        assert_matches_oracle(inputs, rule)


@pytest.mark.parametrize("name", ["hybrid", "mirror_sampled", "transport_sampled"])
@pytest.mark.parametrize("topk", [0, 10, 11, 50])
def test_topk_up_to_and_beyond_the_vocabulary(name: str, topk: int) -> None:
    inputs = make_inputs(6, 9, 11)
    assert_matches_oracle(inputs, small_rule(name, inputs.width, inputs.vocab, topk=topk), label_smoothing=0.1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", RULES)
def test_all_rows_ignored(name: str, reduction: str) -> None:
    inputs = make_inputs(6, 9, 40, ignored=6, bias=True)
    upstream = torch.ones(6, dtype=torch.float64) if reduction == "none" else None
    outcome = run(inputs, small_rule(name, 9, 40), reduction=reduction, upstream=upstream)
    assert all((tensor == 0).all() for tensor in outcome.items().values())


@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 7])
@pytest.mark.parametrize("name", RULES)
def test_ignore_index_may_be_a_token(name: str, ignore_index: int) -> None:
    inputs = make_inputs(7, 9, 40)
    inputs.target[2:4] = ignore_index
    assert_matches_oracle(inputs, small_rule(name, 9, 40), ignore_index=ignore_index)


@pytest.mark.parametrize("name", RULES)
def test_int32_targets(name: str) -> None:
    inputs = make_inputs(7, 9, 40, ignored=1)
    assert_matches_oracle(replace(inputs, target=inputs.target.int()), small_rule(name, 9, 40))


def with_offset_in_the_bias(inputs: Inputs) -> Inputs:
    return replace(inputs, bias=torch.full((inputs.vocab,), 1e4, dtype=torch.float64))


def with_offset_in_the_logits(inputs: Inputs) -> Inputs:
    """A direction that every token of the vocabulary has, and every hidden state."""
    hidden, weight = inputs.hidden.clone(), inputs.weight.clone()
    hidden[:, 0], weight[:, 0] = 100.0, 100.0
    return replace(inputs, hidden=hidden, weight=weight)


@pytest.mark.parametrize("offset", [with_offset_in_the_bias, with_offset_in_the_logits])
@pytest.mark.parametrize("name", RULES)
def test_logits_with_an_offset_of_ten_thousand(name: str, offset: Any) -> None:
    inputs = offset(make_inputs(7, 9, 40))
    rule = small_rule(name, 9, 40)
    # The logits alone lose four digits of sixteen.
    assert_matches_oracle(inputs, rule, tolerance=1e-9)
    low = inputs.to(torch.float32)
    actual, plain, exact = run(low, rule).items(), plain_exit(low, rule).items(), expected(low, rule).items()
    for key, tensor in actual.items():
        assert_within_budget(tensor, plain[key], exact[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("option", ["mean", "sum", "everything"])
@pytest.mark.parametrize("name", RULES)
def test_low_precision_by_budget(name: str, option: str, dtype: torch.dtype) -> None:
    is_everything = option == "everything"
    inputs = make_inputs(33, 25, 300, bias=is_everything, ignored=3 * is_everything).to(dtype)
    rule = small_rule(name, inputs.width, inputs.vocab)
    options = dict(OPTIONS[option])
    if is_everything:
        options |= {"softcap": 5.0, "z_loss": 0.01, "token_weight": signed_weights(inputs).float()}
    actual = run(inputs, rule, **options)
    plain, exact = plain_exit(inputs, rule, **options).items(), expected(inputs, rule, **options).items()
    assert actual.feedback.dtype == actual.weight_grad.dtype == dtype
    for key, tensor in actual.items().items():
        assert_within_budget(tensor, plain[key], exact[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", RULES)
def test_confident_targets_by_budget(name: str, dtype: torch.dtype) -> None:
    """p[gold] near 1: the errors are differences of nearly equal numbers."""
    inputs = make_inputs(33, 25, 300)
    inputs.weight[inputs.target] += 0.4 * inputs.hidden
    inputs = inputs.to(dtype)
    rule = small_rule(name, inputs.width, inputs.vocab)
    actual, plain = run(inputs, rule, reduction="sum").items(), plain_exit(inputs, rule, reduction="sum").items()
    exact = expected(inputs, rule, reduction="sum").items()
    for key, tensor in actual.items():
        assert_within_budget(tensor, plain[key], exact[key])


# The oracle's equations of the other two are loops over the vocabulary; they sum over it by a product like "dense".
@pytest.mark.parametrize("name", [name for name in RULES if name not in ("sketch", "hybrid")])
def test_large_vocabulary_in_fp32(name: str) -> None:
    """Sums over V stay accurate: not one term after the other."""
    inputs = make_inputs(5, 8, 20_000, seed=2).to(torch.float32)
    options = {"nucleus_cap": 20_000} if name == "parallel_topmass" else {}
    rule = small_rule(name, inputs.width, inputs.vocab, **options)
    actual, plain, exact = run(inputs, rule).items(), plain_exit(inputs, rule).items(), expected(inputs, rule).items()
    for key, tensor in actual.items():
        assert_within_budget(tensor, plain[key], exact[key])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", RULES)
def test_gradcheck_of_weight_bias_and_token_weight(name: str, reduction: str) -> None:
    inputs = make_inputs(4, 3, 6, bias=True, ignored=1)
    rule = small_rule(name, 3, 6)
    hidden = inputs.hidden.requires_grad_()
    leaves = [inputs.weight, inputs.bias, torch.linspace(-1, 2, 4, dtype=torch.float64)]

    def loss(weight: Tensor, bias: Tensor, token_weight: Tensor) -> Tensor:
        return exit_cross_entropy(  # type: ignore[return-value]
            hidden,
            weight,
            inputs.target,
            feedback=rule,
            linear_bias=bias,
            token_weight=token_weight,
            reduction=reduction,
            label_smoothing=0.1,
            z_loss=0.3,
            softcap=4.0,
        )

    assert torch.autograd.gradcheck(loss, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("name", RULES)
def test_exit_step_equals_the_differentiable_form(name: str) -> None:
    inputs = make_inputs(bias=True, ignored=2)
    rule = small_rule(name, inputs.width, inputs.vocab)
    options = {"token_weight": signed_weights(inputs), "label_smoothing": 0.1}
    truth = run(inputs, rule, **options)
    grad_weight, grad_bias = torch.ones_like(inputs.weight), torch.full((inputs.vocab,), 2.0, dtype=torch.float64)
    step = exit_step(
        inputs.hidden,
        inputs.weight,
        inputs.target,
        feedback=rule,
        linear_bias=inputs.bias,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
        **options,
    )
    assert step.feedback is not None
    assert torch.equal(step.feedback, truth.feedback)
    assert torch.equal(step.loss, truth.loss)
    assert_close(grad_weight - 1, truth.weight_grad, tolerance=1e-12)
    assert truth.bias_grad is not None
    assert_close(grad_bias - 2, truth.bias_grad, tolerance=1e-12)


def test_exit_step_makes_only_what_is_asked_for() -> None:
    inputs = make_inputs()
    step = exit_step(
        inputs.hidden, inputs.weight, inputs.target, feedback=small_rule("dense", 9, 130), need_feedback=False
    )
    assert step.feedback is None
    assert step.stats is None


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "z_loss": 0.1}], ids=["plain", "softcap"])
def test_statistics(options: dict[str, float]) -> None:
    inputs = make_inputs(bias=True, ignored=2)
    rule = small_rule("anchors", inputs.width, inputs.vocab)
    _, stats = exit_cross_entropy(
        inputs.hidden,
        inputs.weight,
        inputs.target,
        feedback=rule,
        linear_bias=inputs.bias,
        return_stats=True,
        **options,
    )
    truth = reference_exit(
        inputs.hidden, inputs.weight, inputs.target, feedback=rule, linear_bias=inputs.bias, **options
    )
    for key in ("lse", "log_prob", "entropy"):
        assert_close(getattr(stats, key), getattr(truth, key))
    assert_close(truth.row_loss.sum() / 5, truth.loss)
    assert torch.equal(stats.argmax, truth.argmax)
    assert torch.equal(stats.is_correct, (truth.argmax == inputs.target))
    assert (int(stats.num_tokens), int(stats.num_anchors)) == (5, 4)
    assert (stats.feedback, stats.backend, bool(stats.bad_target)) == ("anchors", "torch", False)


def test_fewer_tokens_than_anchors_are_reported() -> None:
    inputs = make_inputs(7, 9, 40, ignored=4)
    rule = small_rule("anchors", 9, 40, num_anchors=5)
    _, stats = exit_cross_entropy(inputs.hidden, inputs.weight, inputs.target, feedback=rule, return_stats=True)
    assert int(stats.num_anchors) == 3
    assert_matches_oracle(inputs, rule)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_grad_computes_the_loss_only(reduction: str) -> None:
    inputs = make_inputs(ignored=2)
    rule = small_rule("transport", inputs.width, inputs.vocab)
    with torch.no_grad():
        loss = exit_cross_entropy(
            inputs.hidden.requires_grad_(), inputs.weight, inputs.target, feedback=rule, reduction=reduction
        )
    assert isinstance(loss, Tensor)
    assert not loss.requires_grad
    assert_close(loss, expected(inputs, rule, reduction=reduction).loss)


def test_gradients_accumulate_like_one_batch() -> None:
    """num_items: four parts of a batch, divided by the tokens of all, are the batch."""
    inputs = make_inputs(8, 9, 40, ignored=3)
    rule = small_rule("transport", 9, 40)
    whole = run(inputs, rule)
    count = int((inputs.target != IGNORED).sum())
    parts = [
        replace(inputs, hidden=h, target=t) for h, t in zip(inputs.hidden.split(2), inputs.target.split(2), strict=True)
    ]
    outcomes = [run(part, rule, num_items=count) for part in parts]
    assert_close(torch.stack([part.loss for part in outcomes]).sum(), whole.loss)
    assert_close(torch.stack([part.weight_grad for part in outcomes]).sum(0), whole.weight_grad)
    assert_close(torch.cat([part.feedback for part in outcomes]), whole.feedback)
