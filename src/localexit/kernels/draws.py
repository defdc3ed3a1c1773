"""The hash of draws and of choices of tokens in one launch instead of some sixty; bit for bit as `feedback.draws`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from localexit.kernels.devices import on_its_device

_BLOCK = 256
_UNIT: tl.constexpr = tl.constexpr(2.0**-24)
_BELOW_ONE: tl.constexpr = tl.constexpr(1 - 2.0**-24)


@triton.jit
def mixed(x):
    """As `feedback.draws._mix`, on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _row_keys(step, seed_key, exit_term, rows):
    """As `feedback.draws._row_keys`."""
    key = mixed(tl.load(step).to(tl.uint32) ^ seed_key.to(tl.uint32))
    key = mixed(key + exit_term.to(tl.uint32))
    return mixed(key ^ mixed(rows.to(tl.uint32)))


@triton.jit(do_not_specialize=["seed_key", "exit_term"])
def stratified_kernel(out, rows, step, num_numbers, seed_key, exit_term, NUM: tl.constexpr, BLOCK: tl.constexpr):
    """out[i, j] = (j + a uniform number) / NUM; one program BLOCK numbers."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_numbers
    part = place % NUM
    keys = _row_keys(step, seed_key, exit_term, tl.load(rows + place // NUM, mask=inside, other=0))
    bits = mixed(keys ^ mixed((part + 1).to(tl.uint32))) >> 8
    points = part.to(tl.float32) + bits.to(tl.float32) * _UNIT
    # Rounded as on a CPU: the plain division is not.
    points = tl.div_rn(points, tl.full((BLOCK,), NUM, tl.float32))
    tl.store(out + place, tl.minimum(points, _BELOW_ONE), mask=inside)


@triton.jit(do_not_specialize=["seed_key", "exit_term", "first_row"])
def keys_kernel(
    out, is_counted, step, num_rows, seed_key, exit_term, first_row, ROW_BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """The keys that a choice of tokens orders them by; one program BLOCK tokens."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_rows
    rows = place.to(tl.int64) + first_row
    keys = _row_keys(step, seed_key, exit_term, rows).to(tl.int64)
    keys = tl.where(tl.load(is_counted + place, mask=inside, other=0) != 0, keys, 1 << 32)
    tl.store(out + place, (keys << ROW_BITS) + rows, mask=inside)


@on_its_device
def stratified(step: Tensor, rows: Tensor, num: int, *, seed_key: int, exit_term: int) -> Tensor:
    """`feedback.draws.stratified_uniforms`: fp32 [N, num].

    Args:
        step: 0-dim int64, on the device of rows.
        rows: int64 [N], contiguous.
        num: numbers a token.
        seed_key: of the hash, in 0..2^32 - 1: of seed and stream.
        exit_term: likewise, of the exit.
    """
    out = torch.empty(len(rows), num, dtype=torch.float32, device=rows.device)
    if out.numel():
        stratified_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
            out, rows, step, out.numel(), _int32(seed_key), _int32(exit_term), NUM=num, BLOCK=_BLOCK, num_warps=4
        )
    return out


@on_its_device
def keys(step: Tensor, is_counted: Tensor, first_row: int, row_bits: int, *, seed_key: int, exit_term: int) -> Tensor:
    """`feedback.draws.choice_keys`: int64 [N].

    Args:
        step: 0-dim int64, on the device of is_counted.
        is_counted: bool [N], contiguous.
        first_row: number of the first token.
        row_bits: how many bits of a key are the token's number.
        seed_key: of the hash, in 0..2^32 - 1: of seed and stream.
        exit_term: likewise, of the exit.
    """
    out = torch.empty(len(is_counted), dtype=torch.int64, device=is_counted.device)
    if out.numel():
        keys_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
            out, is_counted, step, out.numel(), _int32(seed_key), _int32(exit_term), first_row,
            ROW_BITS=row_bits, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def _int32(bits: int) -> int:
    """The signed number of the same 32 bits: one type, and one compiled kernel, for all of them."""
    return bits - (bits >> 31 << 32)
