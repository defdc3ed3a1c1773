"""Anchors that the exits of a step share: measured by the first one, eq. (10), used as rows by all, eq. (12)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from localexit import _checks
from localexit.feedback.base import accumulate_dtype
from localexit.feedback.products import right_operand, times
from localexit.feedback.ridge import apart_from_mean, ridge_rows
from localexit.feedback.rows import Rows


@dataclass(frozen=True, kw_only=True)
class MeasuredRows:
    """What the first exit of a step measured.

    Attributes:
        rows: B [V, D], what eq. (10) has in place of W.
        hidden: [M, D], the anchors it was measured on, zero where not counted.
        is_counted: bool [M], False on tokens that only fill up, when fewer than M count.
        count: 0-dim int64, how many count.
    """

    rows: Tensor
    hidden: Tensor
    is_counted: Tensor
    count: Tensor


class SharedAnchors(Rows):
    """f = e B, sampled; B = Z_Mᵀ (H_M H_Mᵀ + λI)⁻¹ H_M of the step's first exit; eq. (10), (12). No codes, no state.

    All exits of a step have the same W, so what the tokens of one have measured serves all of them: a step of L exits
    measures M anchors, M / L an exit. The first exit that feeds back after `update()` measures; B [V, D] is kept until
    `update()` or `discard()`, and is no part of the state_dict. In evaluation mode each call measures for itself and
    keeps nothing. An exit alone is `LogitAnchors`, sampled, with M anchors.

    Args:
        hidden_size: D, width of the hidden state.
        vocab_size: V, number of tokens.
        num_anchors: M; at most the number of tokens that count is used. None is 3D/2: D/4 an exit for six exits, less
            for more.
        ridge: λ relative to the mean diagonal of H_M H_Mᵀ, the anchors taken apart from their mean.
        topk: kept exactly besides gold.
        num_draws: tail tokens drawn.
        seed: seed of the choice of anchors and of the draws; None draws one from torch's default generator.

    Raises:
        ValueError: num_anchors is below 1, or another option out of range.
    """

    codes: ClassVar = ("rows",)
    name = "anchors_shared"
    measured: MeasuredRows | None

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        num_anchors: int | None = None,
        ridge: float = 1e-4,
        topk: int = 8,
        num_draws: int = 16,
        seed: int | None = 0,
    ) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size, seed=seed)
        self._set_sampling(True, topk, num_draws)
        if num_anchors is None:
            num_anchors = max(1, 3 * hidden_size // 2)
        self.num_anchors = _checks.count("num_anchors", num_anchors, minimum=1)
        self.ridge = _checks.non_negative("ridge", ridge)
        self.discard()

    def solved(
        self, hidden: Tensor, is_counted: Tensor, logits: Iterable[Tensor], *, dtype: torch.dtype
    ) -> MeasuredRows:
        """B from forward measurements, without keeping it.

        Args:
            hidden: [M, D], zero where not counted.
            is_counted: bool [M].
            logits: raw forward logits [M, v] of these tokens without the bias, for one part of the vocabulary after
                another.
            dtype: of B. Sums are in fp32, in fp64 for fp64. With bf16 on a GPU the solve is as exact as `products`
                says, and B is rounded.
        """
        sums, count = accumulate_dtype(dtype), is_counted.sum()
        apart = apart_from_mean(hidden.to(sums))
        back = right_operand(ridge_rows(apart.hidden, count, self.ridge), dtype)
        # No [M, V] tensor, M is above D; and no parts of B beside it.
        rows, end = hidden.new_empty(self.vocab_size, self.hidden_size, dtype=dtype), 0
        for part in logits:
            start, end = end, end + part.shape[1]
            rows[start:end] = times(apart.logits(part.to(sums)).T, back)
        return MeasuredRows(rows=rows, hidden=hidden, is_counted=is_counted, count=count)

    def keep(self, measured: MeasuredRows) -> None:
        """Let the later exits of the step use these rows."""
        self.measured, self.rows = measured, measured.rows

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the seed of a state_dict: what was measured is of the step before it was loaded."""
        super().set_extra_state(state)
        self.discard()

    @torch.no_grad()
    def update(self) -> None:
        """End of an optimiser step: the next one measures anew."""
        super().update()
        self.discard()

    def discard(self) -> None:
        """Forget what the step's first exit measured."""
        super().discard()
        self.measured = None
        # Not a buffer: it is of one step, and no part of what is saved.
        self.rows = torch.empty(0, self.hidden_size, device=self.step.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedAnchors:
        """What is measured belongs to the device and dtype it was measured with."""
        super()._apply(fn, recurse)
        self.discard()
        return self
