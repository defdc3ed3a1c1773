"""The part of the exact gradient that the logits themselves reveal, eq. (8), and a coded residual, eq. (9)."""

from __future__ import annotations

import warnings
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from localexit import _checks
from localexit.feedback.base import Anchors, Error, Feedback, Tokens, accumulate_dtype
from localexit.feedback.codes import orthonormal_expander, unit_codebook

Residual = Literal["gold", "topmass"]


def parallel_feedback(hidden: Tensor, logit_product: Tensor) -> Tensor:
    """Part of the exact `e @ W` that lies along h, from logits alone; eq. (8).

    hidden [n, D]; logit_product [n] = <e, z - b>. <e W, h> = <e, W h> = <e, z - b>: W is not read.
    """
    square = hidden.square().sum(1, keepdim=True).clamp_min(torch.finfo(hidden.dtype).tiny)
    return logit_product[:, None] / square * hidden


def orthogonal_residual(hidden: Tensor, code: Tensor, base: Tensor) -> Tensor:
    """R(h) c with R(h) = columns of (I - ĥĥᵀ)Q, normalised; eq. (9).

    hidden [n, D]; code c [n, R]; base Q [D, R] with orthonormal columns. No [n, D, R] tensor is made.
    """
    direction = torch.nn.functional.normalize(hidden)
    overlap = direction @ base  # [n, R]
    # ‖(I - ĥĥᵀ) q‖² = ‖q‖² - ⟨ĥ, q⟩²
    code = code * (base.square().sum(0) - overlap.square()).clamp_min(1e-8).rsqrt()
    return code @ base.T - direction * (code * overlap).sum(1, keepdim=True)


def nucleus(tokens: Tokens, threshold: float, cap: int) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest set of tokens whose probability reaches `threshold`, the crossing token included.

    Returns:
        ids int64 [n, k] by falling probability with k = min(cap, V); is_inside bool [n, k]; is_cut bool [n], whether
        the k tokens do not reach the threshold.
    """
    assert tokens.log_normaliser is not None
    # A soft cap is monotone: the largest raw logits are the most probable tokens.
    logits, ids = tokens.top_logits(cap)
    if tokens.softcap is not None:
        logits = tokens.softcap * torch.tanh(logits / tokens.softcap)
    probability = (logits - tokens.log_normaliser[:, None]).exp()
    mass = probability.cumsum(1)
    is_cut = (mass[:, -1] < threshold) & (cap < tokens.vocab_size)
    return ids, mass - probability < threshold, is_cut


def topmass_code(error: Error, tokens: Tokens, codes: Tensor, *, threshold: float, cap: int) -> Tensor:
    """Σ_{v in S} e[v] q_v over S = gold ∪ nucleus, each token once: [n, R]."""
    ids, is_inside, is_cut = nucleus(tokens, threshold, cap)
    if not is_cut.is_cuda:
        # Looking costs a synchronisation on a GPU.
        _warn_if_cut(is_cut & (error.scale != 0), cap)
    entries = error.gather(ids) * (is_inside & (ids != tokens.target[:, None]))
    return gold_code(error, tokens, codes) + error.weighted_rows(ids, entries, codes)


def _warn_if_cut(is_cut: Tensor, cap: int) -> None:
    if bool(is_cut.any()):
        warnings.warn(
            f"the nucleus of some tokens is longer than nucleus_cap={cap} and was cut at its most probable tokens; "
            f"raise nucleus_cap or lower mass_threshold",
            UserWarning,
            stacklevel=2,
        )


def gold_code(error: Error, tokens: Tokens, codes: Tensor) -> Tensor:
    """e[gold] q_gold: [n, R]."""
    gold = tokens.target[:, None]
    return error.weighted_codes(gold, error.gather(gold), codes)


class ExactParallel(Feedback):
    """f = h <e, z - b> / ‖h‖², optionally with a coded residual orthogonal to h; eq. (8), (9).

    Exact along h, blind to the rest. A scale-invariant norm in front of the exit (RMSNorm without gain) removes this
    component entirely: blocks behind such a norm then learn from the residual alone.

    Args:
        hidden_size: D, width of the hidden state.
        vocab_size: V, number of tokens.
        residual: None, "gold" (code of the gold token) or "topmass" (gold and the nucleus).
        residual_rank: R, 1 ≤ R ≤ D; default min(32, D).
        residual_gain: λ, size of the residual.
        mass_threshold: probability the nucleus must reach, in (0, 1].
        nucleus_cap: most tokens a nucleus may have; a longer one is cut at its most probable tokens, and on the CPU a
            warning says so.
        seed: seed of the codes; None draws one from torch's default generator.

    Raises:
        ValueError: an unknown residual, or an option out of range.
    """

    options: ClassVar = ("residual", "residual_gain", "mass_threshold", "nucleus_cap")
    codes: ClassVar = ("token_codes", "residual_base")
    needs_logits: ClassVar = True
    token_codes: Tensor
    residual_base: Tensor

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        residual: Residual | None = None,
        residual_rank: int | None = None,
        residual_gain: float = 0.1,
        mass_threshold: float = 0.95,
        nucleus_cap: int = 256,
        seed: int | None = 0,
    ) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size, seed=seed)
        _checks.choice("residual", residual, (None, *get_args(Residual)))
        self.residual = residual
        self.name = "parallel" if residual is None else f"parallel_{residual}"
        self.residual_gain = _checks.finite("residual_gain", residual_gain)
        self.mass_threshold = _checks.fraction("mass_threshold", mass_threshold)
        self.nucleus_cap = _checks.count("nucleus_cap", nucleus_cap, minimum=1)
        rank = 0 if residual is None else _checks.rank(residual_rank, hidden_size, "residual_rank", default=32)
        self.register_buffer("token_codes", unit_codebook(vocab_size, rank, seed=self.seed))
        self.register_buffer("residual_base", orthonormal_expander(hidden_size, rank, seed=self.seed))

    @property
    def residual_rank(self) -> int:
        """R, 0 without a residual."""
        return self.residual_base.shape[1]

    def prepare(self, anchors: Anchors | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        dtype = accumulate_dtype(dtype)
        return self.token_codes.to(dtype), self.residual_base.to(dtype)

    def forward(self, error: Error, tokens: Tokens, prepared: tuple[Tensor, ...]) -> Tensor:
        codes, base = prepared
        hidden = tokens.hidden.to(base.dtype)
        along = parallel_feedback(hidden, error.dot_logits())
        if self.residual is None:
            return along
        if self.residual == "gold":
            code = gold_code(error, tokens, codes)
        else:
            code = topmass_code(error, tokens, codes, threshold=self.mass_threshold, cap=self.nucleus_cap)
        return along + self.residual_gain * orthogonal_residual(hidden, code, base)
