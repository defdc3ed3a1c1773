"""What every rule must be: homogeneous in each row, additive where it says so, itself again after loading."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from helpers.budget import assert_close
from helpers.cases import RULES, SMALL, make_inputs, run, small_rule
from helpers.direct import apply, cross_entropy_error, signed_error
from localexit import Feedback, make_feedback
from localexit.feedback.registry import from_spec

WIDTH, VOCAB = 9, 140


def same_options(name: str, *, seed: int | None = 3) -> Feedback:
    return make_feedback(name, WIDTH, VOCAB, seed=seed, **SMALL[name])


@pytest.mark.parametrize("make_error", [cross_entropy_error, signed_error])
@pytest.mark.parametrize("name", RULES)
def test_homogeneous_in_every_row(name: str, make_error: object) -> None:
    """f(diag(c) e) = diag(c) f(e) for any sign, whether c is a row weight or inside the error."""
    inputs, rule = make_inputs(7, WIDTH, VOCAB), small_rule(name, WIDTH, VOCAB)
    values = make_error(inputs)  # type: ignore[operator]
    factors = torch.tensor([1.0, -1.0, 2.0, -0.3, 0.0, 1e-6, -1e6], dtype=torch.float64)
    expected = factors[:, None] * apply(rule, values, inputs)
    assert expected.any()
    assert_close(apply(rule, factors[:, None] * values, inputs), expected, tolerance=1e-12)
    assert_close(apply(rule, values, inputs, scale=factors), expected, tolerance=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_additive_where_it_says_so(name: str) -> None:
    inputs, rule = make_inputs(7, WIDTH, VOCAB), small_rule(name, WIDTH, VOCAB)
    one, other = cross_entropy_error(inputs), signed_error(inputs)
    sum_of_both = apply(rule, one, inputs) + apply(rule, other, inputs)
    difference = (apply(rule, one + other, inputs) - sum_of_both).norm() / sum_of_both.norm()
    assert bool(difference < 1e-12) == rule.is_additive


@pytest.mark.parametrize("name", RULES)
def test_no_error_no_feedback(name: str) -> None:
    inputs, rule = make_inputs(7, WIDTH, VOCAB), small_rule(name, WIDTH, VOCAB)
    assert not apply(rule, torch.zeros(7, VOCAB, dtype=torch.float64), inputs).any()


@pytest.mark.parametrize("name", RULES)
def test_a_row_hears_nothing_of_other_rows(name: str) -> None:
    """The feedback of a token depends on the error of that token alone."""
    inputs, rule = make_inputs(7, WIDTH, VOCAB), small_rule(name, WIDTH, VOCAB)
    values = cross_entropy_error(inputs)
    changed = values.clone()
    changed[3] = signed_error(inputs)[3]
    is_other = torch.arange(7) != 3
    before, after = apply(rule, values, inputs), apply(rule, changed, inputs)
    assert_close(after[is_other], before[is_other], tolerance=1e-13)
    assert not torch.equal(after[3], before[3])


@pytest.mark.parametrize("other_seed", [3, 99, None])
@pytest.mark.parametrize("name", RULES)
def test_saved_and_loaded_it_gives_bitwise_the_same(name: str, other_seed: int | None) -> None:
    """Codes, what was learned, the step of the draws and their seed are all in the state_dict."""
    inputs = make_inputs(7, WIDTH, VOCAB)
    rule = small_rule(name, WIDTH, VOCAB)
    for _ in range(3):
        run(inputs, rule)
        rule.update()
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    loaded = same_options(name, seed=other_seed)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert int(loaded.step) == 3
    assert torch.equal(run(inputs, loaded).feedback, run(inputs, rule).feedback)
    for each in (rule, loaded):
        each.update()
    assert torch.equal(run(inputs, loaded).feedback, run(inputs, rule).feedback)


@pytest.mark.parametrize("name", RULES)
def test_all_that_a_rule_holds_is_in_its_state_dict(name: str) -> None:
    rule = same_options(name)
    assert not list(rule.parameters())
    assert {*dict(rule.named_buffers()), "_extra_state"} == set(rule.state_dict())


@pytest.mark.parametrize("name", RULES)
def test_spec_and_state_describe_the_rule(name: str) -> None:
    inputs, rule = make_inputs(7, WIDTH, VOCAB), small_rule(name, WIDTH, VOCAB)
    again = from_spec(rule.spec(), rule.state(inputs.weight))
    assert type(again) is type(rule)
    assert again.name == rule.name == name
    assert all(getattr(again, key) == getattr(rule, key) for key in rule.options)
    assert again.spec() == rule.spec()
    pairs = zip(again.state(inputs.weight), rule.state(inputs.weight), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)


@pytest.mark.parametrize("name", RULES)
def test_a_copy_is_independent(name: str) -> None:
    inputs, rule = make_inputs(7, WIDTH, VOCAB), small_rule(name, WIDTH, VOCAB)
    before = run(inputs, rule).feedback
    duplicate = copy.deepcopy(rule)
    run(inputs, duplicate)
    duplicate.update()
    assert int(rule.step) == 0
    assert torch.equal(run(inputs, rule).feedback, before)


@pytest.mark.parametrize("name", RULES)
def test_update_counts_steps(name: str) -> None:
    rule = same_options(name)
    for _ in range(2):
        rule.update()
    assert int(rule.step) == 2


def test_a_forgotten_update_is_noticed_after_512_forwards(recwarn: pytest.WarningsRecorder) -> None:
    rule = same_options("dense")
    for num_forwards in range(1, 514):
        rule.note_forward(0)
        assert len(recwarn) == (num_forwards >= 512)


@pytest.mark.parametrize("end", ["update", "discard"])
@pytest.mark.parametrize("name", RULES)
def test_forwards_are_counted_from_the_end_of_a_step(name: str, end: str, recwarn: pytest.WarningsRecorder) -> None:
    rule = same_options(name)
    for _ in range(2):
        for _ in range(511):
            rule.note_forward(0)
        getattr(rule, end)()
    assert not recwarn.list


@pytest.mark.parametrize("name", RULES)
def test_only_declared_draws_change_from_step_to_step_and_exit_to_exit(name: str) -> None:
    inputs, rule = make_inputs(17, WIDTH, VOCAB), small_rule(name, WIDTH, VOCAB)
    values = cross_entropy_error(inputs)
    is_random = bool(rule.num_anchors or rule.num_draws)
    first = apply(rule, values, inputs)
    assert torch.equal(apply(rule, values, inputs), first)
    assert torch.equal(apply(rule, values, inputs, exit_index=1), first) != is_random
    rule.step += 1
    assert torch.equal(apply(rule, values, inputs), first) != is_random


@pytest.mark.parametrize("name", RULES)
def test_repr_shows_the_options(name: str) -> None:
    text = repr(same_options(name))
    assert f"hidden_size={WIDTH}" in text
    assert all(f"{key}=" in text for key in same_options(name).options)
