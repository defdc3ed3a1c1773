"""The product with the unembedding and the exponentials of its logits in one kernel, in Triton.

Reading the logits again (`rows.error_kernel`) takes a seventh of the product's time where the hidden is wide, and two
thirds where it is narrow. Here a tile of logits becomes y = exp(z - z_gold) while it is still in registers, is written
once, and leaves the sums of its rows behind; `finish_kernel` makes of them what `error_kernel` returns. The gold logit
has to be known beforehand: `gold_logit_kernel` takes it from the gold token's row of the unembedding. What else is done
row by row is done in these two, and not in launches of its own: with small chunks a GPU waits for the host.

One program a processor goes through the tiles, so that the next tile's operands are on their way while this one's
exponentials are taken (the persistent product of Triton's tutorials); tiles that share rows of the unembedding follow
each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from localexit.kernels.rows import _EXP_OVERFLOW, _expm1, _row_end, repair_row

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def gold_logit_kernel(
    hidden, weight, target, is_counted, clean, out, width, row_stride, column_stride, weight_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`clean` hidden states, zero where not counted, and their ⟨h, W[target]⟩ in fp32; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    gold = tl.load(target + row)
    counts = tl.load(is_counted + row) != 0
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        inside = lanes < width
        # Not read where it does not count: it may hold anything.
        h = tl.load(hidden + row * row_stride + lanes * column_stride, mask=inside & counts, other=0.0)
        h = h.to(clean.dtype.element_ty)
        tl.store(clean + row * width + lanes, h, mask=inside)
        w = tl.load(weight + gold * weight_stride + lanes, mask=inside, other=0.0).to(tl.float32)
        total += h.to(tl.float32) * w
    tl.store(out + row, tl.sum(total, 0))


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile [ROWS, COLUMNS]."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _exponentials(
    z, reference, gold, gold_value, is_counted, first, vocab_size, values, row_start, column_start,
    IS_FINAL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write exp(z - reference) of a part of a tile, `gold_value` for gold; the sums of its rows, and what was written.

    `reference` is in units of log 2, `gold` relative to the tile.
    """
    lanes = first + tl.arange(0, COLUMNS)
    d = z * _LOG2_E - reference[:, None]
    is_other = lanes[None, :] != gold[:, None]
    if IS_FINAL:
        y = tl.where(is_other, tl.exp2(d), gold_value[:, None])
        # Selected, not multiplied: a row that does not count may hold anything.
        y = tl.where(is_counted[:, None], y, 0.0)
        stored = y.to(values.dtype)
    else:
        if column_start + first + COLUMNS > vocab_size:
            is_other = is_other & ((column_start + lanes) < vocab_size)[None, :]
        y = tl.where(is_other, tl.exp2(d), 0.0)
        # What overflows is marked by the difference itself, for the repair.
        stored = tl.where(y > _EXP_OVERFLOW, d * (-1 / _LOG2_E), y).to(values.dtype)
    values.store([row_start, column_start + first], stored)
    return tl.sum(y, 1), stored.to(tl.float32)


@triton.jit
def _keep_group(left, right, largest, total, inside):
    """Maximum and sum of a group of columns, given as two parts of a tile."""
    tl.store(largest, tl.maximum(tl.max(left, 1), tl.max(right, 1)), mask=inside)
    tl.store(total, tl.sum(left, 1) + tl.sum(right, 1), mask=inside)


