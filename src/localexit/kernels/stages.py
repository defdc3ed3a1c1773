"""The stages of an exit with Triton kernels: the same contract as `exits.chunked.PLAIN`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from localexit.exits.chunked import (
    FILTER_THRESHOLD,
    ExitCall,
    LossCall,
    Stages,
    add_weight_grad,
    call_rule,
    plain_logits,
)
from localexit.exits.loss import LossOptions, RowResult
from localexit.feedback.base import Error
from localexit.kernels.launch import (
    ErrorPass,
    add_listed_weight_grad,
    error_pass,
    product_pass,
    product_tile,
    scaled,
    select,
    takes_product,
    tile_error,
    weighted_rows,
)


@dataclass(frozen=True, kw_only=True)
class GroupedError(Error):
    """View of the error that finds its largest entries, and draws, through maxima and sums of groups of entries.

    Attributes:
        group_max, group_sum: fp32 [n, G] of the magnitudes of `values` without gold; empty when no rule selects.
    """

    group_max: Tensor = field(default_factory=lambda: torch.empty(0))
    group_sum: Tensor = field(default_factory=lambda: torch.empty(0))

    def topk(self, k: int, exclude: Tensor) -> Tensor:
        """As `Error.topk`."""
        return self.kept(k, exclude)[0][:, 1:]

    def kept(self, k: int, target: Tensor) -> tuple[Tensor, Tensor]:
        """As `Error.kept`, in one kernel."""
        return self.select(k, self.scale.new_empty(self.scale.shape[0], 0), target)

    def select(self, k: int, uniforms: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """As `Error.select`, in one kernel."""
        k = min(k, self.values.shape[1] - 1)
        return select(self.values, self.scale, target, uniforms, self.group_max, self.group_sum, k)

    def weighted_rows(self, ids: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        """As `Error.weighted_rows`, with sums in fp32 whatever the rows are stored in: fp32 [n, D]."""
        return weighted_rows(ids, weights.contiguous(), rows)

    def weighted_codes(self, ids: Tensor, weights: Tensor, codes: Tensor) -> Tensor:
        """As `Error.weighted_codes`, by the same kernel."""
        return self.weighted_rows(ids, weights, codes)


def fused_loss_and_error(
    logits: Tensor,
    target: Tensor,
    options: LossOptions,
    *,
    bias: Tensor | None = None,
    need_error: bool = True,
    need_logits: bool = False,
    need_groups: bool = False,
    need_stats: bool = False,
    scratch: Tensor | None = None,
) -> ErrorPass:
    """As `exits.loss.loss_and_error`, from logits without the bias, leaving `values` with the returned scale."""
    del need_error, scratch
    assert not need_logits, "`supported` refuses rules that read the logits"
    return error_pass(logits, target, options, bias=bias, need_stats=need_stats, need_groups=need_groups)


def _is_plain(call: LossCall) -> bool:
    return call.bias is None and call.options.softcap is None and not call.options.label_smoothing


def _fused_product(call: ExitCall, weight: Tensor) -> Callable[..., RowResult] | None:
    return product_pass if _is_plain(call) and not call.need_stats and takes_product(weight) else None


def _fused_tile(call: LossCall, weight: Tensor) -> Callable[..., None] | None:
    return product_tile if _is_plain(call) and not call.options.z_loss and takes_product(weight) else None


def _logits_without_bias(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    del bias
    plain_logits(hidden, weight, None, out)


def _add_filtered_weight_grad(
    total: Tensor | None, values: Tensor, scaled_hidden: Tensor, target: Tensor, result: RowResult
) -> Tensor:
    assert isinstance(result, ErrorPass)
    return add_listed_weight_grad(
        values, total, scaled_hidden, target, result.group_max, result.scale, FILTER_THRESHOLD
    )


def _grouped_view(values: Tensor, scale: Tensor, result: RowResult) -> Error:
    assert isinstance(result, ErrorPass)
    return GroupedError(values=values, scale=scale, group_max=result.group_max, group_sum=result.group_sum)


def _compute_dtype(call: LossCall) -> torch.dtype:
    return call.compute_dtype


TRITON = Stages(
    name="triton",
    logits=_logits_without_bias,
    loss_and_error=fused_loss_and_error,
    fused_product=_fused_product,
    fused_tile=_fused_tile,
    tile_error=tile_error,
    add_weight_grad=add_weight_grad,
    add_filtered_weight_grad=_add_filtered_weight_grad,
    view=_grouped_view,
    feedback=call_rule,
    scaled=scaled,
    has_bias=False,
    buffer_dtype=_compute_dtype,
    value_dtype=_compute_dtype,
    # Large: a single chunk needs no accumulator for dW, and one pass over W for all of its products.
    chunk_bytes={"cpu": 32 * 2**20, "cuda": 4 * 2**30},
)
