"""Launching the kernels: grids, block sizes by a pure table, outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from localexit.exits.loss import LossOptions, RowResult
from localexit.feedback.groups import GROUP
from localexit.kernels.devices import on_its_device
from localexit.kernels.filtered import list_rows_kernel, listed_weight_grad_kernel
from localexit.kernels.product import finish_kernel, gold_logit_kernel, product_kernel
from localexit.kernels.rows import error_kernel, repair_kernel, scale_kernel, tile_error_kernel
from localexit.kernels.select import select_kernel, weighted_rows_kernel

# Rows a program of the tiles' error.
_TILE_ROWS = 4
# The tiles of `product_pass`: rows and columns of logits, and how much of the width at a time.
_PRODUCT_ROWS, _PRODUCT_COLUMNS, _PRODUCT_DEPTH = 128, 2 * GROUP, 64


def error_launch(num_rows: int) -> tuple[int, int]:
    """Rows a program of the error pass, and its stages; 4 warps.

    With 8 rows and pipelined loads the pass runs at the speed of a copy, given enough programs; for fewer rows smaller
    programs fill the GPU. Measured on an H100, see docs/performance.md.
    """
    return (8, 3) if num_rows >= 8192 else (4, 4)


@dataclass(frozen=True, kw_only=True)
class ErrorPass(RowResult):
    """What `error_pass` and `product_pass` leave besides the values in place of the logits, in fp32.

    Attributes:
        scale: [n], the error is `scale[:, None] * values`.
        group_max, group_sum: [n, G] of the magnitudes of the values without gold, empty unless asked for.
    """

    scale: Tensor
    group_max: Tensor
    group_sum: Tensor


@on_its_device
def error_pass(
    logits: Tensor,
    target: Tensor,
    options: LossOptions,
    *,
    bias: Tensor | None,
    need_stats: bool = False,
    need_groups: bool = False,
) -> ErrorPass:
    """Turn logits [n, V] (without bias) into values in place."""
    num_rows, vocab_size = logits.shape
    num_groups = triton.cdiv(vocab_size, GROUP)
    result = _empty_pass(logits, need_stats=need_stats, need_groups=need_groups)
    is_rare = logits.new_empty(num_rows, dtype=torch.int8)
    flags: dict[str, Any] = {
        "SMOOTHING": options.label_smoothing > 0,
        "NEED_STATS": need_stats,
        "NEED_GROUPS": need_groups,
        "GROUP": GROUP,
    }
    softcap = options.softcap or 1.0
    rows_each, stages = error_launch(num_rows)
    error_kernel[(triton.cdiv(num_rows, rows_each),)](
        logits, logits.stride(0), logits if bias is None else bias, target,
        num_rows, vocab_size, num_groups, options.label_smoothing, options.z_loss, softcap,
        result.loss, result.log_prob, result.scale, result.gold_logit, is_rare, result.argmax, result.entropy,
        result.group_max, result.group_sum,
        HAS_BIAS=bias is not None, SOFTCAP=options.softcap is not None,
        ROWS=rows_each, STAGES=stages, num_warps=4, **flags,
    )  # fmt: skip
    repair_kernel[(num_rows,)](
        logits, logits.stride(0), target, vocab_size, num_groups, options.label_smoothing, options.z_loss,
        result.loss, result.log_prob, result.scale, result.gold_logit, is_rare, result.entropy,
        result.group_max, result.group_sum, num_warps=4, **flags,
    )  # fmt: skip
    return result


def _empty_pass(logits: Tensor, *, need_stats: bool, need_groups: bool) -> ErrorPass:
    num_rows, vocab_size = logits.shape
    nothing = logits.new_empty(0, dtype=torch.float32)

    def rows(dtype: torch.dtype = torch.float32) -> Tensor:
        return logits.new_empty(num_rows, dtype=dtype)

    def table() -> Tensor:
        return logits.new_empty(num_rows, triton.cdiv(vocab_size, GROUP), dtype=torch.float32)

    return ErrorPass(
        loss=rows(),
        gold_logit=rows(),
        log_prob=rows(),
        scale=rows(),
        argmax=rows(torch.int64) if need_stats else nothing,
        entropy=rows() if need_stats else nothing,
        group_max=table() if need_groups else nothing,
        group_sum=table() if need_groups else nothing,
    )


def takes_product(weight: Tensor) -> bool:
    """Whether a product with this unembedding [V, D] can take its exponentials itself, and is the faster way.

    Measured on an H100, where it is for every width (see docs/performance.md); its tiles are made for that GPU.
    """
    vocab_size, width = weight.shape
    # Rows of what is read and written as tiles begin at multiples of 16 bytes.
    is_aligned = width % 8 == 0 and vocab_size % 8 == 0 and weight.is_contiguous() and weight.data_ptr() % 16 == 0
    is_hopper = not weight.is_cuda or _is_hopper(weight.device)
    return weight.dtype == torch.bfloat16 and weight.numel() > 0 and is_aligned and is_hopper


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


@lru_cache
def _num_processors(device: torch.device) -> int:
    # On the CPU, in the interpreter: enough to go through several tiles.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@on_its_device
def product_pass(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    options: LossOptions,
    *,
    is_counted: Tensor,
    row_weight: Tensor,
    clean: Tensor,
    out: Tensor,
    need_groups: bool = False,
) -> ErrorPass:
    """The product and `error_pass` at once, for a plain loss: the values of hidden [n, D] go to `out` [n, V].

    Args:
        hidden: of any dtype and layout.
        weight: [V, D].
        target: int64 [n].
        options: of the loss.
        is_counted: bool [n]; hidden states of other rows are taken as zero, whatever they hold.
        row_weight: fp32 [n], for `weighted_scale`.
        clean: [n, D] in the weight's dtype, contiguous: gets the hidden states that the product takes.
        out: in the weight's dtype.
        need_groups: whether `group_max` and `group_sum` are wanted.
    """
    num_rows, width = hidden.shape
    result = _empty_pass(out, need_stats=False, need_groups=need_groups)
    weighted_scale = torch.empty_like(result.scale)
    vocab_size = weight.shape[0]
    num_tiles = triton.cdiv(vocab_size, _PRODUCT_COLUMNS)
    tile_sum = out.new_empty(num_rows, num_tiles, dtype=torch.float32)
    gold_logit_kernel[(num_rows,)](
        hidden, weight, target, is_counted, clean, result.gold_logit,
        width, hidden.stride(0), hidden.stride(1), weight.stride(0),
        BLOCK=min(1024, triton.next_power_of_2(width)), num_warps=1,
    )  # fmt: skip
    _product(clean, weight, out, target, result.gold_logit, result=result, tile_sum=tile_sum)
    finish_kernel[(num_rows,)](
        out, out.stride(0), target, row_weight, tile_sum,
        vocab_size, num_tiles, triton.cdiv(vocab_size, GROUP), options.z_loss,
        result.loss, result.log_prob, result.scale, weighted_scale, result.gold_logit,
        result.group_max, result.group_sum, NEED_GROUPS=need_groups, GROUP=GROUP, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return replace(result, weighted_scale=weighted_scale)


@on_its_device
def product_tile(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    gold_logit: Tensor,
    log_prob: Tensor,
    is_counted: Tensor,
    out: Tensor,
    first: int,
) -> None:
    """The product and `tile_error` at once, for a plain loss without z-loss: the error goes to `out` [n, columns]."""
    _product(hidden, weight, out, target, gold_logit, log_prob=log_prob, is_counted=is_counted, first=first)


def _product(
    hidden: Tensor,
    weight: Tensor,
    out: Tensor,
    target: Tensor,
    gold_logit: Tensor,
    *,
    result: ErrorPass | None = None,
    tile_sum: Tensor | None = None,
    log_prob: Tensor | None = None,
    is_counted: Tensor | None = None,
    first: int = 0,
) -> None:
    """Launch `product_kernel`: with sums for `result`, or with what makes the values final."""
    (num_rows, width), vocab_size = hidden.shape, weight.shape[0]
    if num_rows == 0:
        return
    is_final = result is None
    group_max, group_sum = (gold_logit, gold_logit) if result is None else (result.group_max, result.group_sum)
    num_programs = _num_processors(hidden.device)
    product_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(hidden.contiguous(), [_PRODUCT_ROWS, _PRODUCT_DEPTH]),
        TensorDescriptor.from_tensor(weight, [_PRODUCT_COLUMNS, _PRODUCT_DEPTH]),
        TensorDescriptor.from_tensor(out, [_PRODUCT_ROWS, _PRODUCT_COLUMNS // 4]),
        gold_logit, log_prob, is_counted, target, tile_sum, group_max, group_sum,
        num_rows, vocab_size, triton.cdiv(vocab_size, _PRODUCT_COLUMNS), triton.cdiv(vocab_size, GROUP), first,
        WIDTH=width, IS_FINAL=is_final, NEED_GROUPS=not is_final and group_max.numel() > 0, PROGRAMS=num_programs,
        SHARING=16, ROWS=_PRODUCT_ROWS, COLUMNS=_PRODUCT_COLUMNS, DEPTH=_PRODUCT_DEPTH, num_warps=8, num_stages=3,
    )  # fmt: skip


@on_its_device
def select(
    values: Tensor,
    scale: Tensor,
    target: Tensor,
    uniforms: Tensor,
    group_max: Tensor,
    group_sum: Tensor,
    topk: int,
) -> tuple[Tensor, Tensor]:
    """Ids int64 [n, 1 + k + m] and weights fp32 [n, 1 + k + m]: gold, the top-k and the draws, as `Error.select`."""
    num_rows, vocab_size = values.shape
    num_draws, num_groups = uniforms.shape[1], group_max.shape[1]
    ids = target.new_empty(num_rows, 1 + topk + num_draws)
    weights = scale.new_empty(ids.shape)
    select_kernel[(num_rows,)](
        values, values.stride(0), scale, target, uniforms, group_max, group_sum, num_groups, vocab_size, ids, weights,
        TOP=topk, TOP_BLOCK=triton.next_power_of_2(max(topk, 1)),
        DRAWS=num_draws, DRAWS_BLOCK=triton.next_power_of_2(max(num_draws, 1)),
        GROUP=GROUP, GROUPS=triton.next_power_of_2(num_groups), num_warps=4,
    )  # fmt: skip
    return ids, weights


@on_its_device
def weighted_rows(ids: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """Σ_k weights[i, k] rows[ids[i, k]]: fp32 [n, D]."""
    num_rows, num_picks = ids.shape
    width = rows.shape[1]
    out = weights.new_empty(num_rows, width)
    block = min(1024, triton.next_power_of_2(width))
    weighted_rows_kernel[(num_rows, triton.cdiv(width, block))](
        ids, weights, rows, *rows.stride(), out, width, PICKS=num_picks, BLOCK=block, num_warps=4
    )
    return out


@on_its_device
def tile_error(
    logits: Tensor,
    target: Tensor,
    gold_logit: Tensor,
    log_prob: Tensor,
    is_counted: Tensor,
    options: LossOptions,
    vocab_size: int,
    bias: Tensor | None,
    first: int,
) -> None:
    """As `exits.loss.tile_error`, from logits without the bias."""
    num_rows, num_columns = logits.shape
    if num_rows == 0:
        return
    block = min(512, triton.next_power_of_2(num_columns))
    tile_error_kernel[(triton.cdiv(num_rows, _TILE_ROWS), triton.cdiv(num_columns, block))](
        logits, logits.stride(0), logits if bias is None else bias, target, gold_logit, log_prob, is_counted,
        num_rows, num_columns, vocab_size, first, options.label_smoothing, options.z_loss, options.softcap or 1.0,
        HAS_BIAS=bias is not None, SOFTCAP=options.softcap is not None, ROWS=_TILE_ROWS, BLOCK=block, num_warps=4,
    )  # fmt: skip


@on_its_device
def scaled(source: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`factor * source` in `dtype`, for a 0-dim factor: PyTorch's own product with one is three times as slow."""
    source = source.contiguous()
    out = torch.empty_like(source, dtype=dtype)
    block = 4096
    if source.numel():
        scale_kernel[(triton.cdiv(source.numel(), block),)](
            source, factor, out, source.numel(), BLOCK=block, num_warps=8
        )
    return out