@triton.jit
def product_kernel(
    hidden, weight, values, gold_logit, log_prob, is_counted, target, tile_sum, group_max, group_sum,
    num_rows, vocab_size, num_tiles, num_groups, first,
    WIDTH: tl.constexpr, IS_FINAL: tl.constexpr, NEED_GROUPS: tl.constexpr, PROGRAMS: tl.constexpr,
    SHARING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS tokens by COLUMNS = 2 GROUP columns; hidden, weight and values are tensor descriptors.

    IS_FINAL: the log-probability of gold is known, and the values are the error itself, as in `rows.tile_error_kernel`;
    the columns are those from `first` on of a larger vocabulary.
    """
    QUARTER: tl.constexpr = COLUMNS // 4
    num_bands = tl.cdiv(num_rows, ROWS)
    for tile in tl.range(tl.program_id(0), num_bands * num_tiles, PROGRAMS, flatten=True):
        first_band = tile // (SHARING * num_tiles) * SHARING
        bands = min(num_bands - first_band, SHARING)
        band = first_band + tile % (SHARING * num_tiles) % bands
        column_tile = tile % (SHARING * num_tiles) // bands
        row_start, column_start = band * ROWS, column_tile * COLUMNS
        z = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, WIDTH, DEPTH):
            z = tl.dot(hidden.load([row_start, k]), weight.load([column_start, k]).T, z)

        rows = row_start + tl.arange(0, ROWS)
        inside = rows < num_rows
        reference = tl.load(gold_logit + rows, mask=inside, other=0.0)
        gold_value = tl.zeros((ROWS,), tl.float32)
        counts = inside
        if IS_FINAL:
            log_p = tl.load(log_prob + rows, mask=inside, other=0.0)
            reference -= log_p
            gold_value = _expm1(log_p)
            counts = tl.load(is_counted + rows, mask=inside, other=0) != 0
        reference *= _LOG2_E
        gold = tl.load(target + rows, mask=inside, other=0).to(tl.int32) - first - column_start
        # Quarters, one after the other: a whole tile of exponentials does not fit the registers.
        left, right = _halves(z, ROWS, COLUMNS)
        z0, z1 = _halves(left, ROWS, COLUMNS // 2)
        z2, z3 = _halves(right, ROWS, COLUMNS // 2)
        sum0, y0 = _exponentials(
            z0, reference, gold, gold_value, counts, 0, vocab_size, values, row_start, column_start, IS_FINAL, QUARTER,
        )  # fmt: skip
        sum1, y1 = _exponentials(
            z1, reference, gold, gold_value, counts, QUARTER, vocab_size, values, row_start, column_start,
            IS_FINAL, QUARTER,
        )  # fmt: skip
        groups = rows.to(tl.int64) * num_groups + 2 * column_tile
        if NEED_GROUPS:
            _keep_group(y0, y1, group_max + groups, group_sum + groups, inside)
        sum2, y2 = _exponentials(
            z2, reference, gold, gold_value, counts, 2 * QUARTER, vocab_size, values, row_start, column_start,
            IS_FINAL, QUARTER,
        )  # fmt: skip
        sum3, y3 = _exponentials(
            z3, reference, gold, gold_value, counts, 3 * QUARTER, vocab_size, values, row_start, column_start,
            IS_FINAL, QUARTER,
        )  # fmt: skip
        if NEED_GROUPS:
            has_second = inside & (2 * column_tile + 1 < num_groups)
            _keep_group(y2, y3, group_max + groups + 1, group_sum + groups + 1, has_second)
        if not IS_FINAL:
            tl.store(tile_sum + rows.to(tl.int64) * num_tiles + column_tile, sum0 + sum1 + sum2 + sum3, mask=inside)


@triton.jit
def finish_kernel(
    values, stride, target, row_weight, tile_sum, vocab_size, num_tiles, num_groups, z_loss,
    loss, log_prob, scale, weighted_scale, gold_logit, group_max, group_sum,
    NEED_GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the sums of a row's tiles its loss, scale and gold entry, as `error_kernel`; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    parts = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_tiles, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        parts += tl.load(tile_sum + row * num_tiles + tiles, mask=tiles < num_tiles, other=0.0)
    others = tl.sum(parts, 0)
    weight = tl.load(row_weight + row)
    if others > _EXP_OVERFLOW:
        repair_row(
            row, values, stride, target, vocab_size, num_groups, 0.0, z_loss,
            loss, log_prob, scale, gold_logit, loss, group_max, group_sum, False, False, NEED_GROUPS, GROUP,
        )  # fmt: skip
        tl.store(weighted_scale + row, weight)
    else:
        z_gold = tl.load(gold_logit + row)
        log_s, a, row_loss, gold_value, _ = _row_end(others, z_gold, z_loss, 0.0, 1)
        tl.store(values + row * stride + tl.load(target + row), gold_value.to(values.dtype.element_ty))
        tl.store(loss + row, row_loss)
        tl.store(log_prob + row, -log_s)
        tl.store(scale + row, a / (others + 1))
        tl.store(weighted_scale + row, weight * (a / (others + 1)))
