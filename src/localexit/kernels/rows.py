"""One pass over a chunk of logits, in place, in Triton: the fused form of `exits.loss.loss_and_error`.

With d = z - z_gold, y = exp(d), s = Σ y, a = 1 + 2 ζ lse, the error of a row is `(a / s) · values` with

    values_v = y_v - ε s / (a V)                    for v other than gold
    values_gold = y_gold - (1-ε) s / a - ε s / (a V)

(times the slope of a soft cap). `error_kernel` writes the values over the logits and returns the scale a / s: every
logit is read once and written once, and the division never touches the buffer. What makes one pass enough:

- The gold logit is the reference: no maximum has to be known beforehand. An entry more than `OVERFLOW` above it is left
  as `-d` instead of `y`, and `repair_kernel` redoes the row; other rows cost it one comparison.
- The gold entry is written as minus the sum of the others, in fp32: the difference p - 1 of two rounded terms would
  ruin dW for confident targets.
- Maxima and sums of groups of entries are kept, so that top-k and draws look into few groups only.
"""

from __future__ import annotations

import triton
import triton.language as tl

# exp(60) times a vocabulary is far inside fp32 and bf16.
OVERFLOW = tl.constexpr(60.0)
_EXP_OVERFLOW = tl.constexpr(1.1420073898156842e26)


@triton.jit
def _cap(z, softcap, SOFTCAP: tl.constexpr):
    """The logit the loss sees, and its derivative."""
    slope = tl.full(z.shape, 1.0, tl.float32)
    if SOFTCAP:
        # From two sigmoids: 1 - tanh² would cancel where the cap saturates.
        up = tl.sigmoid(2 * z / softcap)
        down = tl.sigmoid(-2 * z / softcap)
        z = softcap * (up - down)
        slope = 4 * up * down
    return z, slope


