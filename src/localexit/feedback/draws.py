"""Counter-based randomness: the same number for the same (seed, step, exit, row), on every backend.

A `torch.Generator` has hidden state that compilation, checkpoint recomputation, chunking and sharding all disturb.
Draws here are a pure function of what they belong to, so the oracle, the CPU loop and a kernel use the same ones.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

from localexit import _checks

# Triton is optional and slow to import: whether it could be.
HAS_TRITON = find_spec("triton") is not None
_MASK = 0xFFFFFFFF
# Odd constants that keep the streams apart; any fixed values do.
_DRAW_STREAM = 0x2545F491
_ROW_STREAM = 0x5851F42D
_EXIT_STREAM = 0x14057B7F
# For `choose_rows`: the tokens that an exit sees, apart from the anchors among them.
SEEN_STREAM = 0x2F83A1C5
# A choice of tokens orders them by hash, then by row: rows take the low bits of a key.
_ROW_BITS = 30
# The keys of tokens that do not count are at least this.
UNCOUNTED = (_MASK + 1) << _ROW_BITS


def derive_seed(seed: int, stream: str) -> int:
    """A 63-bit seed for one named stream of a rule: streams of one seed are independent of each other."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def fresh_seed(seed: int | None) -> int:
    """`seed` itself, or one drawn from torch's default generator when it is None."""
    if seed is not None:
        return _checks.seed(seed)
    return int(torch.randint(2**62, ()).item())


_Bits = TypeVar("_Bits", int, Tensor)


def _mix(x: _Bits) -> _Bits:
    # "lowbias32" by Chris Wellons (public domain): a 32-bit integer hash, here in int64 with a mask.
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def _seed_key(seed: int, stream: int) -> int:
    # Arithmetic all the way, so that torch.compile can trace it: `hashlib` it cannot.
    return _mix(_mix((seed & _MASK) ^ stream) ^ (seed >> 32 & _MASK))


def _exit_term(exit_index: int) -> int:
    return 0x9E3779B9 * (exit_index + 1) & _MASK


def _row_keys(seed: int, stream: int, step: Tensor, exit_index: int, rows: Tensor) -> Tensor:
    key = _mix((step & _MASK) ^ _seed_key(seed, stream))
    key = _mix(key + _exit_term(exit_index) & _MASK)
    return _mix(key ^ _mix(rows & _MASK))


def runs_kernel(step: Tensor, tokens: Tensor) -> bool:
    """Whether the hash is one kernel: on a GPU with Triton, unless the compiler traces, which fuses it by itself."""
    if torch.compiler.is_compiling() or not HAS_TRITON:
        return False
    # A kernel has no use for what stands in for a tensor.
    return step.is_cuda and tokens.is_cuda and type(step) is Tensor and type(tokens) is Tensor


def _to_unit(bits: Tensor) -> Tensor:
    # 24 bits: every value is exact in fp32 and below 1.
    return (bits >> 8).to(torch.float32) * 2.0**-24


def token_uniforms(seed: int, step: Tensor, exit_index: int, rows: Tensor, num: int) -> Tensor:
    """Uniform numbers in [0, 1) for each token.

    Args:
        seed: the rule's seed.
        step: 0-dim int64 tensor, the optimiser step.
        exit_index: which exit of the model.
        rows: int64 [N], the tokens' global row numbers.
        num: how many numbers a token gets.

    Returns:
        fp32 [N, num].
    """
    keys = _row_keys(seed, _DRAW_STREAM, step, exit_index, rows)
    # Mixed, not multiplied: inductor would take a multiple of a range for an index, and compute it in 32 bits.
    lanes = _mix(torch.arange(1, num + 1, device=rows.device))
    return _to_unit(_mix(keys[:, None] ^ lanes[None, :]))


