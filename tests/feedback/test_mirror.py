"""Eq. (11): the mirror starts at zero, learns from forward pairs, only in update(), and converges to the weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from helpers.budget import assert_close
from helpers.cases import Inputs, make_inputs, run
from helpers.largest import Largest
from localexit import ExitHead, WeightMirror, WeightTransport, exit_cross_entropy, exit_step
from localexit.feedback.draws import UNCOUNTED, choose_rows
from localexit.feedback.ridge import apart_from_mean
from localexit.feedback.rows import Pairs

WIDTH, VOCAB = 9, 40


def mirror(**options: object) -> WeightMirror:
    return WeightMirror(WIDTH, VOCAB, **{"num_pairs": 4, "seed": 3, **options}).double()  # type: ignore[arg-type]


def forward(inputs: Inputs, rule: WeightMirror, exit_index: int = 0, first_row: int = 0) -> Tensor:
    loss = exit_cross_entropy(
        inputs.hidden.requires_grad_(),
        inputs.weight,
        inputs.target,
        feedback=rule,
        linear_bias=inputs.bias,
        exit_index=exit_index,
        first_row=first_row,
    )
    assert isinstance(loss, Tensor)
    return loss


def delta_rule(rows: Tensor, hidden: Tensor, logits: Tensor, ridge: float = 1e-3) -> Tensor:
    """Eq. (11) as it is written, with the pairs taken apart from their mean."""
    count, length = len(hidden), hidden.mean(0).norm()
    unit, unit_logits = hidden.mean(0) / length, logits.mean(0) / length
    along = hidden @ unit
    hidden, logits = hidden - torch.outer(along, unit), logits - torch.outer(along, unit_logits)
    rest = max(hidden.norm(), 1e-8 * length * count**0.5)
    hidden, logits = torch.cat([hidden, rest * unit[None]]), torch.cat([logits, rest * unit_logits[None]])
    gram = hidden @ hidden.T
    shifted = gram + ridge * gram.trace() / count * torch.eye(len(gram), dtype=gram.dtype)
    return rows + (logits - hidden @ rows.T).T @ torch.linalg.inv(shifted) @ hidden


def chosen(inputs: Inputs, rule: WeightMirror, exit_index: int = 0) -> Tensor:
    rows = choose_rows(rule.seed, rule.step, exit_index, inputs.target != -100, rule.num_pairs)
    return rows[inputs.target[rows] != -100]


@pytest.mark.parametrize("sampled", [False, True])
def test_starts_at_zero_and_feeds_nothing_back(sampled: bool) -> None:
    rule = mirror(sampled=sampled)
    assert not rule.rows.any()
    assert not run(make_inputs(7, WIDTH, VOCAB), rule).feedback.any()


def test_a_batch_that_is_left_out_teaches_nothing() -> None:
    rule = mirror()
    forward(make_inputs(7, WIDTH, VOCAB), rule)
    rule.discard()
    rule.update()
    assert not rule.rows.any()


@pytest.mark.parametrize("ignored", [0, 5], ids=["enough_tokens", "fewer_tokens_than_pairs"])
def test_one_update_is_equation_11_on_the_tokens_that_count(ignored: int) -> None:
    inputs, rule = make_inputs(7, WIDTH, VOCAB, ignored=ignored), mirror()
    rule.rows.normal_(generator=torch.Generator().manual_seed(0))
    hidden = inputs.hidden[chosen(inputs, rule)]
    assert len(hidden) == min(4, 7 - ignored)
    expected = delta_rule(rule.rows.clone(), hidden, hidden @ inputs.weight.T)
    forward(inputs, rule)
    rule.update()
    assert_close(rule.rows, expected, tolerance=1e-9)


def test_the_bias_is_not_part_of_what_it_learns() -> None:
    inputs = make_inputs(7, WIDTH, VOCAB, bias=True)
    with_bias, without = mirror(), mirror()
    forward(inputs, with_bias)
    forward(replace(inputs, bias=None), without)
    for rule in (with_bias, without):
        rule.update()
    assert with_bias.rows.any()
    assert torch.equal(with_bias.rows, without.rows)


@pytest.mark.parametrize("num_exits", [2, 3])
def test_the_pairs_of_all_exits_are_used(num_exits: int) -> None:
    rule = mirror()
    exits = [make_inputs(7, WIDTH, VOCAB, seed=1 + index) for index in range(num_exits)]
    hidden = torch.cat([inputs.hidden[chosen(inputs, rule, i)] for i, inputs in enumerate(exits)])
    shared = [replace(inputs, weight=exits[0].weight) for inputs in exits]
    expected = delta_rule(rule.rows.clone(), hidden, hidden @ exits[0].weight.T)
    for i, inputs in reversed(list(enumerate(shared))):
        forward(inputs, rule, i)
    rule.update()
    assert_close(rule.rows, expected, tolerance=1e-8)


def test_an_exit_without_tokens_teaches_nothing_and_harms_none() -> None:
    rule, other = mirror(), mirror()
    inputs = make_inputs(7, WIDTH, VOCAB)
    none = replace(inputs, hidden=inputs.hidden[:0].detach(), target=inputs.target[:0])
    forward(none, rule)
    for each in (rule, other):
        each.update()
        assert not each.rows.any()
        forward(inputs, each)
    forward(none, rule, 1)
    for each in (rule, other):
        each.update()
    assert other.rows.any()
    assert torch.equal(rule.rows, other.rows)


def test_learns_in_update_alone_and_from_each_pair_once() -> None:
    inputs, rule = make_inputs(7, WIDTH, VOCAB), mirror()
    forward(inputs, rule).backward()
    assert not rule.rows.any()
    rule.update()
    learned = rule.rows.clone()
    assert learned.any()
    rule.update()
    assert torch.equal(rule.rows, learned)


@pytest.mark.parametrize("num_pairs", [3, 8, 20], ids=["fewer_than_a_part", "as_a_part", "more_than_count"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_micro_batches_give_the_pairs_of_one_batch(num_pairs: int, order: tuple[int, ...]) -> None:
    inputs = make_inputs(32, WIDTH, VOCAB, ignored=15)
    whole, parts = mirror(num_pairs=num_pairs), mirror(num_pairs=num_pairs)
    forward(inputs, whole)
    for part in order:
        rows = slice(8 * part, 8 * part + 8)
        forward(replace(inputs, hidden=inputs.hidden[rows].detach(), target=inputs.target[rows]), parts, 0, 8 * part)
    for rule in (whole, parts):
        assert int(rule._pairs[0].is_counted.sum()) == min(num_pairs, 17)
        rule.update()
    assert_close(parts.rows, whole.rows, tolerance=1e-12)


def test_merging_keeps_the_smallest_keys_once_and_the_later_measurement() -> None:
    def pairs(keys: list[int], value: float) -> Pairs:
        count = len(keys)
        return Pairs(
            hidden=torch.full((count, 2), value), logits=torch.full((count, 3), value), keys=torch.tensor(keys)
        )

    earlier, later = pairs([2, 5, 7], 1.0), pairs([1, 5, UNCOUNTED + 4], 2.0)
    merged = later.merged(earlier, 3)
    assert merged.keys.tolist() == [1, 2, 5]
    assert merged.hidden[:, 0].tolist() == merged.logits[:, 0].tolist() == [2.0, 1.0, 2.0]
    everything = later.merged(earlier, 9)
    assert everything.is_counted.tolist() == [True] * 4 + [False] * 2
    assert everything.hidden[:, 0].tolist() == everything.logits[:, 0].tolist() == [2.0, 1.0, 2.0, 1.0, 0.0, 0.0]


def test_learns_in_the_first_of_every_so_many_steps() -> None:
    inputs, rule, eager = make_inputs(7, WIDTH, VOCAB), mirror(update_every=3), mirror()
    learned, expected = [], []
    for step in range(7):
        for each in (rule, eager):
            before = each.rows.clone()
            if each is rule or step % 3 == 0:
                forward(inputs, each)
            assert bool(each._pairs) == (step % 3 == 0)
            each.update()
            (learned if each is rule else expected).append(not torch.equal(each.rows, before))
    assert learned == expected == [True, False, False, True, False, False, True]
    assert torch.equal(rule.rows, eager.rows)


def test_a_loaded_mirror_learns_when_the_saved_one_would_have() -> None:
    inputs, rule = make_inputs(7, WIDTH, VOCAB), mirror(update_every=3)
    for _ in range(4):
        forward(inputs, rule)
        rule.update()
    loaded = mirror(update_every=3)
    loaded.load_state_dict(rule.state_dict())
    for _ in range(4):
        for each in (rule, loaded):
            forward(inputs, each)
            each.update()
        assert torch.equal(loaded.rows, rule.rows)
    assert not torch.equal(loaded.rows, mirror().rows)


def in_eval(inputs: Inputs, rule: WeightMirror) -> None:
    rule.eval()
    forward(inputs, rule).backward()
    rule.train()


def without_grad(inputs: Inputs, rule: WeightMirror) -> None:
    with torch.no_grad():
        forward(inputs, rule)


def in_inference_mode(inputs: Inputs, rule: WeightMirror) -> None:
    with torch.inference_mode():
        exit_cross_entropy(inputs.hidden, inputs.weight, inputs.target, feedback=rule)


def step_in_eval(inputs: Inputs, rule: WeightMirror) -> None:
    rule.eval()
    exit_step(inputs.hidden, inputs.weight, inputs.target, feedback=rule)
    rule.train()


@pytest.mark.parametrize("use", [in_eval, without_grad, in_inference_mode, step_in_eval])
def test_outside_of_training_nothing_is_collected(use: Callable[[Inputs, WeightMirror], None]) -> None:
    inputs, rule = make_inputs(7, WIDTH, VOCAB), mirror()
    use(inputs, rule)
    rule.update()
    assert not rule.rows.any()


@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize("num_exits", [1, 2])
def test_recomputation_changes_nothing(num_exits: int, is_reentrant: bool) -> None:
    inputs = make_inputs(7, WIDTH, VOCAB)
    plain, recomputed = mirror(), mirror()
    for exit_index in range(num_exits):
        forward(inputs, plain, exit_index).backward()

        def segment(hidden: Tensor, index: int = exit_index) -> Tensor:
            return forward(replace(inputs, hidden=hidden), recomputed, index)

        checkpoint(segment, inputs.hidden, use_reentrant=is_reentrant).backward()
    for rule in (plain, recomputed):
        rule.update()
    assert plain.rows.any()
    assert torch.equal(plain.rows, recomputed.rows)


def test_exit_step_collects_the_same_pairs() -> None:
    inputs, by_autograd, by_step = make_inputs(7, WIDTH, VOCAB), mirror(), mirror()
    forward(inputs, by_autograd)
    exit_step(inputs.hidden, inputs.weight, inputs.target, feedback=by_step)
    for rule in (by_autograd, by_step):
        rule.update()
    assert by_step.rows.any()
    assert torch.equal(by_step.rows, by_autograd.rows)


def test_autocast_does_not_round_what_it_learns() -> None:
    inputs = make_inputs(7, WIDTH, VOCAB).to(torch.float32)
    plain, cast = (WeightMirror(WIDTH, VOCAB, num_pairs=4, seed=3) for _ in range(2))
    forward(inputs, plain)
    plain.update()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        forward(inputs, cast)
        cast.update()
    assert torch.equal(cast.rows, plain.rows)
    exact = mirror()
    forward(inputs.to(torch.float64), exact)
    exact.update()
    assert_close(plain.rows.double(), exact.rows, tolerance=1e-5)


@pytest.mark.parametrize("num_pairs", [3, 9, 20], ids=["fewer_than_D", "as_many_as_D", "more_than_D"])
def test_converges_to_a_fixed_weight(num_pairs: int) -> None:
    weight = make_inputs(1, WIDTH, VOCAB).weight
    rule = mirror(num_pairs=num_pairs)
    distances = [1.0]
    for seed in range(60):
        inputs = replace(make_inputs(20, WIDTH, VOCAB, seed=seed), weight=weight)
        forward(inputs, rule)
        rule.update()
        distances.append(float((rule.rows - weight).norm() / weight.norm()))
    assert all(after <= before + 1e-12 for before, after in pairwise(distances))
    assert distances[-1] < 1e-3
    inputs = replace(make_inputs(7, WIDTH, VOCAB), weight=weight)
    exact = run(inputs, WeightTransport(WIDTH, VOCAB)).feedback
    assert_close(run(inputs, rule).feedback, exact, tolerance=1e-2)


def test_follows_a_weight_that_moves() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = make_inputs(1, WIDTH, VOCAB).weight
    rule = mirror(num_pairs=9)
    for seed in range(60):
        inputs = replace(make_inputs(20, WIDTH, VOCAB, seed=seed), weight=weight)
        forward(inputs, rule)
        rule.update()
        weight = weight + 0.003 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    assert float((rule.rows - weight).norm() / weight.norm()) < 0.05


def test_bf16_storage_keeps_corrections_smaller_than_its_steps() -> None:
    """Rounded to nearest, a mirror at 1 would not follow a weight to 1.003: half a step of bf16 is 0.0039."""
    rule = WeightMirror(1, 4000, num_pairs=1, storage="bf16")
    rule.rows.fill_(1.0)
    inputs = Inputs(hidden=torch.ones(1, 1), weight=torch.full((4000, 1), 1.003), target=torch.tensor([0]))
    forward(inputs, rule)
    rule.update()
    assert rule.rows.dtype == torch.bfloat16
    assert set(rule.rows.flatten().tolist()) == {1.0, 1.0078125}
    assert float(rule.rows.float().mean()) == pytest.approx(1.003, abs=3e-4)


@pytest.mark.parametrize("sampled", [False, True])
def test_bf16_storage_is_as_good_as_its_precision(sampled: bool) -> None:
    weight = make_inputs(1, WIDTH, VOCAB).to(torch.float32).weight
    rule = WeightMirror(WIDTH, VOCAB, num_pairs=20, storage="bf16", sampled=sampled)
    for seed in range(10):
        forward(replace(make_inputs(20, WIDTH, VOCAB, seed=seed).to(torch.float32), weight=weight), rule)
        rule.update()
    assert rule.rows.dtype == torch.bfloat16
    assert float((rule.rows.float() - weight).norm() / weight.norm()) < 2**-8
    assert run(make_inputs(7, WIDTH, VOCAB).to(torch.float32), rule).feedback.any()


def test_an_update_by_parts_is_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, whole, parts = make_inputs(7, WIDTH, VOCAB), mirror(), mirror()
    for rule in (whole, parts):
        forward(inputs, rule)
    whole.update()
    monkeypatch.setattr("localexit.feedback.rows._UPDATE_BYTES", 7 * WIDTH * 8)
    parts.update()
    assert_close(parts.rows, whole.rows, tolerance=1e-12)


def test_the_parts_of_an_update_are_of_256_mebibytes() -> None:
    """All that is made besides the mirror of a large model: as fp32, it alone would be three times as much."""
    with FakeTensorMode(), Largest() as made:
        rule = WeightMirror(2**18, 600, storage="bf16")
        hidden, logits = torch.empty(8, 2**18), torch.empty(8, 600)
        rule.collect(0, Pairs(hidden=hidden, logits=logits, keys=torch.empty(8, dtype=torch.int64)))
        made.num_bytes = 0
        rule.update()
    assert made.num_bytes == 256 * 2**20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pairs_in_low_precision_are_solved_in_fp32(dtype: torch.dtype) -> None:
    inputs = make_inputs(20, WIDTH, VOCAB).to(dtype)
    rule = WeightMirror(WIDTH, VOCAB, num_pairs=20)
    for _ in range(5):
        forward(inputs, rule)
        rule.update()
    assert rule.rows.dtype == torch.float32
    assert float((rule.rows - inputs.weight.float()).norm() / inputs.weight.float().norm()) < 0.05


def test_a_head_passes_update_on() -> None:
    head = ExitHead(WIDTH, VOCAB, feedback=mirror())
    head.double()(torch.randn(5, WIDTH, dtype=torch.float64), torch.arange(5)).backward()
    head.update()
    assert head.feedback.rows.any()
    assert int(head.feedback.step) == 1


@pytest.mark.parametrize("sizes", [[5], [2, 3]])
def test_a_weighted_sum_over_the_exits_parts_is_that_of_all(sizes: list[int]) -> None:
    hidden, logits = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    apart = apart_from_mean(hidden)
    torch.testing.assert_close(apart.summed(logits.split(sizes)), apart.axis @ logits)


def test_an_unknown_storage_is_refused() -> None:
    with pytest.raises(ValueError, match="storage must be one of .*got 'fp8'"):
        WeightMirror(8, 40, storage="fp8")  # type: ignore[arg-type]
