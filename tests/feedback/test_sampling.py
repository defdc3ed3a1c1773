"""Eq. (12): few rows instead of all, and on average the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.budget import assert_close
from helpers.cases import Inputs, make_inputs, small_rule
from helpers.direct import apply, cross_entropy_error, signed_error
from localexit.feedback import Error
from localexit.feedback.groups import by_rows, draw, largest, reduce_groups


def whole(name: str, values: Tensor, inputs: Inputs) -> Tensor:
    """What a rule's draws are an estimate of."""
    # As many anchors as there are tokens: they are the same ones in every step.
    options = {"num_anchors": 6} if name == "anchors_sampled" else {}
    return apply(small_rule(name.removesuffix("_sampled"), 9, inputs.vocab, **options), values, inputs)


@pytest.mark.parametrize("make_error", [cross_entropy_error, signed_error])
@pytest.mark.parametrize("name", ["anchors_sampled", "mirror_sampled", "transport_sampled"])
def test_unbiased_over_steps(name: str, make_error: object) -> None:
    """The mean over steps is within its standard error of the whole product, coordinate by coordinate."""
    inputs = make_inputs(6, 9, 140)
    values = make_error(inputs)  # type: ignore[operator]
    rule = small_rule(name, 9, 140)
    samples = []
    for _ in range(400):
        samples.append(apply(rule, values, inputs))
        rule.step += 1
    feedback = torch.stack(samples)
    exact = whole(name, values, inputs)
    score = (feedback.mean(0) - exact) / (feedback.std(0) / len(samples) ** 0.5)
    assert float(feedback.std(0).min()) > 0
    assert float(score.square().mean()) == pytest.approx(1, abs=0.6)
    assert float(score.abs().max()) < 4.5


def variance(num_draws: int, values: Tensor, inputs: Inputs, *, steps: int = 60) -> float:
    """Mean over the coordinates of the feedback's variance over the draws, nothing but gold being kept."""
    rule = small_rule("transport_sampled", 9, 140, topk=0, num_draws=num_draws)
    samples = []
    for _ in range(steps):
        samples.append(apply(rule, values, inputs))
        rule.step += 1
    return float(torch.stack(samples).var(0).mean())


def independent_variance(num_draws: int, values: Tensor, inputs: Inputs) -> float:
    """The same for independent draws, by its formula: (Q Σ |e_v| w_v² - (Σ e_v w_v)²) / m over the tail."""
    tail = values.scatter(1, inputs.target[:, None], 0)
    second = tail.abs().sum(1, keepdim=True) * (tail.abs() @ inputs.weight.square())
    return float((second - (tail @ inputs.weight).square()).mean()) / num_draws


def test_variance_of_a_single_draw_is_that_of_the_formula() -> None:
    inputs = make_inputs(6, 9, 140)
    values = signed_error(inputs)
    expected = independent_variance(1, values, inputs)
    assert variance(1, values, inputs, steps=400) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("num_draws", [16, 64])
def test_stratified_draws_have_less_variance_than_independent_ones(num_draws: int) -> None:
    inputs = make_inputs(6, 9, 140)
    values = signed_error(inputs)
    assert variance(num_draws, values, inputs) < 0.9 * independent_variance(num_draws, values, inputs)


@pytest.mark.parametrize("topk", [139, 200])
def test_all_tokens_kept_is_exact(topk: int) -> None:
    inputs = make_inputs(6, 9, 140)
    values = signed_error(inputs)
    rule = small_rule("transport_sampled", 9, 140, topk=topk)
    assert_close(apply(rule, values, inputs), values @ inputs.weight, tolerance=1e-12)


def grid(num: int) -> Tensor:
    """Uniforms from 0 to just below 1, both ends included."""
    inner = torch.arange(num - 1, dtype=torch.float32) / (num - 1)
    return torch.cat([inner, torch.tensor([1 - 2**-24])])[None]


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 300])
def test_a_draw_never_hits_what_is_excluded_or_has_no_error(vocab: int) -> None:
    values = torch.randn(1, vocab, generator=torch.Generator().manual_seed(1))
    values[:, ::3] = 0
    exclude = torch.tensor([[0, vocab - 1]])
    ids, weights = Error(values=values, scale=torch.ones(1)).sample(grid(500), exclude)
    assert ids.shape == weights.shape == (1, 500)
    assert 0 <= int(ids.min()) <= int(ids.max()) < vocab
    hit = ids[weights != 0]
    assert values[0, hit].all()
    assert not torch.isin(hit, exclude).any()


