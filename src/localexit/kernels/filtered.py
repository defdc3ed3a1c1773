"""dW from the entries of the error that matter, in Triton: rows gathered per group of tokens, then one product each.

Late in training a row's error is spread over few tokens; the rest of its V entries are rounding noise next to them. Cut
Cross-Entropy (Wijmans et al. 2024) skips tiles of the error whose entries are all below a threshold. Here the rows are
gathered first, for each group of tokens those with a significant entry in it, so that a group's product is as long as
its list and not as the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def list_rows_kernel(
    group_max, scale, target, num_rows, num_groups, threshold, rows, counts,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows with an entry of at least `threshold`, or gold, in a group, ascending; one program a group."""
    group = tl.program_id(0)
    own = rows + group.to(tl.int64) * num_rows
    count = 0
    for start in range(0, num_rows, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < num_rows
        largest = tl.load(group_max + index.to(tl.int64) * num_groups + group, mask=inside, other=0.0)
        size = tl.abs(tl.load(scale + index, mask=inside, other=0.0))
        gold = tl.load(target + index, mask=inside, other=-1)
        # NaN is significant.
        is_small = (largest * size < threshold) & (gold // GROUP != group)
        is_listed = (inside & (is_small == 0)).to(tl.int32)
        tl.store(own + count + tl.cumsum(is_listed, 0) - 1, index, mask=is_listed != 0)
        count += tl.sum(is_listed, 0)
    tl.store(counts + group, count)


@triton.jit
def listed_weight_grad_kernel(
    values, stride, hidden, width, rows, counts, num_rows, vocab_size, total, total_stride, total_column_stride,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """total[v] (+)= Σ_i values[i, v] hidden[i] over a group's listed rows; one program a group and block of columns."""
    group = tl.program_id(1)
    own = rows + group.to(tl.int64) * num_rows
    count = tl.load(counts + group)
    tokens = group * GROUP + tl.arange(0, GROUP)
    token_inside = tokens < vocab_size
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    col_inside = cols < width
    acc = tl.zeros((GROUP, COLUMNS), tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < count
        index = tl.load(own + place, mask=inside, other=0).to(tl.int64)
        error = tl.load(
            values + index[None, :] * stride + tokens[:, None], mask=token_inside[:, None] & inside[None, :], other=0.0
        )
        rows_hidden = tl.load(
            hidden + index[:, None] * width + cols[None, :], mask=inside[:, None] & col_inside[None, :], other=0.0
        )
        acc = tl.dot(error, rows_hidden, acc, input_precision=PRECISION)
    # The caller's accumulator may lie in memory as it likes.
    pointers = total + tokens.to(tl.int64)[:, None] * total_stride + cols.to(tl.int64)[None, :] * total_column_stride
    mask = token_inside[:, None] & col_inside[None, :]
    if ACCUMULATE:
        acc += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, acc.to(total.dtype.element_ty), mask=mask)
