"""A mirror's update in two passes over B: what it predicts wrongly, and in bf16 the correction, rounded at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from localexit.feedback.ridge import Apart
from localexit.kernels.devices import on_its_device
from localexit.kernels.draws import mixed


@triton.jit
def residual_kernel(
    rows, rounded, left_over, logits, logits_stride, logits_step, summed, last, last_step, scaled, along, length, rest,
    residual, num_tokens, width, first, num_here, num_pairs,
    PAIRS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """What B predicts wrongly for the pairs from `first` on, whose logits these are; one program PAIRS by TOKENS.

    residual[p, v] = apart.logits(logits)[p, v] - Σ_d (rounded + left_over)[p, d] rows[v, d], rows in fp32 also taken as
    two such terms (`feedback.products`).
    """
    here = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    pairs = first + here
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    pair_inside, token_inside = here < num_here, tokens < num_tokens
    total = tl.zeros((PAIRS, TOKENS), tl.float32)
    for start in range(0, width, DEPTH):
        cols = start + tl.arange(0, DEPTH)
        col_inside = cols < width
        place = pairs[:, None] * width + cols[None, :]
        inside = pair_inside[:, None] & col_inside[None, :]
        # One reading of the rows for all: what rounding took from the hidden states must not be missing.
        exact = tl.load(
            rows + tokens[None, :].to(tl.int64) * width + cols[:, None],
            mask=col_inside[:, None] & token_inside[None, :],
            other=0.0,
        )
        back = exact.to(rounded.dtype.element_ty)
        hidden = tl.load(rounded + place, mask=inside, other=0.0)
        total = tl.dot(hidden, back, total)
        total = tl.dot(tl.load(left_over + place, mask=inside, other=0.0), back, total)
        if rows.dtype.element_ty != rounded.dtype.element_ty:
            # Nor what it took from rows in fp32.
            total = tl.dot(hidden, (exact - back).to(back.dtype), total)
    inside = pair_inside[:, None] & token_inside[None, :]
    measured = tl.load(
        logits + here[:, None].to(tl.int64) * logits_stride + tokens[None, :].to(tl.int64) * logits_step,
        mask=inside,
        other=0.0,
    )
    # As `Apart.logits`, while the logits are here: a pass of its own would read and write all of them twice.
    sums = tl.load(summed + tokens, mask=token_inside, other=0.0)
    ends = tl.load(last + tokens.to(tl.int64) * last_step, mask=token_inside, other=0.0)
    mean = (ends - 2 * tl.load(scaled + num_pairs - 1) * sums) / tl.load(length)
    is_mean = pairs == num_pairs - 1
    of_sums = 2 * tl.load(scaled + pairs, mask=pair_inside, other=0.0)
    of_mean = tl.load(along + pairs, mask=pair_inside & (pairs < num_pairs - 1), other=0.0)
    apart = measured - of_sums[:, None] * sums[None, :] - of_mean[:, None] * mean[None, :]
    apart = tl.where(is_mean[:, None], tl.load(rest) * mean[None, :], apart)
    place = pairs[:, None].to(tl.int64) * num_tokens + tokens[None, :]
    tl.store(residual + place, (apart - total).to(residual.dtype.element_ty), mask=inside)


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
    place = rows + tokens[:, None].to(tl.int64) * width + cols[None, :]
    inside = token_inside[:, None] & col_inside[None, :]
    total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    # A hash of every row and of every column, and a product of both: hashing every number would take longer than
    # reading and writing it.
    of_row = mixed(tokens.to(tl.uint32) ^ mixed(seed.to(tl.uint32)))
    of_column = mixed(cols.to(tl.uint32) ^ mixed(seed.to(tl.uint32) ^ 0x9E3779B9))
    noise = ((of_row[:, None] ^ of_column[None, :]) * 0x7FEB352D) >> 16
    # A carry out of the dropped bits is the step up, also into the exponent.
    bits = (total.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
    tl.store(place, bits.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=inside)


@on_its_device
def residuals(rows: Tensor, apart: Apart, logits: Sequence[Tensor], *, terms: torch.dtype = torch.bfloat16) -> Tensor:
    """`apart.logits(torch.cat(logits)) - apart.hidden @ rows.T` as if nothing were rounded.

    A residual is a small difference of large numbers: the hidden states are taken as a bf16 number and what is left of
    them, which is another one. The logits are not copied, and the rows read once for all pairs of an exit.

    Args:
        rows: bf16 or fp32 [V, D], contiguous.
        apart: of all pairs, fp32.
        logits: fp32 [P, V] of the pairs of each exit; may lie column by column.
        terms: dtype of what is multiplied.

    Returns:
        [M, V] in the rows' dtype.
    """
    (num_tokens, width), num_pairs = rows.shape, len(apart.hidden)
    rounded = apart.hidden.to(terms).contiguous()
    left_over = (apart.hidden - rounded).to(terms).contiguous()
    result = torch.empty(num_pairs, num_tokens, dtype=rows.dtype, device=rows.device)
    summed, last = apart.summed(logits), logits[-1][-1]
    # Every program takes rows in fp32 apart for itself: fewer and larger ones.
    pairs, depth, warps = (64, 64, 4) if rows.dtype == terms else (128, 32, 8)
    tokens, first = 128, 0
    for of_exit in logits:
        residual_kernel[(triton.cdiv(len(of_exit), pairs), triton.cdiv(num_tokens, tokens))](
            rows, rounded, left_over, of_exit, *of_exit.stride(), summed, last, *last.stride(),
            apart.scaled, apart.along, apart.length, apart.rest,
            result, num_tokens, width, first, len(of_exit), num_pairs,
            PAIRS=pairs, TOKENS=tokens, DEPTH=depth, num_warps=warps, num_stages=3,
        )  # fmt: skip
        first += len(of_exit)
    return result


@on_its_device
def correct(rows: Tensor, residual: Tensor, back: Tensor, *, seed: int) -> None:
    """`rows += residualᵀ @ back` in place, rounded up or down at random so that the mean is exact.

    Args:
        rows: bf16 [V, D], contiguous.
        residual: [P, V]; bf16 is fast, and what it rounds of a correction is far below a step of the rows.
        back: [P, D] in the same dtype; both may lie column by column, as a solver's result does.
        seed: of the rounding, in 0..2^31 - 1; another one for every update.
    """
    num_tokens, width = rows.shape
    # Measured on an H100: with few pairs reading and writing are all there is, and small programs overlap them.
    tokens, warps = (64, 4) if len(residual) <= 256 else (128, 8)
    columns = 128
    correct_kernel[(triton.cdiv(width, columns), triton.cdiv(num_tokens, tokens))](
        rows, residual, back, num_tokens, width, len(residual), seed, *residual.stride(), *back.stride(),
        TOKENS=tokens, COLUMNS=columns, PAIRS=64, num_warps=warps,
    )  # fmt: skip
