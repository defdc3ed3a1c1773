"""What must not matter, or must come out in proportion, whatever the numbers: anchors, state and draws held fixed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.cases import RULES, Inputs, make_inputs, run
from helpers.direct import Draws, apply, cross_entropy_error, fixed_draws
from helpers.fuzzed import NUM_EXAMPLES, Exit, assert_near, exits, fuzz_settings, rules
from localexit import exit_cross_entropy
from localexit.feedback import Feedback

pytestmark = [
    pytest.mark.filterwarnings("ignore:feedback 'parallel:UserWarning"),
    pytest.mark.filterwarnings("ignore:the nucleus of some tokens:UserWarning"),
    pytest.mark.timeout(1800),
]

# In units of an error of order one.
FLOOR = 1e-12
# They draw by the order of the vocabulary.
DRAWING = ("anchors_sampled", "anchors_shared", "mirror_sampled", "transport_sampled")


@st.composite
def cases(draw: st.DrawFn, name: str) -> tuple[Inputs, Feedback, Draws]:
    """An exit's inputs, a rule for them, and what it draws, to be passed on as it is."""
    sizes = [draw(st.sampled_from(sizes)) for sizes in ((1, 2, 5, 9), (1, 3, 8), (2, 7, 31, 129))]
    inputs = make_inputs(*sizes, bias=draw(st.booleans()), seed=draw(st.integers(0, 2**31)))
    rule = draw(rules(name, inputs))
    return inputs, rule, fixed_draws(rule, inputs)


def permutation(size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("num_examples", NUM_EXAMPLES)
@pytest.mark.parametrize("name", RULES)
def test_a_constant_on_all_logits_changes_nothing(name: str, num_examples: int) -> None:
    """Without z-loss and soft cap, which see the size of the logits."""

    @fuzz_settings(num_examples)
    @given(exits(name), st.sampled_from([-30.0, 0.5, 1e3]))
    def check(case: Exit, constant: float) -> None:
        options = {**case.options, "z_loss": 0.0, "softcap": None, "reduction": "sum"}
        options.pop("num_items", None)
        bias = torch.zeros(case.inputs.vocab, dtype=torch.float64) if case.inputs.bias is None else case.inputs.bias
        plain = run(replace(case.inputs, bias=bias), case.rule, **options).items()
        shifted = run(replace(case.inputs, bias=bias + constant), case.rule, **options).items()
        for key, tensor in shifted.items():
            assert (tensor - plain[key]).abs().sum() <= 1e-9 * (1 + plain[key].abs().sum()), key

    check()


@pytest.mark.parametrize("num_examples", NUM_EXAMPLES)
@pytest.mark.parametrize("name", RULES)
def test_tokens_in_another_order_get_the_same(name: str, num_examples: int) -> None:
    @fuzz_settings(num_examples)
    @given(cases(name))
    def check(case: tuple[Inputs, Feedback, Draws]) -> None:
        inputs, rule, draws = case
        order = permutation(len(inputs.hidden))
        moved = replace(inputs, hidden=inputs.hidden[order], target=inputs.target[order])
        error = cross_entropy_error(inputs)
        expected = apply(rule, error, inputs, draws=draws)[order]
        assert_near(apply(rule, error[order], moved, draws=draws.of_rows(order)), expected, tolerance=1e-9, floor=FLOOR)

    check()


@pytest.mark.parametrize("num_examples", NUM_EXAMPLES)
@pytest.mark.parametrize("name", RULES)
def test_a_vocabulary_in_another_order_gives_the_same(name: str, num_examples: int) -> None:
    """With its codes moved along; of two equal entries, a top-k may take either. Rules that draw keep everything."""

    @fuzz_settings(num_examples)
    @given(cases(name))
    def check(case: tuple[Inputs, Feedback, Draws]) -> None:
        inputs, rule, draws = case
        if name in DRAWING:
            rule.topk = inputs.vocab
        order = permutation(inputs.vocab)
        expected = apply(rule, cross_entropy_error(inputs), inputs, draws=draws)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(inputs.vocab))
        bias = None if inputs.bias is None else inputs.bias[order]
        moved = replace(inputs, weight=inputs.weight[order], target=place[inputs.target], bias=bias)
        # No width of `cases` is a size of a vocabulary.
        for codes in rule.buffers():
            if codes.shape[:1] == (inputs.vocab,):
                codes.copy_(codes[order].clone())
        actual = apply(rule, cross_entropy_error(moved), moved, draws=draws.of_vocabulary(order))
        assert_near(actual, expected, tolerance=1e-9, floor=FLOOR)

    check()


