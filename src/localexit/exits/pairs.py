"""Forward pairs (h, z) that outlive a call: what a mirror learns from, and anchors that the exits of a step share."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from localexit.exits.chunked import ExitCall, raw_logits
from localexit.exits.ranks import Chosen, DataParallel, choose_among_ranks
from localexit.feedback.base import Feedback, accumulate_dtype
from localexit.feedback.draws import choice_keys
from localexit.feedback.products import fitting
from localexit.feedback.rows import Pairs, WeightMirror
from localexit.feedback.shared import MeasuredRows, SharedAnchors

# Bytes of anchors' logits that are measured at a time.
_LOGIT_BYTES = 128 * 2**20


@torch.no_grad()
def collect_pairs(
    feedback: Feedback, call: ExitCall, exit_index: int, first_row: int, data_parallel: DataParallel | None
) -> None:
    """Hand a mirror forward pairs of this exit; it learns from them in its `update()`."""
    if not isinstance(feedback, WeightMirror) or not feedback.is_learning:
        return
    chosen = choose_tokens(feedback, call, exit_index, first_row, feedback.num_pairs, data_parallel)
    # Measured in the weight's own dtype: autocast would round what the mirror is to learn.
    with torch.autocast(call.hidden.device.type, enabled=False):
        hidden = chosen.hidden.to(call.weight.dtype)
        logits = raw_logits(hidden, call.weight)
    feedback.collect(exit_index, Pairs(hidden=hidden, logits=logits, keys=chosen.keys))


def with_state(
    feedback: Feedback, call: ExitCall, exit_index: int, first_row: int, data_parallel: DataParallel | None
) -> tuple[ExitCall, list[Tensor]]:
    """The tensors a rule computes this call from, `Feedback.state`; anchors that exits share are measured if need be.

    Returns:
        The call, with how many anchors it was if there are such, and the tensors.
    """
    has_tokens = len(call.hidden) > 0 or data_parallel is not None
    if not isinstance(feedback, SharedAnchors) or not call.need_hidden or not has_tokens:
        return call, feedback.state(call.weight)
    measured = feedback.measured if feedback.training else None
    if measured is None:
        chosen = choose_tokens(feedback, call, exit_index, first_row, feedback.num_anchors, data_parallel)
        hidden = chosen.hidden.to(call.compute_dtype)
        measured = measured_rows(feedback, hidden, chosen.is_counted, call.weight)
        if feedback.training:
            feedback.keep(measured)
    return replace(call, num_measured=measured.count), [measured.rows]


@torch.no_grad()
def measured_rows(rule: SharedAnchors, hidden: Tensor, is_counted: Tensor, weight: Tensor) -> MeasuredRows:
    """The rows that the exits of a step share, from the logits of some tokens of one.

    Args:
        rule: it keeps nothing.
        hidden: [M, D] in the dtype of the exit's products, zero where not counted.
        is_counted: bool [M].
        weight: [V, D], or this rank's rows of it.
    """
    dtype = hidden.dtype if hidden.is_cuda and hidden.dtype == torch.bfloat16 else accumulate_dtype(hidden.dtype)
    # A GPU sums products of low precision in fp32, a CPU rounds them: what is solved for would not bear that.
    operands = hidden if hidden.is_cuda else hidden.to(dtype)
    size = fitting(_LOGIT_BYTES, 4 * len(hidden))
    with torch.autocast(hidden.device.type, enabled=False):
        parts = (part.to(hidden.dtype).to(operands.dtype) for part in weight.split(size))
        return rule.solved(hidden, is_counted, (raw_logits(operands, part) for part in parts), dtype=dtype)


def choose_tokens(
    rule: Feedback, call: ExitCall, exit_index: int, first_row: int, num: int, data_parallel: DataParallel | None
) -> Chosen:
    """The rule's choice of so many tokens that count, of all ranks."""
    is_counted = call.target != call.options.ignore_index
    keys = choice_keys(rule.seed, rule.step, exit_index, is_counted, first_row)
    return choose_among_ranks(call.hidden.detach(), keys, num, data_parallel)
