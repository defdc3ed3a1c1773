"""The hash as a kernel: bit for bit what PyTorch computes one operation at a time."""

from __future__ import annotations

import pytest
import torch

from localexit.feedback import draws
from localexit.feedback.draws import UNCOUNTED, choice_keys, stratified_uniforms

SEEDS = [0, 1, 3, -1, 2**31, 2**32 - 1, 2**62 + 12345]


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would do."""
    monkeypatch.setattr(draws, "runs_kernel", lambda *_: True)


def plain_and_kernel(monkeypatch: pytest.MonkeyPatch, draw: object, *arguments: object) -> tuple[torch.Tensor, ...]:
    results = []
    for is_kernel in (False, True):
        monkeypatch.setattr(draws, "runs_kernel", lambda *_, is_kernel=is_kernel: is_kernel)
        results.append(draw(*arguments))  # type: ignore[operator]
    return tuple(results)


@pytest.mark.parametrize("num", [1, 3, 7, 16, 28])
@pytest.mark.parametrize("seed", SEEDS)
def test_draws_are_the_same_bits(seed: int, num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # More than a block of them, and row numbers of more than 32 bits.
    rows = torch.arange(100) * 2**27 + 5
    for step, exit_index in ((0, 0), (7, 3), (2**31 + 1, 11)):
        plain, kernel = plain_and_kernel(
            monkeypatch, stratified_uniforms, seed, torch.tensor(step), exit_index, rows, num
        )
        assert kernel.dtype == torch.float32
        assert torch.equal(kernel, plain)


@pytest.mark.parametrize("first_row", [0, 1, 2**29])
@pytest.mark.parametrize("seed", SEEDS)
def test_keys_are_the_same_bits(seed: int, first_row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    is_counted = torch.arange(300) % 3 != 0
    for step, exit_index in ((0, 0), (7, 3)):
        plain, kernel = plain_and_kernel(
            monkeypatch, choice_keys, seed, torch.tensor(step), exit_index, is_counted, first_row, draws.SEEN_STREAM
        )
        assert torch.equal(kernel, plain)
        assert torch.equal(kernel < UNCOUNTED, is_counted)


@pytest.mark.usefixtures("by_kernel")
def test_of_no_tokens_nothing_is_drawn() -> None:
    none = torch.ones(0, dtype=torch.bool)
    assert stratified_uniforms(0, torch.tensor(0), 0, torch.arange(0), 3).shape == (0, 3)
    assert choice_keys(0, torch.tensor(0), 0, none).shape == (0,)
