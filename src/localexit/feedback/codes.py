"""Fixed random codes, drawn from named streams of one seed: expander, codebooks, CountSketch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from localexit.feedback.draws import derive_seed


def _generator(seed: int, stream: str) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(derive_seed(seed, stream))


def orthonormal_expander(hidden_size: int, rank: int, *, seed: int) -> Tensor:
    """U [D, R], fp32, with orthonormal columns (QR of a Gaussian matrix)."""
    gaussian = torch.randn(hidden_size, rank, generator=_generator(seed, "expander"))
    return torch.linalg.qr(gaussian).Q.contiguous()


def gaussian_codebook(vocab_size: int, rank: int, *, seed: int) -> Tensor:
    """K [V, R], fp32, entries iid N(0, 1/R): the inner product of two rows estimates whether they are the same."""
    return torch.randn(vocab_size, rank, generator=_generator(seed, "codebook")) / math.sqrt(rank)


def unit_codebook(vocab_size: int, rank: int, *, seed: int) -> Tensor:
    """Q [V, R], fp32, rows uniform on the unit sphere."""
    codes = torch.randn(vocab_size, rank, generator=_generator(seed, "unit codebook"))
    return nn.functional.normalize(codes)


def count_sketch(vocab_size: int, rank: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """CountSketch (Charikar, Chen, Farach-Colton 2002): bucket int32 [V] in [0, R) and sign int8 [V] in {-1, 1}."""
    bucket = torch.randint(rank, (vocab_size,), generator=_generator(seed, "bucket"), dtype=torch.int32)
    sign = torch.randint(2, (vocab_size,), generator=_generator(seed, "sign"), dtype=torch.int8) * 2 - 1
    return bucket, sign


def sketch_matrix(bucket: Tensor, sign: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """The sketch as a matrix S [V, R] with one ±1 a row: `e @ S` is eq. (6), deterministic, and one cheap GEMM."""
    matrix = torch.zeros(bucket.shape[0], rank, dtype=dtype, device=bucket.device)
    return matrix.scatter_(1, bucket.long()[:, None], sign.to(dtype)[:, None])