@on_its_device
def add_listed_weight_grad(
    values: Tensor,
    total: Tensor | None,
    scaled_hidden: Tensor,
    target: Tensor,
    group_max: Tensor,
    scale: Tensor,
    threshold: float,
) -> Tensor:
    """`total + valuesᵀ @ scaled_hidden` from the groups of values [n, V] that matter, in place where there is a total.

    Args:
        values: [n, V], of which `scale[:, None] * values` is the error for a row weight of one.
        total: [V, D], or None to make one in the dtype of the values.
        scaled_hidden: [n, D] in the dtype of the values, contiguous.
        target: int64 [n]; the group of the gold token is always taken.
        group_max: fp32 [n, G], largest magnitude of a row in each group, without gold.
        scale: fp32 [n].
        threshold: smallest error that matters.
    """
    num_rows, vocab_size = values.shape
    num_groups, width = group_max.shape[1], scaled_hidden.shape[1]
    rows = torch.empty(num_groups, num_rows, dtype=torch.int32, device=values.device)
    counts = torch.empty(num_groups, dtype=torch.int32, device=values.device)
    list_rows_kernel[(num_groups,)](
        group_max, scale, target, num_rows, num_groups, threshold, rows, counts,
        GROUP=GROUP, BLOCK=min(1024, triton.next_power_of_2(max(num_rows, 1))), num_warps=4,
    )  # fmt: skip
    out = values.new_empty(vocab_size, width) if total is None else total
    columns = max(16, min(256, triton.next_power_of_2(width)))
    listed_weight_grad_kernel[(triton.cdiv(width, columns), num_groups)](
        values, values.stride(0), scaled_hidden, width, rows, counts, num_rows, vocab_size,
        out, out.stride(0), out.stride(1),
        ACCUMULATE=total is not None, PRECISION="ieee" if values.dtype == torch.float32 else "tf32",
        GROUP=GROUP, BLOCK=64 if values.dtype != torch.float32 else 32, COLUMNS=columns, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out
