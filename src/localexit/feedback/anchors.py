"""Logit anchors: the exact gradient projected on the span of some of the batch's own hidden states, eq. (10)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from localexit import _checks
from localexit.feedback.base import Anchors, Error, Tokens, accumulate_dtype
from localexit.feedback.products import right_operand, times
from localexit.feedback.ridge import apart_from_mean, principal_axes, ridge_rows
from localexit.feedback.sampling import SAMPLING_OPTIONS, Sampling


class LogitAnchors(Sampling):
    """f = (e Z_Mᵀ)(H_M H_Mᵀ + λI)⁻¹ H_M; eq. (10), sampled: eq. (12) for e Z_Mᵀ. No codes, no state.

    `<e W, h_m> = <e, z_m>`: the forward logits of an anchor token are the measurement of W along its hidden state, so
    nothing has to be read back from W. Anchors are drawn anew each call among the tokens that count. The whole product
    with Z_M costs 2NVM, so M has to be small; its estimate from few entries of the error costs next to nothing, so M
    can be above D, where the span is everything.

    Args:
        hidden_size: D, width of the hidden state.
        vocab_size: V, number of tokens.
        sampled: gather few columns of Z_M a token instead of multiplying with all of them.
        num_anchors: M; at most the number of tokens that count is used. None is 128, and 2D when sampled.
        rank: keep only this many principal directions of the anchors, which takes the whole product from 2NVM to 2NVR;
            None keeps all.
        ridge: λ relative to the mean diagonal of H_M H_Mᵀ, the anchors taken apart from their mean.
        topk: kept exactly besides gold (sampled only).
        num_draws: tail tokens drawn (sampled only).
        seed: seed of the choice of anchors and of the draws; None draws one from torch's default generator.

    Raises:
        ValueError: num_anchors is below 1, rank outside 1..D, or another option out of range.
    """

    options: ClassVar = ("ridge", "num_anchors", "rank", *SAMPLING_OPTIONS)
    name = "anchors"

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        sampled: bool = False,
        num_anchors: int | None = None,
        rank: int | None = None,
        ridge: float = 1e-4,
        topk: int = 8,
        num_draws: int = 16,
        seed: int | None = 0,
    ) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size, seed=seed)
        self._set_sampling(sampled, topk, num_draws)
        if sampled:
            self.name = "anchors_sampled"
        if num_anchors is None:
            num_anchors = 2 * hidden_size if sampled else 128
        self.num_anchors = _checks.count("num_anchors", num_anchors, minimum=1)
        self.rank = None if rank is None else _checks.rank(rank, hidden_size)
        self.ridge = _checks.non_negative("ridge", ridge)

    def prepare(self, anchors: Anchors | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        assert anchors is not None, "the caller measures anchors for rules with num_anchors"
        sums = accumulate_dtype(dtype)
        apart = apart_from_mean(anchors.hidden.to(sums))
        hidden, logits = apart.hidden, apart.logits(anchors.logits.to(sums))
        back = ridge_rows(hidden, anchors.count, self.ridge)
        if self.rank is not None:
            axes = principal_axes(hidden, self.rank)
            logits, back = (back @ axes).T @ logits, axes.T
        logits = logits.to(dtype).T
        if not self.sampled:
            return logits, back
        # Few rows are gathered, each of them should lie together.
        return logits.contiguous(), right_operand(back, dtype)

    def forward(self, error: Error, tokens: Tokens, prepared: tuple[Tensor, ...]) -> Tensor:
        logits, back = prepared
        return times(self._times(error, tokens, logits), back)