def stratified_uniforms(seed: int, step: Tensor, exit_index: int, rows: Tensor, num: int) -> Tensor:
    """Uniform numbers in [0, 1) for each token, number j of them in the j-th of `num` equal parts of [0, 1).

    Means over a token's numbers are unbiased as with independent ones, and never have more variance: what differs
    between the parts is covered instead of drawn. Arguments and result are those of `token_uniforms`. The numbers are
    the same bits on every device.
    """
    if runs_kernel(step, rows):
        # Triton is optional, and slow to import.
        from localexit.kernels.draws import stratified

        seed_key = _seed_key(seed, _DRAW_STREAM)
        return stratified(step, rows.contiguous(), num, seed_key=seed_key, exit_term=_exit_term(exit_index))
    parts = torch.arange(num, device=rows.device)
    points = parts + token_uniforms(seed, step, exit_index, rows, num)
    # A GPU multiplies by 1 / num, and a compiler may divide less exactly: in fp64 neither changes a bit of the result,
    # because no such quotient is near the middle of two fp32 numbers.
    points = (points.double() / num).float()
    # In fp32 the last part's largest numbers would round to 1.
    return points.clamp_max(1 - 2.0**-24)


def choice_keys(
    seed: int, step: Tensor, exit_index: int, is_counted: Tensor, first_row: int = 0, stream: int = _ROW_STREAM
) -> Tensor:
    """What a choice of tokens orders them by: the ones with the smallest keys are chosen.

    A key is a pure function of (seed, step, exit, global row), so choices among parts of a batch can be merged: the
    smallest of the parts' smallest are the smallest of all.

    Args:
        seed: the rule's seed.
        step: 0-dim int64 tensor, the optimiser step.
        exit_index: which exit of the model.
        is_counted: bool [N], False on ignored tokens.
        first_row: global number of the first of these tokens, which are numbered on from there.
        stream: choices of another stream are independent.

    Returns:
        int64 [N], all different up to 2**30 tokens a step; at least `UNCOUNTED` on tokens that do not count.
    """
    if runs_kernel(step, is_counted):
        from localexit.kernels.draws import keys as keys_of

        of_hash = {"seed_key": _seed_key(seed, stream), "exit_term": _exit_term(exit_index)}
        return keys_of(step, is_counted.contiguous(), first_row, _ROW_BITS, **of_hash)
    rows = torch.arange(is_counted.shape[0], device=is_counted.device) + first_row
    keys = _row_keys(seed, stream, step, exit_index, rows)
    return torch.where(is_counted, keys, _MASK + 1) * (1 << _ROW_BITS) + rows


def choose_rows(
    seed: int,
    step: Tensor,
    exit_index: int,
    is_counted: Tensor,
    num: int,
    first_row: int = 0,
    stream: int = _ROW_STREAM,
) -> Tensor:
    """A uniformly random choice of tokens, without replacement, among those that count.

    Args:
        seed: the rule's seed.
        step: 0-dim int64 tensor, the optimiser step.
        exit_index: which exit of the model.
        is_counted: bool [N], False on ignored tokens.
        num: how many are wanted.
        first_row: global number of the first of these tokens.
        stream: choices of another stream are independent.

    Returns:
        int64 [min(num, N)], ascending. Tokens that do not count appear only when fewer than `num` do: whoever uses
        the rows leaves those out, so that nothing has to be copied to the host to find out how many there are.
    """
    keys = choice_keys(seed, step, exit_index, is_counted, first_row, stream)
    chosen = torch.topk(keys, min(num, is_counted.shape[0]), largest=False).indices
    return chosen.sort().values


def choose_exits(seed: int, step: int, num: int, num_exits: int) -> tuple[int, ...]:
    """A uniformly random choice of exits, without replacement: `num` of 0..num_exits-1, ascending.

    Args:
        seed: the rule's seed.
        step: the optimiser step.
        num: how many are wanted.
        num_exits: how many there are.
    """
    keys = _row_keys(seed, _EXIT_STREAM, torch.tensor(step), 0, torch.arange(num_exits))
    return tuple(sorted(keys.argsort()[:num].tolist()))
