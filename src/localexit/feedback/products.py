"""Products of fp32 numbers on a GPU's tensor cores, which multiply bf16 and sum in fp32.

Each number is taken as two of bf16: a = a₁ + a₂ + r with a₁ = bf16(a), a₂ = bf16(a - a₁), |a₂| ≤ 2⁻⁸ |a| and
|r| ≤ 2⁻¹⁷ |a|. Then

    a b ≈ a₂ b₁ + a₁ b₂ + a₁ b₁ = (a₂ | a₁ | a₁) (b₁ | b₂ | b₁)ᵀ,

one product of three times the length. It leaves out a₂ b₂ + r b + a r, at most 2⁻¹⁵ |a| |b| and about 2⁻¹⁹ of the norm
of many; bf16 by itself leaves out up to 2⁻⁷, TF32 2⁻¹⁰. A third term would cost three more products for
what neither bf16 nor a mirror keeps. Above 3.396e38, which bf16 rounds to infinity, the result is NaN. PyTorch's
settings of fp32 products (TF32) do not matter here.

Idea: Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
computations" (2019); with three terms it is the BF16x9 of cuBLAS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from localexit.feedback.base import product

# Products whose sizes are no multiple of some power of two miss the fast kernels; this one is large enough for tiles.
_TILE = 128
# Bytes of terms that are made at a time.
TERM_BYTES = 128 * 2**20


def left_terms(a: Tensor) -> Tensor:
    """(a₂ | a₁ | a₁) for `a @ b`: bf16 [n, 3k] for fp32 a [n, k], in the same memory order."""
    return terms(a.T, 0, 0).T if a.stride(0) == 1 else terms(a, 0, 1)


def right_terms(b: Tensor) -> Tensor:
    """(b₁ | b₂ | b₁)ᵀ for `a @ b`: bf16 [3k, m] for fp32 b [k, m]."""
    return terms(b, 1, 0)


def right_operand(b: Tensor, dtype: torch.dtype) -> Tensor:
    """What `times` takes for fp32 `b`: its terms on a GPU whose results are of `dtype` bf16, else `b` itself."""
    return right_terms(b) if b.is_cuda and dtype == torch.bfloat16 else b


def times(a: Tensor, right: Tensor) -> Tensor:
    """`a @ b` in the dtype of `a`, for the `right_operand` of b."""
    return product(left_terms(a) if right.dtype == torch.bfloat16 else a, right, a.dtype)


# An operator: a compiler leaves out roundings within what it fuses, and the second term would be zero.
@torch.library.custom_op("localexit::terms", mutates_args=())
def terms(a: Tensor, second: int, dim: int) -> Tensor:
    """Both bf16 terms of fp32 `a` beside each other along `dim`: three parts, the `second` is a₂, the others a₁."""
    result = _empty(a, dim)
    firsts = list(result.chunk(3, dim))
    rest = firsts.pop(second)
    for first in firsts:
        first.copy_(a)
    torch.sub(a, firsts[0], out=rest)
    return result


@terms.register_fake
def _terms_fake(a: Tensor, second: int, dim: int) -> Tensor:
    del second
    return _empty(a, dim)


def _empty(a: Tensor, dim: int) -> Tensor:
    return a.new_empty([3 * size if axis == dim else size for axis, size in enumerate(a.shape)], dtype=torch.bfloat16)


def fitting(num_bytes: int, row_bytes: int) -> int:
    """How many rows of `row_bytes` fit in `num_bytes`: at least one, and a multiple of a tile if that is possible."""
    num = num_bytes // row_bytes
    return num - num % _TILE or max(1, num)
