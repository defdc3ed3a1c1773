"""Top-k, draws and sums of gathered rows, in Triton: each looks only into the few groups it needs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _nth(vector, position, WIDTH: tl.constexpr):
    """The element of a one-dimensional tensor at a scalar position."""
    return tl.sum(tl.where(tl.arange(0, WIDTH) == position, vector, 0), 0)


@triton.jit
def select_kernel(
    values, stride, scale, target, uniforms, group_max, group_sum, num_groups, vocab_size, ids_out, weights_out,
    TOP: tl.constexpr, TOP_BLOCK: tl.constexpr, DRAWS: tl.constexpr, DRAWS_BLOCK: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Gold, the TOP largest magnitudes without it, and DRAWS draws in proportion to the rest; one program a row.

    What is kept is weighted by its entry, what is drawn by its share of the rest, both times the row's scale.

    The TOP largest entries lie in the TOP groups with the largest maxima: only those are loaded. What the chosen leave
    behind in these groups is summed anew: subtracting them from a group's sum would leave rounding noise to draw from.
    """
    index = tl.program_id(0).to(tl.int64)
    row = values + index * stride
    gold = tl.load(target + index).to(tl.int32)
    row_scale = tl.load(scale + index)
    ids_out += index * (1 + TOP + DRAWS)
    weights_out += index * (1 + TOP + DRAWS)
    tl.store(ids_out, gold.to(tl.int64))
    tl.store(weights_out, row_scale * tl.load(row + gold).to(tl.float32))
    groups = tl.arange(0, GROUPS)
    lanes = tl.arange(0, GROUP)
    mass = tl.load(group_sum + index * num_groups + groups, mask=groups < num_groups, other=0.0)
    taken = tl.full((TOP_BLOCK,), -1, tl.int32)
    if TOP > 0:
        best = tl.load(group_max + index * num_groups + groups, mask=groups < num_groups, other=-1.0)
        slots = tl.arange(0, TOP_BLOCK)
        chosen = tl.full((TOP_BLOCK,), -1, tl.int32)
        for k in tl.static_range(TOP):
            # No group left: the vocabulary has fewer than TOP of them.
            group = tl.where(tl.max(best, 0) >= 0, tl.argmax(best, 0), -1).to(tl.int32)
            chosen = tl.where(slots == k, group, chosen)
            best = tl.where(groups == group, -1.0, best)
        ids = chosen[:, None] * GROUP + lanes[None, :]
        is_free = (chosen >= 0)[:, None] & (ids < vocab_size) & (ids != gold)
        magnitude = tl.abs(tl.load(row + ids, mask=is_free, other=0.0).to(tl.float32))
        magnitude = tl.where(is_free, magnitude, -1.0)
        for k in tl.static_range(TOP):
            flat = tl.max(magnitude, 1)
            slot = tl.argmax(flat, 0)
            lane = tl.sum(tl.where(slots == slot, tl.argmax(magnitude, 1), 0), 0)
            token = _nth(chosen, slot, TOP_BLOCK) * GROUP + lane
            taken = tl.where(slots == k, token, taken)
            magnitude = tl.where(ids == token, -1.0, magnitude)
        left = tl.sum(tl.maximum(magnitude, 0.0), 1)
        for k in tl.static_range(TOP):
            mass = tl.where(groups == _nth(chosen, k, TOP_BLOCK), _nth(left, k, TOP_BLOCK), mass)
        kept = tl.load(row + taken, mask=slots < TOP, other=0.0).to(tl.float32)
        tl.store(ids_out + 1 + slots, taken.to(tl.int64), mask=slots < TOP)
        tl.store(weights_out + 1 + slots, row_scale * kept, mask=slots < TOP)

    if DRAWS > 0:
        draws = tl.arange(0, DRAWS_BLOCK)
        draw_inside = draws < DRAWS
        running = tl.cumsum(mass, 0)
        total = tl.sum(mass, 0)
        threshold = tl.load(uniforms + index * DRAWS + draws, mask=draw_inside, other=0.0) * total
        group = tl.sum((running[None, :] <= threshold[:, None]).to(tl.int32), 1)
        group = tl.minimum(group, num_groups - 1)
        before = tl.sum(tl.where(groups[None, :] < group[:, None], mass[None, :], 0.0), 1)
        ids = group[:, None] * GROUP + lanes[None, :]
        is_free = (ids < vocab_size) & (ids != gold)
        for k in tl.static_range(TOP):
            is_free = is_free & (ids != _nth(taken, k, TOP_BLOCK))
        entries = tl.load(row + ids, mask=is_free, other=0.0).to(tl.float32)
        magnitude = tl.abs(entries)
        offset = tl.sum((tl.cumsum(magnitude, 1) <= (threshold - before)[:, None]).to(tl.int32), 1)
        # Rounding may point past the last entry with mass: there the weight is zero.
        is_drawn = (lanes[None, :] == offset[:, None]) & (magnitude > 0)
        sign = tl.sum(tl.where(is_drawn, tl.where(entries > 0, 1.0, -1.0), 0.0), 1)
        token = tl.minimum(group * GROUP + tl.minimum(offset, GROUP - 1), vocab_size - 1)
        tl.store(ids_out + 1 + TOP + draws, token.to(tl.int64), mask=draw_inside)
        tl.store(weights_out + 1 + TOP + draws, row_scale * (sign * total / DRAWS), mask=draw_inside)


@triton.jit
def weighted_rows_kernel(
    ids, weights, rows, rows_stride, rows_step, out, width,
    PICKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i] = Σ_k weights[i, k] rows[ids[i, k]], sums in fp32; one program a token and block of columns."""
    index = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(PICKS):
        token = tl.load(ids + index * PICKS + k)
        weight = tl.load(weights + index * PICKS + k)
        row = tl.load(rows + token * rows_stride + cols * rows_step, mask=inside, other=0.0)
        total += weight * row.to(tl.float32)
    tl.store(out + index * width + cols, total.to(out.dtype.element_ty), mask=inside)
