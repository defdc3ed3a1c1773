"""A mirror's update in two passes over B: what it predicts wrongly, and the correction, rounded at random."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from localexit.kernels.draws import mixed


@triton.jit
def residual_kernel(
    rows, rounded, left_over, logits, residual, num_tokens, width, num_pairs, logits_stride, logits_step,
    PAIRS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """residual[p, v] = logits[p, v] - Σ_d (rounded + left_over)[p, d] rows[v, d]; one program PAIRS by TOKENS."""
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    pair_inside, token_inside = pairs < num_pairs, tokens < num_tokens
    total = tl.zeros((PAIRS, TOKENS), tl.float32)
    for start in range(0, width, DEPTH):
        cols = start + tl.arange(0, DEPTH)
        col_inside = cols < width
        place = pairs[:, None] * width + cols[None, :]
        inside = pair_inside[:, None] & col_inside[None, :]
        # One reading of the rows for both: what rounding took from the hidden states must not be missing.
        back = tl.load(
            rows + tokens[None, :].to(tl.int64) * width + cols[:, None],
            mask=col_inside[:, None] & token_inside[None, :],
            other=0.0,
        ).to(rounded.dtype.element_ty)
        total = tl.dot(tl.load(rounded + place, mask=inside, other=0.0), back, total)
        total = tl.dot(tl.load(left_over + place, mask=inside, other=0.0), back, total)
    inside = pair_inside[:, None] & token_inside[None, :]
    measured = tl.load(
        logits + pairs[:, None].to(tl.int64) * logits_stride + tokens[None, :].to(tl.int64) * logits_step,
        mask=inside,
        other=0.0,
    )
    place = pairs[:, None].to(tl.int64) * num_tokens + tokens[None, :]
    tl.store(residual + place, (measured - total).to(residual.dtype.element_ty), mask=inside)


# Compiled once for every seed, also for those that 16 divides.
@triton.jit(do_not_specialize=["seed"])
def correct_kernel(
    rows, residual, back, num_tokens, width, num_pairs, seed,
    residual_stride, residual_step, back_stride, back_step,
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
            residual + pairs[None, :].to(tl.int64) * residual_stride + tokens[:, None].to(tl.int64) * residual_step,
            mask=token_inside[:, None] & pair_inside[None, :],
            other=0.0,
        )
        right = tl.load(
            back + pairs[:, None].to(tl.int64) * back_stride + cols[None, :].to(tl.int64) * back_step,
            mask=pair_inside[:, None] & col_inside[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total)
    place = tokens[:, None].to(tl.int64) * width + cols[None, :]
    inside = token_inside[:, None] & col_inside[None, :]
    total += tl.load(rows + place, mask=inside, other=0.0).to(tl.float32)
    noise = mixed(place.to(tl.uint32) ^ mixed(seed + (place >> 32).to(tl.uint32))) >> 16
    # A carry out of the dropped bits is the step up, also into the exponent.
    bits = (total.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
    tl.store(rows + place, bits.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=inside)


def residuals(hidden: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
    """`logits - hidden @ rows.T` as if nothing of `hidden` were rounded, in the rows' dtype; the rows are read once.

    A residual is a small difference of large numbers: the hidden states are taken as a bf16 number and what is left of
    them, which is another one.

    Args:
        hidden: fp32 [P, D].
        logits: fp32 [P, V]; may lie column by column.
        rows: bf16 [V, D], contiguous.

    Returns:
        [P, V].
    """
    (num_tokens, width), num_pairs = rows.shape, len(hidden)
    rounded = hidden.to(rows.dtype)
    left_over = (hidden - rounded).to(rows.dtype)
    result = torch.empty(num_pairs, num_tokens, dtype=rows.dtype, device=rows.device)
    pairs, tokens = 128, 128
    residual_kernel[(triton.cdiv(num_pairs, pairs), triton.cdiv(num_tokens, tokens))](
        rows, rounded.contiguous(), left_over.contiguous(), logits, result, num_tokens, width, num_pairs,
        logits.stride(0), logits.stride(1),
        PAIRS=pairs, TOKENS=tokens, DEPTH=64, num_warps=8, num_stages=3,
    )  # fmt: skip
    return result


def correct(rows: Tensor, residual: Tensor, back: Tensor, *, seed: int) -> None:
    """`rows += residualᵀ @ back` in place, rounded up or down at random so that the mean is exact.

    Args:
        rows: bf16 [V, D], contiguous.
        residual: [P, V]; bf16 is fast, and what it rounds of a correction is far below a step of the rows.
        back: [P, D] in the same dtype; both may lie column by column, as a solver's result does.
        seed: of the rounding, in 0..2^31 - 1; another one for every update.
    """
    num_tokens, width = rows.shape
    columns, tokens = 128, 128
    correct_kernel[(triton.cdiv(width, columns), triton.cdiv(num_tokens, tokens))](
        rows, residual, back, num_tokens, width, len(residual), seed, *residual.stride(), *back.stride(),
        TOKENS=tokens, COLUMNS=columns, PAIRS=64, num_warps=8,
    )  # fmt: skip
