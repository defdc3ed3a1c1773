"""Logit anchors: the exact gradient projected on the span of a few of the batch's own hidden states, eq. (10)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from localexit import _checks
from localexit.feedback.base import Anchors, Error, Feedback, Tokens, accumulate_dtype
from localexit.feedback.ridge import ridge_rows


class LogitAnchors(Feedback):
    """f = (e Z_Mᵀ)(H_M H_Mᵀ + λI)⁻¹ H_M; eq. (10). No codes, no state.

    `<e W, h_m> = <e, z_m>`: the forward logits of an anchor token are the measurement of W along its hidden state, so
    nothing has to be read back from W. Anchors are drawn anew each call among the tokens that count.

    Args:
        hidden_size: D, width of the hidden state.
        vocab_size: V, number of tokens.
        num_anchors: M; at most the number of tokens that count is used.
        ridge: λ relative to the mean diagonal of H_M H_Mᵀ.
        seed: seed of the choice of anchors; None draws one from torch's default generator.

    Raises:
        ValueError: num_anchors is below 1, or ridge negative.
    """

    options: ClassVar = ("ridge", "num_anchors")
    name = "anchors"

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        num_anchors: int = 128,
        ridge: float = 1e-3,
        seed: int | None = 0,
    ) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size, seed=seed)
        self.num_anchors = _checks.count("num_anchors", num_anchors, minimum=1)
        self.ridge = _checks.non_negative("ridge", ridge)

    def prepare(self, anchors: Anchors | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        assert anchors is not None, "the caller measures anchors for rules with num_anchors"
        back = ridge_rows(anchors.hidden.to(accumulate_dtype(dtype)), anchors.count, self.ridge)
        return anchors.logits.to(dtype).T, back

    def forward(self, error: Error, tokens: Tokens, prepared: tuple[Tensor, ...]) -> Tensor:
        logits, back = prepared
        return error.matmul(logits) @ back
