"""Feedback through the rows of a [V, D] matrix: of a mirror learned from forward pairs, or of W itself."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from localexit import _checks
from localexit.feedback.base import Anchors, Error, Feedback, Tokens
from localexit.feedback.ridge import ridge_rows


def sampled_rows(error: Error, tokens: Tokens, rows: Tensor, *, topk: int) -> Tensor:
    """An unbiased estimate of `e @ rows` from few rows; eq. (12).

    Gold and the top-k errors are kept exactly; the tail is drawn in proportion to its error. Dropping the tail
    instead would be biased.

    error of n tokens; rows [V, D]; the draws are `tokens.uniforms`. Returns [n, D].
    """
    assert tokens.uniforms is not None, "the caller draws uniforms for rules with num_draws"
    ids, weights = error.select(topk, tokens.uniforms, tokens.target)
    return error.weighted_rows(ids, weights, rows)


class _Rows(Feedback):
    """f = e · rows, whole or sampled."""

    options: ClassVar = ("sampled", "selects", "topk", "num_draws")
    rows: Tensor

    def _set_sampling(self, sampled: bool, topk: int, num_draws: int) -> None:
        self.sampled = bool(sampled)
        # Which entries are kept exactly depends on the error.
        self.is_additive = not self.sampled
        self.selects = self.sampled
        self.topk = _checks.count("topk", topk, minimum=0)
        self.num_draws = _checks.count("num_draws", num_draws, minimum=1) if sampled else 0

    def prepare(self, anchors: Anchors | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        # Few rows are gathered: converting all of them would cost more. fp64 is for proofs.
        return (self.rows if self.sampled and dtype != torch.float64 else self.rows.to(dtype),)

    def forward(self, error: Error, tokens: Tokens, prepared: tuple[Tensor, ...]) -> Tensor:
        (rows,) = prepared
        if self.sampled:
            return sampled_rows(error, tokens, rows, topk=self.topk)
        return error.matmul(rows)


class WeightMirror(_Rows):
    """f = e B with B [V, D] learned from forward pairs (h, z - b) only; eq. (11), sampled: eq. (12).

    B starts at zero and is corrected once per optimiser step by `update()`, from tokens that the step's exits
    collected, after every exit has used it. W is never read: a pair says what W did to one hidden state.
    Prior art: weight mirrors (Akrout et al. 2019), weight estimation (Kunin et al. 2020), Kolen and Pollack (1994).

    Args:
        hidden_size: D, width of the hidden state.
        vocab_size: V, number of tokens.
        sampled: gather few rows of B instead of multiplying with all of them.
        num_pairs: tokens an exit contributes to a step's update.
        ridge: λ of the update relative to the mean diagonal of H_M H_Mᵀ.
        topk: kept exactly besides gold (sampled only).
        num_draws: tail tokens drawn (sampled only).
        seed: seed of the choice of pairs and of the draws; None draws one from torch's default generator.

    Raises:
        ValueError: an option is out of range.
    """

    codes: ClassVar = ("rows",)

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        sampled: bool = False,
        num_pairs: int = 128,
        ridge: float = 1e-2,
        topk: int = 16,
        num_draws: int = 16,
        seed: int | None = 0,
    ) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size, seed=seed)
        self._set_sampling(sampled, topk, num_draws)
        self.name = "mirror_sampled" if sampled else "mirror"
        self.num_pairs = _checks.count("num_pairs", num_pairs, minimum=1)
        self.ridge = _checks.non_negative("ridge", ridge)
        self.register_buffer("rows", torch.zeros(vocab_size, hidden_size))
        # Keyed by exit: a recomputation (gradient checkpointing) collects the same pairs again and changes nothing.
        self._pairs: dict[int, Anchors] = {}

    def collect(self, exit_index: int, pairs: Anchors) -> None:
        """Keep one exit's forward pairs for the next `update()`; a second call for the same exit replaces the first."""
        self._pairs[exit_index] = pairs

    def discard(self) -> None:
        """Forget the pairs collected since the last `update()`."""
        self._pairs.clear()

    @torch.no_grad()
    def update(self) -> None:
        """One block Kaczmarz step, `B += (Z_M - H_M Bᵀ)ᵀ (H_M H_Mᵀ + λI)⁻¹ H_M`, on the pairs collected; eq. (11)."""
        super().update()
        if not self._pairs:
            return
        # Solved in at least fp32, whatever dtype the pairs and the mirror are stored in.
        dtype = torch.promote_types(self.rows.dtype, torch.float32)
        pairs = [self._pairs[index] for index in sorted(self._pairs)]
        hidden = torch.cat([p.hidden for p in pairs]).to(dtype)
        logits = torch.cat([p.logits for p in pairs]).to(dtype)
        residual = torch.addmm(logits, hidden, self.rows.to(dtype).T, alpha=-1)
        back = ridge_rows(hidden, torch.stack([p.count for p in pairs]).sum(), self.ridge)
        if self.rows.dtype == dtype:
            # In place: no second [V, D] matrix.
            self.rows.addmm_(residual.T, back)
        else:
            self.rows += (residual.T @ back).to(self.rows.dtype)
        self._pairs.clear()


class WeightTransport(_Rows):
    """The exact baseline f = e W, or its unbiased estimate from sampled rows of W; eq. (3), (12).

    The only rule that reads the unembedding on the way back.

    Args:
        hidden_size: D, width of the hidden state.
        vocab_size: V, number of tokens.
        sampled: gather few rows of W instead of multiplying with all of them.
        topk: kept exactly besides gold (sampled only).
        num_draws: tail tokens drawn (sampled only).
        seed: seed of the draws; None draws one from torch's default generator.

    Raises:
        ValueError: an option is out of range.
    """

    codes: ClassVar = ("rows",)
    needs_weight: ClassVar = True

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        sampled: bool = False,
        topk: int = 16,
        num_draws: int = 16,
        seed: int | None = 0,
    ) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size, seed=seed)
        self._set_sampling(sampled, topk, num_draws)
        self.name = "transport_sampled" if sampled else "transport"