def test_draws_are_in_proportion_to_the_magnitude() -> None:
    values = torch.randn(1, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exclude = torch.tensor([[7, 200]])
    ids, weights = Error(values=values, scale=torch.ones(1, dtype=torch.float64)).sample(grid(200_000), exclude)
    mass = values[0].abs().index_fill(0, exclude[0], 0)
    share = torch.bincount(ids[0], minlength=300) / ids.shape[1]
    assert float((share - mass / mass.sum()).abs().max()) < 2e-5
    assert torch.equal(weights[0].sign(), values[0, ids[0]].sign())
    assert float(weights[0].abs().max()) == pytest.approx(float(mass.sum()) / 200_000, rel=1e-12)


def test_without_a_tail_nothing_is_drawn() -> None:
    values = torch.tensor([[0.0, 2.0, 0.0]])
    _, weights = Error(values=values, scale=torch.ones(1)).sample(grid(50), torch.tensor([[1]]))
    assert not weights.any()


def test_where_all_entries_are_zero_none_is_drawn_and_any_is_the_largest() -> None:
    values, gold = torch.zeros(2, 130), torch.zeros(2, 1, dtype=torch.int64)
    ids, is_drawn, total = draw(values, torch.rand(2, 3), gold)
    assert not is_drawn.any()
    assert not total.any()
    assert ids.max() < 130
    kept = largest(values, 129, gold[:, 0])
    assert kept.sort(1).values.tolist() == [list(range(1, 130))] * 2


def test_the_scale_of_a_row_is_not_part_of_the_draw() -> None:
    values = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    uniforms, exclude = torch.rand(2, 9, generator=torch.Generator().manual_seed(2)), torch.tensor([[0], [1]])
    ids, weights = Error(values=values, scale=torch.tensor([1.0, 1.0])).sample(uniforms, exclude)
    scaled_ids, scaled = Error(values=values, scale=torch.tensor([-2.0, 0.0])).sample(uniforms, exclude)
    assert torch.equal(ids, scaled_ids)
    assert torch.equal(scaled, weights * torch.tensor([[-2.0], [0.0]]))


def test_the_smallest_number_draws_the_first_token_that_can_be_drawn() -> None:
    values = torch.tensor([[5.0, 0.0, 0.0, 2.0, 3.0]])
    ids, weights = Error(values=values, scale=torch.ones(1)).sample(torch.zeros(1, 1), torch.tensor([[0]]))
    assert ids.tolist() == [[3]]
    assert weights.tolist() == [[5.0]]


def test_a_group_is_128_neighbours_or_what_is_left() -> None:
    assert reduce_groups(-torch.ones(2, 300), torch.sum).tolist() == [[128, 128, 44]] * 2


@pytest.mark.parametrize(
    ("shape", "expected"), [((5, 2**19), [2, 2, 1]), ((3, 2**20), [1, 1, 1]), ((2, 2**21), [1, 1])]
)
def test_a_cpu_works_on_four_mebibytes_at_a_time(shape: tuple[int, int], expected: list[int]) -> None:
    """So that what is made in between stays in its cache."""
    num_rows = []

    def first(rows: Tensor) -> Tensor:
        num_rows.append(len(rows))
        return rows[:, 0]

    assert by_rows(first, torch.zeros(()).expand(shape)).shape == shape[:1]
    assert num_rows == expected


def test_the_mass_of_the_tail_is_summed_in_the_dtype_of_the_scale() -> None:
    """In bf16 a sum of 1,000 halves would be rounded in every group, and the total again."""
    values = torch.full((1, 1001), 0.3337, dtype=torch.bfloat16)
    _, weights = Error(values=values, scale=torch.ones(1)).sample(torch.full((1, 1), 0.5), torch.tensor([[1000]]))
    assert float(weights) == pytest.approx(1000 * float(values[0, 0]), rel=1e-6)
