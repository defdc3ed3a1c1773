"""Codes: what they are distributed like, and that streams of one seed are independent."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from localexit import make_feedback
from localexit.feedback.codes import (
    count_sketch,
    gaussian_codebook,
    orthonormal_expander,
    sketch_matrix,
    unit_codebook,
)
from localexit.feedback.draws import derive_seed

FIXED_CODES = ("dense", "sketch", "hybrid", "parallel_gold", "parallel_topmass")


@pytest.mark.parametrize(("width", "rank"), [(1, 1), (9, 9), (33, 8)])
def test_expander_has_orthonormal_columns(width: int, rank: int) -> None:
    expander = orthonormal_expander(width, rank, seed=1)
    assert torch.allclose(expander.T @ expander, torch.eye(rank), atol=1e-6)


def test_gaussian_codebook_has_variance_one_over_rank() -> None:
    codes = gaussian_codebook(4000, 16, seed=1)
    deviation = 1 / math.sqrt(codes.numel())
    assert abs(float(codes.mean())) < 4 * deviation / 4
    assert abs(float(codes.var()) * 16 - 1) < 4 * math.sqrt(2) * deviation


def test_unit_codebook_has_unit_rows_around_zero() -> None:
    codes = unit_codebook(4000, 16, seed=1)
    assert torch.allclose(codes.norm(dim=1), torch.ones(4000))
    assert float(codes.mean(0).abs().max()) < 4 / math.sqrt(4000 * 16)


def test_sketch_matrix_has_one_sign_a_row() -> None:
    bucket, sign = count_sketch(50, 7, seed=2)
    assert (bucket.dtype, sign.dtype) == (torch.int32, torch.int8)
    matrix = sketch_matrix(bucket, sign, 7, torch.float64)
    assert torch.equal(matrix.abs().sum(1), torch.ones(50, dtype=torch.float64))
    assert torch.equal(matrix[torch.arange(50), bucket.long()], sign.double())


def test_count_sketch_is_unbiased_with_the_variance_of_equation_6() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(30, generator=generator, dtype=torch.float64) for _ in range(2))
    rank, trials = 4, 4000
    matrices = (sketch_matrix(*count_sketch(30, rank, seed=s), rank, torch.float64) for s in range(trials))
    products = torch.stack([(a @ m) @ (b @ m) for m in matrices])
    squares = (a.square() * b.square()).sum()
    variance = (a.square().sum() * b.square().sum() + (a @ b).square() - 2 * squares) / rank
    assert abs(float(products.mean() - a @ b)) < 4 * float(variance / trials) ** 0.5
    assert float(products.var() / variance) == pytest.approx(1, abs=0.15)


def test_dense_codes_are_unbiased() -> None:
    """The inner product of two codes estimates whether the tokens are the same: E[K Kᵀ] = I."""
    mean = torch.stack([k @ k.T for k in (gaussian_codebook(6, 8, seed=s) for s in range(1500))]).mean(0)
    assert torch.allclose(mean, torch.eye(6), atol=4 * math.sqrt(2 / (8 * 1500)))


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_streams_of_one_seed_are_independent(seed: int) -> None:
    """The first numbers of every stream, side by side."""
    size = 64
    raw = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    bucket, sign = count_sketch(size * size, 1000, seed=seed)
    streams = {
        "the plain seed": raw,
        "expander": orthonormal_expander(size, size, seed=seed),
        "codebook": gaussian_codebook(size, size, seed=seed),
        "unit codebook": unit_codebook(size, size, seed=seed),
        "bucket": bucket,
        "sign": sign,
    }
    names = list(streams)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert abs(correlation(streams[one], streams[other])) < 5 / size, (one, other)


def test_seeds_of_streams_and_of_neighbouring_seeds_are_all_different() -> None:
    derived = {derive_seed(seed, stream) for seed in range(-50, 50) for stream in ("expander", "codebook", "sign")}
    assert len(derived) == 300


def buffers(name: str, seed: int | None) -> list[Tensor]:
    rule = make_feedback(name, 16, 50, seed=seed)
    return [getattr(rule, key) for key in rule.codes]


@pytest.mark.parametrize("name", FIXED_CODES)
def test_the_seed_decides_the_codes(name: str) -> None:
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(buffers(name, 4), buffers(name, 4), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(buffers(name, 4), buffers(name, 5), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", FIXED_CODES)
def test_without_a_seed_torchs_default_generator_decides(name: str) -> None:
    torch.manual_seed(7)
    first, second = buffers(name, None), buffers(name, None)
    torch.manual_seed(7)
    again = buffers(name, None)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
