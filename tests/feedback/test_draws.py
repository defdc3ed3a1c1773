"""Counter-based draws: uniform, and independent between seeds, steps, exits, tokens and draws of a token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from localexit.feedback import draws
from localexit.feedback.draws import (
    SEEN_STREAM,
    UNCOUNTED,
    choice_keys,
    choose_exits,
    choose_rows,
    derive_seed,
    fresh_seed,
    stratified_uniforms,
    token_uniforms,
)

ROWS = torch.arange(2000)


def step(number: int) -> Tensor:
    return torch.tensor(number)


def uniforms(seed: int = 0, at: int = 0, exit_index: int = 0, rows: Tensor = ROWS, num: int = 1) -> Tensor:
    return token_uniforms(seed, step(at), exit_index, rows, num).double()


def kolmogorov_smirnov(sample: Tensor) -> float:
    """√n · the largest distance between the sample's distribution and the uniform one; above 1.95 once in 1000."""
    ordered = sample.flatten().sort().values
    n = len(ordered)
    grid = torch.arange(n, dtype=torch.float64)
    distance = torch.maximum((ordered - grid / n).abs().max(), (ordered - (grid + 1) / n).abs().max())
    return float(distance) * math.sqrt(n)


AXES = {
    "tokens": lambda: uniforms(),
    "draws_of_a_token": lambda: uniforms(rows=ROWS[:1], num=2000),
    "steps": lambda: torch.cat([uniforms(at=s, rows=ROWS[:1]) for s in range(800)]),
    "exits": lambda: torch.cat([uniforms(exit_index=i, rows=ROWS[:1]) for i in range(800)]),
    "seeds": lambda: torch.cat([uniforms(seed=s, rows=ROWS[:1]) for s in range(800)]),
    "large_seeds": lambda: torch.cat([uniforms(seed=s << 32, rows=ROWS[:1]) for s in range(800)]),
    "tokens_and_draws": lambda: uniforms(num=20),
}


@pytest.mark.parametrize("axis", AXES)
def test_uniform_along_every_axis(axis: str) -> None:
    sample = AXES[axis]()
    assert 0 <= float(sample.min()) < float(sample.max()) < 1
    assert kolmogorov_smirnov(sample) < 1.95


@pytest.mark.parametrize("axis", AXES)
def test_neighbours_are_uncorrelated(axis: str) -> None:
    sample = AXES[axis]().flatten() - 0.5
    for lag in (1, 2, 8):
        pairs = float((sample[:-lag] * sample[lag:]).mean()) * 12
        assert abs(pairs) < 4.5 / math.sqrt(len(sample)), lag


OTHERS = {
    "seed": lambda: uniforms(seed=1),
    "negative_seed": lambda: uniforms(seed=-1),
    "seed_beyond_32_bits": lambda: uniforms(seed=1 << 32),
    "step": lambda: uniforms(at=1),
    "exit": lambda: uniforms(exit_index=1),
    "next_tokens": lambda: uniforms(rows=ROWS + 1),
    "second_draw": lambda: uniforms(num=2)[:, 1:],
}


@pytest.mark.parametrize("other", OTHERS)
def test_independent_of(other: str) -> None:
    """Neither correlated nor, anywhere, equal more often than chance."""
    one, two = uniforms().flatten(), OTHERS[other]().flatten()
    assert abs(float(((one - 0.5) * (two - 0.5)).mean()) * 12) < 4.5 / math.sqrt(len(one))
    assert int((one == two).sum()) <= 1
    assert kolmogorov_smirnov((one - two) % 1) < 1.95


def test_a_draw_belongs_to_the_token_and_not_to_its_chunk() -> None:
    whole = uniforms(num=5)
    assert torch.equal(uniforms(rows=ROWS[700:800], num=5), whole[700:800])
    assert torch.equal(uniforms(num=3), whole[:, :3])


@pytest.mark.parametrize("num", [1, 7, 16])
def test_stratified_numbers_cover_every_part_uniformly(num: int) -> None:
    points = stratified_uniforms(0, step(0), 0, ROWS, num).double()
    parts = points * num - torch.arange(num)
    assert 0 <= float(parts.min()) < float(parts.max()) < 1
    assert kolmogorov_smirnov(points) < 1.95
    assert all(kolmogorov_smirnov(column) < 2.5 for column in parts.T)


@pytest.mark.parametrize("num", [3, 5, 7, 11, 28, 49])
def test_however_a_machine_divides_the_numbers_are_the_same(num: int) -> None:
    """A GPU multiplies by 1 / num instead: in fp32 that is another number, here it is none."""
    points = torch.arange(num) + token_uniforms(0, step(0), 0, ROWS, num)
    in_fp64 = (points.double() * (1 / num)).float().clamp_max(1 - 2.0**-24)
    assert torch.equal(stratified_uniforms(0, step(0), 0, ROWS, num), in_fp64)
    # What runs before this was defined drew on a CPU.
    assert torch.equal(in_fp64, (points / num).clamp_max(1 - 2.0**-24))
    assert not torch.equal((points * (1 / num)).clamp_max(1 - 2.0**-24), in_fp64)


