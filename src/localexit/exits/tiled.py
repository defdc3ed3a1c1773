"""dW by vocabulary tiles: the second pass of the memory preset.

The first pass left the logit and the log-probability of every gold token. A tile of columns then needs its own logits
only: they are made again, turned into the error, and give the tile's rows of dW in one product over all tokens. A third
product, for which no [V, D] accumulator and no large chunk of logits exists; and what reaches the loss from above is
known by then, so the gradient is written once, scaled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from localexit.exits.chunked import ALIGNMENT, LossCall, Stages, is_in_vocabulary, split_together
from localexit.feedback.base import product

# Bytes of one tile [N, columns] of logits, by device type; on a GPU of the tile and the scaled hidden states together:
# with 256 MiB in all, the rest is for the allocator and for what the rule keeps.
TILE_BYTES = {"cpu": 64 * 2**20, "cuda": 176 * 2**20}


def add_tiled_grads(
    call: LossCall,
    gold_logit: Tensor,
    log_prob: Tensor,
    stages: Stages,
    *,
    weight_grad: Tensor | None,
    bias_grad: Tensor | None,
) -> None:
    """Add dW to `weight_grad` [V, D] and db to `bias_grad` [V], in place.

    Args:
        call: the exit; its row weights include what comes from above.
        gold_logit: [N], as the first pass saw it.
        log_prob: [N], of the gold token.
        stages: the backend's steps.
        weight_grad: accumulator, or None to leave dW out; in the dtype of the products, or the accumulation dtype.
        bias_grad: accumulator in the accumulation dtype, or None.
    """
    vocab_size = call.weight.shape[0]
    is_counted = (call.target != call.options.ignore_index) & is_in_vocabulary(call.target, vocab_size)
    # A number of the host would be copied to the device.
    zero = call.hidden.new_zeros(())
    scale = torch.where(is_counted, call.row_weight, zero)[:, None]
    value_dtype = stages.value_dtype(call)
    clean = torch.where(is_counted[:, None], call.hidden, zero)
    scaled = torch.mul(clean, scale, out=clean.new_empty(clean.shape, dtype=value_dtype))
    del clean
    hidden = call.hidden.to(call.compute_dtype)
    buffer_dtype = stages.buffer_dtype(call)
    columns = _tile_columns(len(hidden), buffer_dtype.itemsize, scaled)
    buffer = hidden.new_empty(len(hidden) * min(columns, vocab_size), dtype=buffer_dtype)
    tiles = split_together((call.weight, call.bias, weight_grad, bias_grad), columns)
    for start, (weight, bias, weight_sum, bias_sum) in zip(range(0, vocab_size, columns), tiles, strict=True):
        weight = weight.to(call.compute_dtype)
        bias = None if bias is None else bias.to(scale.dtype)
        logits = buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        fused_tile = stages.fused_tile(call, weight)
        if fused_tile is not None:
            fused_tile(hidden, weight, call.target, gold_logit, log_prob, is_counted, logits, start)
        else:
            stages.logits(hidden, weight, bias, logits)
            stages.tile_error(
                logits, call.target, gold_logit, log_prob, is_counted, call.options, vocab_size, bias, start
            )
        values = logits.to(value_dtype)
        if weight_sum is not None:
            stages.add_weight_grad(weight_sum, values, scaled)
        if bias_sum is not None:
            bias_sum += product(values.T, scale.to(value_dtype), bias_sum.dtype)[:, 0]


def _tile_columns(num_rows: int, itemsize: int, scaled: Tensor) -> int:
    budget = TILE_BYTES.get(scaled.device.type, TILE_BYTES["cpu"]) - (scaled.nbytes if scaled.is_cuda else 0)
    columns = max(1, budget // (max(num_rows, 1) * itemsize))
    return columns // ALIGNMENT * ALIGNMENT or columns
