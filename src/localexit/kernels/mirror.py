"""A mirror's correction in one pass: read a part of B, add `residualᵀ @ back`, round at random, write."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _mixed(x):
    """As `feedback.draws._mix`, on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def correct_kernel(
    rows, residual, back, num_tokens, width, num_pairs, seed,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """rows[v] += Σ_p residual[p, v] back[p] for bf16 rows, rounded at random; one program TOKENS by COLUMNS."""
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token_inside, col_inside = tokens < num_tokens, cols < width
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, num_pairs, PAIRS):
        pairs = start + tl.arange(0, PAIRS)
        pair_inside = pairs < num_pairs
        left = tl.load(
            residual + pairs[None, :].to(tl.int64) * num_tokens + tokens[:, None],
            mask=token_inside[:, None] & pair_inside[None, :],
            other=0.0,
        )
        right = tl.load(
            back + pairs[:, None] * width + cols[None, :], mask=pair_inside[:, None] & col_inside[None, :], other=0.0
        )
        total = tl.dot(left, right, total)
    place = tokens[:, None].to(tl.int64) * width + cols[None, :]
    inside = token_inside[:, None] & col_inside[None, :]
    total += tl.load(rows + place, mask=inside, other=0.0).to(tl.float32)
    noise = _mixed(place.to(tl.uint32) ^ _mixed(seed + (place >> 32).to(tl.uint32))) >> 16
    # A carry out of the dropped bits is the step up, also into the exponent.
    bits = (total.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
    tl.store(rows + place, bits.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=inside)


def correct(rows: Tensor, residual: Tensor, back: Tensor, *, seed: int) -> None:
    """`rows += residualᵀ @ back` in place, rounded up or down at random so that the mean is exact.

    Args:
        rows: bf16 [V, D], contiguous.
        residual: [P, V]; bf16 is fast, and what it rounds of a correction is far below a step of the rows.
        back: [P, D] in the same dtype.
        seed: of the rounding, in 0..2^31 - 1; another one for every update.
    """
    # A solver's result may lie column by column.
    residual, back = residual.contiguous(), back.contiguous()
    num_tokens, width = rows.shape
    columns, tokens = 128, 128
    correct_kernel[(triton.cdiv(width, columns), triton.cdiv(num_tokens, tokens))](
        rows, residual, back, num_tokens, width, len(residual), seed,
        TOKENS=tokens, COLUMNS=columns, PAIRS=64, num_warps=8,
    )  # fmt: skip