def test_the_largest_stratified_number_is_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = torch.full((1, 16), 1 - 2**-24)
    monkeypatch.setattr(draws, "token_uniforms", lambda *_: largest)
    points = stratified_uniforms(0, step(0), 0, ROWS[:1], 16)
    assert 0.999 < float(points.max()) < 1


def chosen(at: int = 0, *, counted: Tensor | None = None, num: int = 4, exit_index: int = 0) -> Tensor:
    counted = torch.ones(10, dtype=torch.bool) if counted is None else counted
    return choose_rows(3, step(at), exit_index, counted, num)


@pytest.mark.parametrize("num", [1, 4, 9, 10])
def test_chosen_rows_are_different_and_ascending(num: int) -> None:
    for at in range(50):
        rows = chosen(at, num=num)
        assert len(rows) == num
        assert (rows[1:] > rows[:-1]).all()


def test_every_row_and_every_pair_is_chosen_equally_often() -> None:
    trials, num, n = 3000, 4, 10
    picks = torch.zeros(trials, n, dtype=torch.float64)
    for at in range(trials):
        picks[at, chosen(at)] = 1
    together = picks.T @ picks / trials
    single, pair = num / n, num * (num - 1) / (n * (n - 1))
    expected = torch.full((n, n), pair, dtype=torch.float64).fill_diagonal_(single)
    deviation = (expected * (1 - expected) / trials).sqrt()
    assert float(((together - expected) / deviation).abs().max()) < 4.5


def test_only_rows_that_count_are_chosen() -> None:
    counted = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0, 1], dtype=torch.bool)
    seen = torch.cat([chosen(at, counted=counted) for at in range(60)]).unique()
    assert torch.equal(seen, counted.nonzero()[:, 0])


def test_with_too_few_rows_that_count_all_of_them_are_chosen() -> None:
    counted = torch.zeros(10, dtype=torch.bool)
    counted[[2, 5]] = True
    for at in range(20):
        rows = chosen(at, counted=counted)
        assert len(rows) == 4
        assert {2, 5} <= set(rows.tolist())


@pytest.mark.parametrize("size", [0, 1, 3])
def test_no_more_rows_than_there_are(size: int) -> None:
    rows = chosen(counted=torch.ones(size, dtype=torch.bool), num=7)
    assert rows.tolist() == list(range(size))


def test_keys_belong_to_the_token_and_not_to_its_micro_batch() -> None:
    counted = torch.arange(1000) % 3 != 0
    keys = choice_keys(3, step(0), 0, counted)
    assert len(keys.unique()) == 1000
    assert torch.equal(keys < UNCOUNTED, counted)
    assert torch.equal(choice_keys(3, step(0), 0, counted[300:500], first_row=300), keys[300:500])


def test_choices_differ_between_steps_and_exits() -> None:
    counted = torch.ones(1000, dtype=torch.bool)
    first, other = chosen(counted=counted, num=50), chosen(1, counted=counted, num=50)
    at_other_exit = chosen(counted=counted, num=50, exit_index=1)
    for one in (other, at_other_exit):
        assert len(set(first.tolist()) & set(one.tolist())) < 10


def test_rows_and_draws_come_from_different_streams() -> None:
    """The token chosen first is not the one with the smallest draw."""
    hits = sum(int(chosen(at, num=1)) == int(uniforms(3, at, rows=ROWS[:10]).argmin()) for at in range(300))
    assert hits < 60


def test_the_hash_is_the_published_one() -> None:
    """Draws of runs that were saved depend on every bit of it: `lowbias32`, worked out elsewhere."""
    published = {0: 0, 1: 1753845952, 2: 3507691905, 12345: 2435775735, 4294967295: 1734902346}
    assert {x: draws._mix(x) for x in published} == published


def test_draws_stay_what_they_were() -> None:
    """A run that was saved goes on with the numbers it would have had."""
    drawn = token_uniforms(3, step(5), 1, torch.tensor([0, 7]), 2).double() * 2**24
    assert drawn.tolist() == [[1411745, 6674217], [16095428, 680791]]
    keys = choice_keys(3, step(5), 1, torch.tensor([True, False, True]))
    assert keys.tolist() == [691375954529878016, UNCOUNTED + 1, 3595821099239079938]
    seen = choose_rows(3, step(5), 1, torch.ones(1000, dtype=torch.bool), 4, 0, SEEN_STREAM)
    assert seen.tolist() == [335, 444, 498, 980]
    assert [choose_exits(3, at, 2, 6) for at in range(4)] == [(1, 4), (3, 4), (1, 2), (1, 5)]
    assert derive_seed(3, "codebook") == 2840616566754166703


def test_a_seed_that_is_left_out_is_one_of_very_many() -> None:
    torch.manual_seed(0)
    seeds = {fresh_seed(None) for _ in range(100)}
    assert len(seeds) == 100
    assert 2**50 < max(seeds) < 2**62
