"""Fixed random codes in place of the rows of W: f = gain · C(e) Uᵀ, eq. (4).

None of these reads W: the codes are drawn before training and never change.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from localexit import _checks
from localexit.feedback.base import Anchors, Error, Feedback, Tokens, accumulate_dtype
from localexit.feedback.codes import (
    count_sketch,
    gaussian_codebook,
    orthonormal_expander,
    sketch_matrix,
    unit_codebook,
)


class _Factorized(Feedback):
    """Shared part of eq. (4): a code C(e) [n, R], expanded by U [D, R] and multiplied by a scalar gain."""

    gain: float
    expander: Tensor

    def _add_expander(self, rank: int, gain: float) -> None:
        self.gain = _checks.finite("gain", gain)
        self.register_buffer("expander", orthonormal_expander(self.hidden_size, rank, seed=self.seed))

    def _scaled_expander(self, dtype: torch.dtype) -> Tensor:
        """The expander times the gain, in the dtype that sums are kept in: once a call, not once a chunk of tokens."""
        return self.gain * self.expander.to(accumulate_dtype(dtype))


class Dense(_Factorized):
    """Dense random codes: C(e) = e K with K [V, R] iid N(0, 1/R); eq. (5).

    Args:
        hidden_size: D, width of the hidden state.
        vocab_size: V, number of tokens.
        rank: R, 1 ≤ R ≤ D; default min(128, D).
        gain: the scalar in front.
        seed: seed of the codes; None draws one from torch's default generator.

    Raises:
        ValueError: rank is outside 1..D.
    """

    options: ClassVar = ("gain",)
    codes: ClassVar = ("codebook", "expander")
    name = "dense"
    codebook: Tensor

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        rank: int | None = None,
        gain: float = 1.0,
        seed: int | None = 0,
    ) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size, seed=seed)
        rank = _checks.rank(rank, hidden_size)
        self.register_buffer("codebook", gaussian_codebook(vocab_size, rank, seed=self.seed))
        self._add_expander(rank, gain)

    @property
    def rank(self) -> int:
        """R."""
        return self.expander.shape[1]

    def initial_weight(self, *, std: float = 0.02) -> Tensor:
        """An unembedding that the codes stand in for exactly, to start training from: `std · √D · K Uᵀ`.

        W then starts where the feedback already points; codes are drawn before training all the same, and W is never
        read.

            model.lm_head.weight.data.copy_(rule.initial_weight())

        Args:
            std: standard deviation of its entries.

        Returns:
            [V, D] of rank R, on the device of the codes.

        Raises:
            ValueError: std is negative or not finite.
        """
        scale = _checks.non_negative("std", std) * math.sqrt(self.hidden_size)
        return scale * self.codebook @ self.expander.T

    def prepare(self, anchors: Anchors | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return self.codebook.to(dtype), self._scaled_expander(dtype)

    def forward(self, error: Error, tokens: Tokens, prepared: tuple[Tensor, ...]) -> Tensor:
        codebook, expander = prepared
        return error.matmul(codebook) @ expander.T


class Sketch(_Factorized):
    """CountSketch codes: C(e)[r] = Σ_{v: bucket(v)=r} sign(v) e[v]; eq. (6). State: two small numbers a token.

    Args:
        hidden_size: D, width of the hidden state.
        vocab_size: V, number of tokens.
        rank: number of buckets R, 1 ≤ R ≤ D; default min(128, D).
        gain: the scalar in front.
        seed: seed of the codes; None draws one from torch's default generator.

    Raises:
        ValueError: rank is outside 1..D.
    """

    options: ClassVar = ("gain", "rank")
    codes: ClassVar = ("bucket", "sign", "expander")
    name = "sketch"
    bucket: Tensor
    sign: Tensor

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        rank: int | None = None,
        gain: float = 1.0,
        seed: int | None = 0,
    ) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size, seed=seed)
        self.rank = _checks.rank(rank, hidden_size)
        bucket, sign = count_sketch(vocab_size, self.rank, seed=self.seed)
        self.register_buffer("bucket", bucket)
        self.register_buffer("sign", sign)
        self._add_expander(self.rank, gain)

    def prepare(self, anchors: Anchors | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return sketch_matrix(self.bucket, self.sign, self.rank, dtype), self._scaled_expander(dtype)

    def forward(self, error: Error, tokens: Tokens, prepared: tuple[Tensor, ...]) -> Tensor:
        sketch, expander = prepared
        return error.matmul(sketch) @ expander.T


def hybrid_code(error: Error, target: Tensor, *, exact: Tensor, sketch: Tensor, topk: int) -> Tensor:
    """C(e) = [e_S Q, sketch(e - e_S)] with S = {gold} ∪ top-k of |e| without gold; eq. (7).

    Args:
        error: the error of n tokens.
        target: int64 [n] gold tokens.
        exact: Q [V, R_exact], may have no column: then S is empty and everything is sketched.
        sketch: the CountSketch as a matrix [V, R_tail], may have no column.
        topk: k, at most V - 1 are taken.

    Returns:
        [n, R_exact + R_tail] in the accumulation dtype.
    """
    tail = error.matmul(sketch)
    if exact.shape[1] == 0:
        return tail
    chosen, entries = error.kept(topk, target)
    head = error.weighted_codes(chosen, entries, exact)
    if sketch.shape[1] > 0:
        tail = tail - error.weighted_codes(chosen, entries, sketch)
    return torch.cat([head, tail], dim=1)


class Hybrid(_Factorized):
    """Own codes for the gold token and the k largest errors, a CountSketch for the rest; eq. (7).

    Args:
        hidden_size: D, width of the hidden state.
        vocab_size: V, number of tokens.
        rank: R = R_exact + R_tail, 1 ≤ R ≤ D; default min(128, D).
        rank_exact: columns for the exact part; default a quarter of the rank.
        topk: how many tokens besides gold are exact.
        gain: the scalar in front.
        seed: seed of the codes; None draws one from torch's default generator.

    Raises:
        ValueError: rank is outside 1..D, rank_exact outside 0..rank, or topk negative.
    """

    options: ClassVar = ("gain", "topk", "rank_tail")
    codes: ClassVar = ("exact_codes", "bucket", "sign", "expander")
    name = "hybrid"
    is_additive = False
    selects = True
    exact_codes: Tensor
    bucket: Tensor
    sign: Tensor

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        rank: int | None = None,
        rank_exact: int | None = None,
        topk: int = 8,
        gain: float = 1.0,
        seed: int | None = 0,
    ) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size, seed=seed)
        rank = _checks.rank(rank, hidden_size)
        rank_exact = _checks.rank_exact(rank_exact, rank)
        self.topk = _checks.count("topk", topk, minimum=0)
        self.rank_tail = rank - rank_exact
        self.register_buffer("exact_codes", unit_codebook(vocab_size, rank_exact, seed=self.seed))
        bucket, sign = count_sketch(vocab_size, max(self.rank_tail, 1), seed=self.seed)
        self.register_buffer("bucket", bucket)
        self.register_buffer("sign", sign)
        self._add_expander(rank, gain)

    @property
    def rank(self) -> int:
        """R = R_exact + R_tail."""
        return self.expander.shape[1]

    @property
    def rank_exact(self) -> int:
        """R_exact."""
        return self.exact_codes.shape[1]

    def prepare(self, anchors: Anchors | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        sketch = sketch_matrix(self.bucket, self.sign, max(self.rank_tail, 1), dtype)[:, : self.rank_tail]
        return sketch, self._scaled_expander(dtype)

    def forward(self, error: Error, tokens: Tokens, prepared: tuple[Tensor, ...]) -> Tensor:
        sketch, expander = prepared
        code = hybrid_code(error, tokens.target, exact=self.exact_codes, sketch=sketch, topk=self.topk)
        return code @ expander.T