@pytest.mark.parametrize("num_examples", NUM_EXAMPLES)
@pytest.mark.parametrize("name", RULES)
def test_a_factor_on_the_error_is_a_factor_on_the_feedback(name: str, num_examples: int) -> None:
    @fuzz_settings(num_examples)
    @given(cases(name), st.sampled_from([-1.0, 0.0, 1e-8, 3.0, -1e8]))
    def check(case: tuple[Inputs, Feedback, Draws], factor: float) -> None:
        inputs, rule, draws = case
        error = cross_entropy_error(inputs)
        expected = factor * apply(rule, error, inputs, draws=draws)
        actual = apply(rule, factor * error, inputs, draws=draws)
        assert_near(actual, expected, tolerance=1e-9, floor=FLOOR * abs(factor))

    check()


@pytest.mark.parametrize("num_examples", NUM_EXAMPLES)
@pytest.mark.parametrize("name", RULES)
def test_parts_of_a_batch_are_the_batch(name: str, num_examples: int) -> None:
    @fuzz_settings(num_examples)
    @given(cases(name), st.integers(1, 4))
    def check(case: tuple[Inputs, Feedback, Draws], size: int) -> None:
        inputs, rule, draws = case
        error = cross_entropy_error(inputs)
        whole = apply(rule, error, inputs, draws=draws)
        for rows in torch.arange(len(error)).split(size):
            part = replace(inputs, hidden=inputs.hidden[rows], target=inputs.target[rows])
            assert_near(
                apply(rule, error[rows], part, draws=draws.of_rows(rows)), whole[rows], tolerance=1e-9, floor=FLOOR
            )

    check()


@pytest.mark.parametrize("num_examples", NUM_EXAMPLES)
@pytest.mark.parametrize("name", RULES)
def test_ignored_rows_may_as_well_be_absent(name: str, num_examples: int) -> None:
    """At the end of the batch, where they shift no other token's number, by which it draws."""

    @fuzz_settings(num_examples)
    @given(exits(name), st.integers(1, 3))
    def check(case: Exit, num_ignored: int) -> None:
        options = {key: value for key, value in case.options.items() if key not in ("token_weight", "reduction")}
        inputs = case.inputs
        rest = torch.full((num_ignored, inputs.width), torch.nan, dtype=torch.float64)
        more = replace(
            inputs,
            hidden=torch.cat([inputs.hidden, rest]),
            target=torch.cat([inputs.target, inputs.target.new_full((num_ignored,), options["ignore_index"])]),
        )
        without, padded = run(inputs, case.rule, **options).items(), run(more, case.rule, **options).items()
        assert not padded["feedback"][len(inputs.hidden) :].any()
        padded["feedback"] = padded["feedback"][: len(inputs.hidden)]
        for key, tensor in padded.items():
            assert_near(tensor, without[key], tolerance=1e-9, floor=FLOOR)

    check()


@pytest.mark.parametrize("num_examples", NUM_EXAMPLES)
def test_no_loss_is_negative_and_no_probability_above_one(num_examples: int) -> None:
    """For token weights that are not negative."""

    @fuzz_settings(num_examples)
    @given(exits("dense"), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    def check(case: Exit, dtype: torch.dtype) -> None:
        inputs, options = case.to(dtype), dict(case.options)
        if "token_weight" in options:
            options["token_weight"] = options["token_weight"].abs()
        loss, stats = exit_cross_entropy(
            inputs.hidden,
            inputs.weight,
            inputs.target,
            feedback=case.rule,
            linear_bias=inputs.bias,
            return_stats=True,
            **options,
        )
        assert (loss >= -1e-6).all()
        assert (stats.log_prob <= 0).all()
        assert (stats.entropy >= -1e-5).all()

    check()
