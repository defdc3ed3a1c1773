"""What one training forward learns from: targets, weights, and where its draws start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localexit import _checks
from localexit.exits.ranks import DataParallel
from localexit.feedback.draws import SEEN_STREAM, choose_rows
from localexit.local.router import Routers

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The targets of one training forward.

    Attributes:
        target: int64 [B, T], labels shifted by one, -100 where nothing is to be predicted.
        num_items: normaliser of the loss, the number of tokens that count, on all ranks together.
        token_weight: [B, T], what each target's loss is multiplied by; None for 1.
        weights: per exit, what its loss counts in the sum; 0 for an exit that sits the step out.
        token_share: the share of the tokens that an exit sees.
        first_row: number of the first token among those of the optimiser step.
        routers: whose auxiliary loss belongs to the units' losses, or None.
        router_mask: [B, T], 0 on tokens that the auxiliary loss leaves out, or None.
    """

    target: Tensor
    num_items: Tensor | int
    token_weight: Tensor | None
    weights: Sequence[float]
    token_share: float
    first_row: int
    routers: Routers | None
    router_mask: Tensor | None

    def check(self, hidden: Tensor) -> None:
        """The labels must fit a hidden [B, T, ...].

        Raises:
            ValueError: they do not.
        """
        if hidden.shape[:2] != self.target.shape:
            raise ValueError(
                f"labels have shape {list(self.target.shape)} but the hidden states are {list(hidden.shape)}: expected "
                f"one label a token; pass labels shaped like input_ids, with {IGNORE_INDEX} where nothing is to be "
                f"learned"
            )

    def seen_by(self, exit_index: int, *, seed: int, step: Tensor) -> Seen:
        """The tokens that an exit sees in this forward, and what its loss is made from.

        Args:
            exit_index: which exit.
            seed: of the draw.
            step: 0-dim, the optimiser step.
        """
        if self.token_share == 1.0:
            return Seen(rows=None, target=self.target, token_weight=self.token_weight, num_items=self.num_items)
        target = self.target.flatten()
        is_counted = target != IGNORE_INDEX
        num = max(1, round(self.token_share * len(target)))
        rows = choose_rows(seed, step, exit_index, is_counted, num, self.first_row, SEEN_STREAM)
        # Each token that counts is as likely as any other: divided by its probability, its loss has the same mean.
        share = is_counted[rows].sum().clamp_min(1) / is_counted.sum().clamp_min(1)
        return Seen(
            rows=rows,
            target=target[None, rows],
            token_weight=None if self.token_weight is None else self.token_weight.flatten()[None, rows],
            num_items=self.num_items * share,
        )


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one exit sees of a batch.

    Attributes:
        rows: int64 [n], which of the B · T tokens; None for all.
        target, token_weight: as in `Batch`, [B, T], or [1, n] for some of the tokens.
        num_items: normaliser of the loss of these tokens.
    """

    rows: Tensor | None
    target: Tensor
    token_weight: Tensor | None
    num_items: Tensor | int

    def of(self, hidden: Tensor) -> Tensor:
        """The hidden states [B, T, ...] of these tokens: all, or [1, n, ...]."""
        return hidden if self.rows is None else hidden.flatten(0, 1)[None, self.rows]


def shifted(labels: Tensor) -> Tensor:
    """What each position is to predict: the label of the next one, nothing at the last.

    Args:
        labels: int64 [B, T], token ids like the input's, -100 where nothing is to be predicted.

    Returns:
        int64 [B, T]. Shifting the labels instead of slicing the hidden spares a copy of the hidden.

    Raises:
        TypeError: labels are not a tensor of integers.
        ValueError: labels are not [B, T].
    """
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor of token ids (int64 or int32), got {got}; convert it with .long()")
    if labels.dim() != 2:
        raise ValueError(f"labels must be [batch, tokens] like input_ids, got shape {list(labels.shape)}")
    target = torch.full_like(labels, IGNORE_INDEX)
    target[:, :-1] = labels[:, 1:]
    return target


def shifted_weight(token_weight: Tensor, labels: Tensor) -> Tensor:
    """The weights in the places of `shifted(labels)`: that of label t + 1 at t.

    Args:
        token_weight: floating point [B, T], one weight a label.
        labels: int64 [B, T].

    Raises:
        TypeError, ValueError: they are not one floating-point number a label.
    """
    _checks.token_weight(token_weight, labels)
    return torch.cat([token_weight[:, 1:], torch.zeros_like(token_weight[:, :1])], dim=1)


def num_targets(target: Tensor, data_parallel: DataParallel | None = None) -> Tensor:
    """How many targets count, on all ranks together, at least 1: 0-dim."""
    count = (target != IGNORE_INDEX).sum()
    return (count if data_parallel is None else data_parallel.total(count)).clamp_min(1)
