"""Anchors that the exits of a step share: measured by the first, used by all, forgotten in the update."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from helpers.budget import assert_close
from helpers.cases import Inputs, expected, make_inputs, run
from helpers.largest import Largest
from localexit import SharedAnchors, exit_cross_entropy, exit_step, make_feedback
from localexit.exits.pairs import measured_rows
from localexit.exits.reference import reference_exit
from localexit.feedback.draws import choose_rows

WIDTH, VOCAB = 9, 40
# All entries of the error are kept: the feedback is e B, and B can be told from it.
WHOLE: dict[str, Any] = {"topk": VOCAB - 1, "num_draws": 1}


def shared_rule(**options: Any) -> SharedAnchors:
    rule = make_feedback("anchors_shared", WIDTH, VOCAB, seed=3, **{"num_anchors": 6, **options})
    assert isinstance(rule, SharedAnchors)
    return rule


def two_exits() -> tuple[Inputs, Inputs]:
    """Other hidden states, one unembedding."""
    first = make_inputs(25, WIDTH, VOCAB)
    return first, replace(make_inputs(25, WIDTH, VOCAB, seed=1), weight=first.weight)


def naive_rows(inputs: Inputs, rule: SharedAnchors) -> Tensor:
    """Z_Mᵀ (H_M H_Mᵀ + λI)⁻¹ H_M of differences from the mean and of the mean itself, made as long as they."""
    rows = choose_rows(rule.seed, rule.step, 0, torch.ones(len(inputs.hidden), dtype=torch.bool), rule.num_anchors)
    h, z = inputs.hidden[rows], inputs.hidden[rows] @ inputs.weight.T
    unit, unit_z = h.mean(0) / h.mean(0).norm(), z.mean(0) / h.mean(0).norm()
    z, h = z - torch.outer(h @ unit, unit_z), h - torch.outer(h @ unit, unit)
    h, z = torch.cat([h, h.norm() * unit[None]]), torch.cat([z, h.norm() * unit_z[None]])
    gram = h @ h.T
    ridge = rule.ridge * gram.trace() / len(rows)
    return z.T @ torch.linalg.inv(gram + ridge * torch.eye(len(h), dtype=torch.float64)) @ h


def error_of(inputs: Inputs) -> Tensor:
    return reference_exit(inputs.hidden, inputs.weight, inputs.target, feedback=shared_rule()).error


@pytest.mark.parametrize("num_anchors", [2, 6, 9, 20], ids=["two", "fewer_than_D", "as_many_as_D", "more_than_D"])
@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_all_exits_have_the_rows_of_the_first(num_anchors: int, ridge: float) -> None:
    first, second = two_exits()
    rule = shared_rule(num_anchors=num_anchors, ridge=ridge, **WHOLE)
    rows = naive_rows(first, rule)
    for index, inputs in enumerate((first, second)):
        assert_close(run(inputs, rule, exit_index=index).feedback, error_of(inputs) @ rows, tolerance=1e-9)


def test_from_more_than_d_tokens_of_one_exit_all_exits_get_nearly_the_exact_gradient() -> None:
    first, second = two_exits()
    rule = shared_rule(num_anchors=20, ridge=1e-9, **WHOLE)
    run(first, rule)
    assert_close(run(second, rule, exit_index=1).feedback, error_of(second) @ second.weight, tolerance=1e-6)


def test_an_exit_alone_is_that_of_sampled_anchors() -> None:
    inputs = make_inputs(25, WIDTH, VOCAB)
    options = {"num_anchors": 6, "topk": 3, "num_draws": 4}
    alone = make_feedback("anchors_sampled", WIDTH, VOCAB, seed=3, **options)
    assert_close(run(inputs, shared_rule(**options)).feedback, run(inputs, alone).feedback, tolerance=1e-9)


def feedback_of_step(inputs: Inputs, rule: SharedAnchors, **options: Any) -> Tensor:
    step = exit_step(inputs.hidden, inputs.weight, inputs.target, feedback=rule, **options)
    assert step.feedback is not None
    return step.feedback


def test_both_ways_of_calling_an_exit_share() -> None:
    first, second = two_exits()
    one, other = shared_rule(), shared_rule()
    assert torch.equal(feedback_of_step(first, one), run(first, other).feedback)
    measured = one.rows
    assert torch.equal(measured, other.rows)
    expected = run(second, one, exit_index=1).feedback
    assert one.rows is measured
    assert torch.equal(feedback_of_step(second, other, exit_index=1), expected)


@pytest.mark.parametrize("end", ["update", "discard"])
def test_a_step_ends(end: str) -> None:
    """After `update()` other tokens are measured; after `discard()` the same ones again."""
    first, second = two_exits()
    rule = shared_rule(**WHOLE)
    run(first, rule)
    getattr(rule, end)()
    assert rule.measured is None
    assert int(rule.step) == (end == "update")
    assert_close(run(second, rule).feedback, error_of(second) @ naive_rows(second, rule), tolerance=1e-9)


def test_rows_are_of_the_step_and_not_of_the_state() -> None:
    rule = shared_rule()
    before = set(rule.state_dict())
    run(make_inputs(25, WIDTH, VOCAB), rule)
    assert rule.rows.shape == (VOCAB, WIDTH)
    assert set(rule.state_dict()) == before
    assert sum(buffer.nbytes for buffer in rule.buffers()) == rule.step.nbytes


def test_a_rule_that_is_moved_measures_anew() -> None:
    rule = shared_rule()
    run(make_inputs(25, WIDTH, VOCAB), rule)
    rule.to("meta")
    assert rule.measured is None
    (rows,) = rule.state(torch.empty(0))
    assert (rows.shape, rows.is_meta) == ((0, WIDTH), True)


def test_a_copy_has_rows_of_its_own() -> None:
    first, second = two_exits()
    rule = shared_rule()
    run(first, rule)
    copied = copy.deepcopy(rule)
    copied.update()
    run(second, copied)
    assert rule.measured is not None
    assert not torch.equal(rule.rows, copied.rows)


def test_evaluation_keeps_nothing_and_needs_nothing() -> None:
    first, second = two_exits()
    rule = shared_rule(**WHOLE).eval()
    for inputs in (first, second):
        assert_close(run(inputs, rule).feedback, error_of(inputs) @ naive_rows(inputs, rule), tolerance=1e-9)
    assert rule.measured is None


def test_evaluation_in_the_middle_of_a_step_measures_for_itself() -> None:
    first, second = two_exits()
    rule = shared_rule(**WHOLE)
    run(first, rule)
    kept = rule.measured
    assert_close(run(second, rule.eval()).feedback, error_of(second) @ naive_rows(second, rule), tolerance=1e-9)
    assert rule.measured is kept


def test_a_state_that_is_loaded_is_of_another_step() -> None:
    rule = shared_rule()
    run(make_inputs(25, WIDTH, VOCAB), rule)
    rule.load_state_dict(shared_rule().state_dict())
    assert rule.measured is None


def test_an_exit_that_feeds_nothing_back_measures_nothing() -> None:
    first, second = two_exits()
    rule = shared_rule(**WHOLE)
    exit_step(first.hidden, first.weight, first.target, feedback=rule, need_feedback=False)
    with torch.no_grad():
        exit_cross_entropy(first.hidden, first.weight, first.target, feedback=rule)
    exit_cross_entropy(first.hidden, first.weight.clone().requires_grad_(), first.target, feedback=rule).backward()
    none = first.hidden[:0].requires_grad_()
    exit_cross_entropy(none, first.weight, first.target[:0], feedback=rule).backward()
    assert rule.measured is None
    assert_close(feedback_of_step(second, rule), error_of(second) @ naive_rows(second, rule), tolerance=1e-9)


def test_a_call_that_is_refused_measures_nothing() -> None:
    inputs, rule = make_inputs(25, WIDTH, VOCAB), shared_rule()
    with pytest.raises(ValueError, match="grad_weight"):
        feedback_of_step(inputs, rule, grad_weight=torch.zeros(2, 2, dtype=torch.float64))
    assert rule.measured is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_forward_is_bitwise_the_first(use_reentrant: bool) -> None:
    first, second = two_exits()
    grads = []
    for is_recomputed in (False, True):
        rule, leaves = shared_rule(), [inputs.hidden.clone().requires_grad_() for inputs in (first, second)]

        def loss(leaf: Tensor, index: int, rule: SharedAnchors = rule) -> Tensor:
            target = (first, second)[index].target
            return exit_cross_entropy(leaf, first.weight, target, feedback=rule, exit_index=index)

        if is_recomputed:
            # Both forwards come before both backwards; a reentrant one has no gradients in its first.
            losses = [checkpoint(loss, leaf, i, use_reentrant=use_reentrant) for i, leaf in enumerate(leaves)]
        else:
            losses = [loss(leaf, i) for i, leaf in enumerate(leaves)]
        for each in losses:
            each.backward()
        grads.append([leaf.grad for leaf in leaves])
    for whole, again in zip(*grads, strict=True):
        assert torch.equal(whole, again)


def test_the_first_micro_batch_measures_for_all() -> None:
    inputs, rule = make_inputs(24, WIDTH, VOCAB), shared_rule(**WHOLE)
    parts = [
        replace(inputs, hidden=h, target=t) for h, t in zip(inputs.hidden.split(8), inputs.target.split(8), strict=True)
    ]
    rows = naive_rows(parts[0], rule)
    for number, part in enumerate(parts):
        outcome = run(part, rule, first_row=8 * number)
        assert_close(outcome.feedback, error_of(part) @ rows, tolerance=1e-9)


@pytest.mark.parametrize("how", ["cross_entropy", "step"])
def test_anchors_are_counted_in_the_statistics(how: str) -> None:
    inputs = make_inputs(7, WIDTH, VOCAB, ignored=4)
    exits = {"cross_entropy": exit_cross_entropy, "step": exit_step}
    rule = shared_rule(num_anchors=5)
    for index in range(2):
        hidden = inputs.hidden.requires_grad_()
        outcome = exits[how](hidden, inputs.weight, inputs.target, feedback=rule, return_stats=True, exit_index=index)
        stats = outcome.stats if how == "step" else outcome[1]  # type: ignore[union-attr, index]
        assert int(stats.num_anchors) == 3  # type: ignore[union-attr]


def test_fewer_tokens_than_anchors_are_all_there_is() -> None:
    inputs = make_inputs(7, WIDTH, VOCAB, ignored=3)
    rule = shared_rule(num_anchors=30)
    assert_close(run(inputs, rule).feedback, expected(inputs, rule).feedback, tolerance=1e-9)


def test_a_first_exit_without_tokens_that_count_leaves_nothing_to_feed_back() -> None:
    first, second = two_exits()
    rule = shared_rule()
    run(replace(first, target=torch.full_like(first.target, -100)), rule)
    assert not run(second, rule, exit_index=1).feedback.any()
    rule.update()
    assert run(second, rule).feedback.any()


def test_the_vocabulary_is_measured_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, whole, parted = make_inputs(25, WIDTH, VOCAB), shared_rule(), shared_rule()
    run(inputs, whole)
    # Six tokens' logits of seven words.
    monkeypatch.setattr("localexit.exits.pairs._LOGIT_BYTES", 4 * 6 * 7)
    run(inputs, parted)
    assert_close(parted.rows, whole.rows, tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_solved_in_fp32(dtype: torch.dtype) -> None:
    """Far more anchors than directions give W back, the products not rounded on a CPU either."""
    inputs = make_inputs(60, WIDTH, VOCAB).to(dtype)
    rule = shared_rule(num_anchors=50, ridge=1e-6)
    run(inputs, rule)
    assert rule.rows.dtype == torch.float32
    assert_close(rule.rows, inputs.weight.float(), tolerance=1e-5)


def test_under_autocast_it_measures_what_the_exit_computes() -> None:
    inputs = make_inputs(60, WIDTH, VOCAB).to(torch.float32)
    rule, low = shared_rule(num_anchors=50, ridge=1e-6), shared_rule(num_anchors=50, ridge=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(inputs, rule)
    run(inputs.to(torch.bfloat16), low)
    assert torch.equal(rule.rows, low.rows)


def test_no_exit_hears_of_what_its_hidden_states_cannot_see() -> None:
    """W + A (I - P), with P the projector on the hidden states of both exits, has the same logits: and feedback."""
    first, second = two_exits()
    basis = torch.eye(WIDTH, dtype=torch.float64)[:4]
    first, second = (replace(inputs, hidden=inputs.hidden @ basis.T @ basis) for inputs in (first, second))
    other = first.weight.clone()
    other[:, 4:] += 1.0
    rule, again = shared_rule(), shared_rule()
    for index, inputs in enumerate((first, second)):
        before = run(inputs, rule, exit_index=index).feedback
        after = run(replace(inputs, weight=other), again, exit_index=index).feedback
        assert before.any()
        assert_close(after, before, tolerance=1e-10)


def test_no_option_is_out_of_range() -> None:
    assert shared_rule(num_anchors=None).num_anchors == 3 * WIDTH // 2
    assert make_feedback("anchors_shared", 1, 5).num_anchors == 1
    with pytest.raises(ValueError, match="num_anchors must be at least 1"):
        shared_rule(num_anchors=0)
    with pytest.raises(ValueError, match="ridge"):
        shared_rule(ridge=-1.0)


def test_the_parts_of_the_anchors_logits_are_of_128_mebibytes() -> None:
    with FakeTensorMode(), Largest() as made:
        rule, hidden, weight = SharedAnchors(8, 2**15), torch.empty(4096, 8), torch.empty(2**15, 8)
        made.num_bytes = 0
        measured_rows(rule, hidden, torch.ones(4096, dtype=torch.bool), weight)
    assert made.num_bytes == 128 * 2**20


class Alive(TorchDispatchMode):
    """The most bytes that were alive at once of what is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = StorageWeakRef(tensor.untyped_storage())
                self.made[storage.cdata] = (storage, tensor.untyped_storage().nbytes())
        self.made = {key: each for key, each in self.made.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self.made.values()))
        return result


def test_while_the_rows_are_made_nothing_beside_them_is_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = SharedAnchors(8, 2**14, num_anchors=12)
    hidden, weight = torch.randn(12, 8), torch.randn(2**14, 8)
    monkeypatch.setattr("localexit.exits.pairs._LOGIT_BYTES", 4 * 12 * 512)
    with Alive() as alive:
        rows = measured_rows(rule, hidden, torch.ones(12, dtype=torch.bool), weight).rows
    assert rows.nbytes < alive.peak < 1.5 * rows.nbytes