@triton.jit
def _log1p(x):
    """Log(1 + x) to the last bits also for small x (Kahan's trick)."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def _expm1(x):
    """Exp(x) - 1 to the last bits also for small x (Kahan's trick)."""
    u = tl.exp(x)
    is_plain = (u == 1) | (u - 1 == -1)
    return tl.where(is_plain, tl.where(u == 1, x, -1.0), (u - 1) * (x / tl.where(is_plain, 1.0, tl.log(u))))


@triton.jit
def _row_end(others, z_gold, z_loss, smoothing, vocab_size):
    """What follows from Σ y without gold: log Σ y, a, the loss but for the mean logit, gold's entry, ε s / (a V)."""
    s = others + 1.0
    log_s = _log1p(others)
    row_lse = z_gold + log_s
    a = 1 + 2 * z_loss * row_lse
    # Never divided by zero: the shift changes no entry of the error by more than 1e-6.
    a = tl.where(tl.abs(a) < 1e-6, 1e-6, a)
    row_loss = log_s + z_loss * row_lse * row_lse
    uniform = smoothing * s / (a * vocab_size)
    # y_gold - (1-ε) s/a - ε s/(aV) with y_gold = s - others: no difference of rounded terms for confident targets.
    gold_value = s * (a - 1 + smoothing) / a - others - uniform
    return log_s, a, row_loss, gold_value, uniform


@triton.jit
def error_kernel(
    logits, stride, bias, target, num_rows, vocab_size, num_groups, smoothing, z_loss, softcap,
    loss, log_prob, scale, gold_logit, is_rare, argmax, entropy, group_max, group_sum,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr,
    NEED_STATS: tl.constexpr, NEED_GROUPS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, GROUP columns a step; see the module."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_inside = rows < num_rows
    base = logits + rows * stride
    gold = tl.load(target + rows, mask=row_inside, other=0)
    z_gold = tl.load(base + gold, mask=row_inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z_gold += tl.load(bias + gold).to(tl.float32)
    z_gold, slope_gold = _cap(z_gold, softcap, SOFTCAP)

    rest = tl.zeros((ROWS, GROUP), tl.float32)  # Σ y without gold; summed over columns at the end
    slanted = tl.zeros((ROWS, GROUP), tl.float32)  # Σ y d without gold
    depth = tl.zeros((ROWS, GROUP), tl.float32)  # Σ d
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    best_col = tl.zeros((ROWS,), tl.int32)
    for start in tl.range(0, vocab_size, GROUP, num_stages=STAGES):
        cols = start + tl.arange(0, GROUP)
        col_inside = cols < vocab_size
        inside = row_inside[:, None] & col_inside[None, :]
        pointers = base[:, None] + cols[None, :]
        z = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias + cols, mask=col_inside, other=0.0).to(tl.float32)[None, :]
        z, slope = _cap(z, softcap, SOFTCAP)
        d = z - z_gold[:, None]
        is_other = inside & (cols[None, :] != gold[:, None])
        y = tl.where(is_other, tl.exp(d), 0.0)
        stored = tl.where(is_other & (d > OVERFLOW), -d, y * slope).to(logits.dtype.element_ty)
        tl.store(pointers, stored, mask=inside)
        rest += y
        if NEED_STATS:
            slanted += tl.where(is_other, y * d, 0.0)
            top = tl.max(tl.where(inside, d, float("-inf")), 1)
            best_col = tl.where(top > best, start + tl.argmax(tl.where(inside, d, float("-inf")), 1), best_col)
            best = tl.maximum(top, best)
        if SMOOTHING:
            depth += tl.where(inside, d, 0.0)
        if NEED_GROUPS:
            magnitude = stored.to(tl.float32)
            groups = rows * num_groups + start // GROUP
            tl.store(group_max + groups, tl.max(magnitude, 1), mask=row_inside)
            tl.store(group_sum + groups, tl.sum(magnitude, 1), mask=row_inside)

    others = tl.sum(rest, 1)
    log_s, a, row_loss, gold_value, uniform = _row_end(others, z_gold, z_loss, smoothing, vocab_size)
    gold_value *= slope_gold
    # NaN compares false, and stays NaN.
    # No capped logit is further above gold than `triton_refusal` allows: only their sum may be, which fp32 holds.
    rare = others < 0 if SOFTCAP else others > _EXP_OVERFLOW
    if SMOOTHING:
        tl.debug_barrier()
        for start in range(0, vocab_size, GROUP):
            cols = start + tl.arange(0, GROUP)
            # What overflowed keeps its marks for the repair.
            inside = (row_inside & (rare == 0))[:, None] & (cols < vocab_size)[None, :]
            pointers = base[:, None] + cols[None, :]
            value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32) - uniform[:, None]
            tl.store(pointers, value.to(logits.dtype.element_ty), mask=inside)
    tl.debug_barrier()
    tl.store(base + gold, gold_value.to(logits.dtype.element_ty), mask=row_inside)
    if SMOOTHING:
        mean_depth = tl.sum(depth, 1) / vocab_size
        # The repair cannot sum what underflowed: it finds the mean in place of the loss.
        row_loss = tl.where(rare, mean_depth, row_loss - smoothing * mean_depth)
    tl.store(loss + rows, row_loss, mask=row_inside)
    tl.store(log_prob + rows, -log_s, mask=row_inside)
    tl.store(scale + rows, a / (others + 1), mask=row_inside)
    tl.store(gold_logit + rows, z_gold, mask=row_inside)
    tl.store(is_rare + rows, rare.to(tl.int8), mask=row_inside)
    if NEED_STATS:
        tl.store(argmax + rows, best_col.to(tl.int64), mask=row_inside)
        tl.store(entropy + rows, log_s - tl.sum(slanted, 1) / (others + 1), mask=row_inside)


@triton.jit
def _undo(row, cols, vocab_size, gold, top):
    """Log y - top of the tokens but gold, from the values and marks `error_kernel` left; -inf for the others."""
    is_other = (cols < vocab_size) & (cols != gold)
    stored = tl.load(row + cols, mask=is_other, other=0.0).to(tl.float32)
    d = tl.where(stored < 0, -stored, tl.log(stored))
    return tl.where(is_other, d - top, float("-inf"))


@triton.jit
def repair_row(
    index, logits, stride, target, vocab_size, num_groups, smoothing, z_loss,
    loss, log_prob, scale, gold_logit, entropy, group_max, group_sum,
    SMOOTHING: tl.constexpr, NEED_STATS: tl.constexpr, NEED_GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Redo a row whose maximum is far above its gold logit: the exact error, with scale one."""
    row = logits + index * stride
    gold = tl.load(target + index)
    z_gold = tl.load(gold_logit + index)
    lanes = tl.arange(0, GROUP)
    top = 0.0
    for start in range(0, vocab_size, GROUP):
        top = tl.maximum(top, tl.max(_undo(row, start + lanes, vocab_size, gold, 0.0), 0))
    others = 0.0
    slanted = 0.0
    for start in range(0, vocab_size, GROUP):
        d = _undo(row, start + lanes, vocab_size, gold, top)
        y = tl.exp(d)
        others += tl.sum(y, 0)
        slanted += tl.sum(tl.where(y > 0, y * d, 0.0), 0)
    s = others + tl.exp(-top)
    row_lse = z_gold + top + tl.log(s)
    a = 1 + 2 * z_loss * row_lse
    uniform = smoothing / vocab_size
    gold_value = a * tl.exp(-top) / s - (1 - smoothing) - uniform
    tl.debug_barrier()
    for start in range(0, vocab_size, GROUP):
        cols = start + lanes
        y = tl.exp(_undo(row, cols, vocab_size, gold, top))
        value = tl.where((cols < vocab_size) & (cols != gold), a * y / s - uniform, 0.0).to(logits.dtype.element_ty)
        tl.store(row + cols, value, mask=cols < vocab_size)
        magnitude = tl.abs(value.to(tl.float32))
        if NEED_GROUPS:
            tl.store(group_max + index * num_groups + start // GROUP, tl.max(magnitude, 0))
            tl.store(group_sum + index * num_groups + start // GROUP, tl.sum(magnitude, 0))
    tl.debug_barrier()
    tl.store(row + gold, gold_value.to(logits.dtype.element_ty))
    log_prob_gold = -top - tl.log(s)
    row_loss = -log_prob_gold
    if SMOOTHING:
        row_loss -= smoothing * tl.load(loss + index)
    tl.store(loss + index, row_loss + z_loss * row_lse * row_lse)
    tl.store(log_prob + index, log_prob_gold)
    tl.store(scale + index, 1.0)
    if NEED_STATS:
        tl.store(entropy + index, tl.log(s) - (slanted - tl.exp(-top) * top) / s)


@triton.jit
def repair_kernel(
    logits, stride, target, vocab_size, num_groups, smoothing, z_loss,
    loss, log_prob, scale, gold_logit, is_rare, entropy, group_max, group_sum,
    SMOOTHING: tl.constexpr, NEED_STATS: tl.constexpr, NEED_GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`repair_row` for the rows that are marked; one program a row."""
    index = tl.program_id(0).to(tl.int64)
    if tl.load(is_rare + index) == 0:
        return
    repair_row(
        index, logits, stride, target, vocab_size, num_groups, smoothing, z_loss,
        loss, log_prob, scale, gold_logit, entropy, group_max, group_sum, SMOOTHING, NEED_STATS, NEED_GROUPS, GROUP,
    )  # fmt: skip


@triton.jit
def tile_error_kernel(
    logits, stride, bias, target, gold_logit, log_prob, is_counted,
    num_rows, num_columns, vocab_size, first, smoothing, z_loss, softcap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The error of the columns from `first` on, for row weight one, in place; one program ROWS rows, BLOCK columns."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_inside = rows < num_rows
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    col_inside = cols < num_columns
    inside = row_inside[:, None] & col_inside[None, :]
    pointers = logits + rows[:, None] * stride + cols[None, :]
    z = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + cols, mask=col_inside, other=0.0).to(tl.float32)[None, :]
    z, slope = _cap(z, softcap, SOFTCAP)
    z_gold = tl.load(gold_logit + rows, mask=row_inside, other=0.0)
    log_p = tl.load(log_prob + rows, mask=row_inside, other=0.0)
    gold = tl.load(target + rows, mask=row_inside, other=0) - first
    a = 1 + 2 * z_loss * (z_gold - log_p)
    # Relative to the gold token, and its own p - 1 from the logarithm: see `exits.loss.tile_error`.
    error = a[:, None] * tl.exp((z - z_gold[:, None]) + log_p[:, None])
    gold_error = (a - 1) * tl.exp(log_p) + _expm1(log_p) + smoothing
    error = tl.where(cols[None, :] == gold[:, None], gold_error[:, None], error) - smoothing / vocab_size
    # Selected, not multiplied: a row that does not count may hold anything.
    counts = tl.load(is_counted + rows, mask=row_inside, other=0) != 0
    error = tl.where(counts[:, None], error * slope, 0.0)
    tl.store(pointers, error.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def scale_kernel(source, factor, out, num_entries, BLOCK: tl.constexpr):
    """`out = factor * source`, the product in fp32 and rounded once; factor is a number on the device."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_entries
    value = tl.load(source + index, mask=inside, other=0.0).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(out + index, value.to(out.dtype.element_ty), mask=inside)
