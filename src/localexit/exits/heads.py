"""Heads as modules: `ExitHead`, the recommended form, and the two drop-in heads that return logits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from localexit import _checks
from localexit.exits.backends import BACKENDS, Backend
from localexit.exits.functional import PRESETS, Preset, Reduction, exit_cross_entropy, product_dtype
from localexit.exits.head_operators import exit_logits
from localexit.exits.vocab import local_weight
from localexit.feedback.base import Error, Feedback, spec_text
from localexit.feedback.codes import (
    count_sketch,
    gaussian_codebook,
    orthonormal_expander,
    sketch_matrix,
    unit_codebook,
)
from localexit.feedback.draws import fresh_seed
from localexit.feedback.factorized import Dense, Hybrid, hybrid_code
from localexit.feedback.parallel import ExactParallel
from localexit.feedback.registry import make_feedback


class ExitHead(nn.Module):
    """Unembedding, loss and feedback rule in one module: `head(h, targets) -> loss`, `head.logits(h) -> logits`.

    Args:
        hidden_size: D, width of the hidden states.
        vocab_size: V, number of tokens.
        feedback: name of a rule (see `feedback_names()`) or a rule made for [V, D].
        weight: share this unembedding [V, D] (a parameter of another module) instead of making one.
        bias: whether to have a bias [V].
        reduction, ignore_index, label_smoothing, z_loss, softcap, backend, preset: see `exit_cross_entropy`.
        exit_index: which exit of the model this is.
        seed: seed of the rule's codes and draws, when it is given by name.
        device, dtype: of the unembedding it makes.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        feedback: str | Feedback = "mirror_sampled",
        weight: nn.Parameter | None = None,
        bias: bool = False,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        backend: Backend = "auto",
        preset: Preset = "fast",
        exit_index: int = 0,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.loss_options(reduction, label_smoothing, z_loss, softcap)
        _checks.call_options(ignore_index, exit_index, None)
        _checks.choice("backend", backend, BACKENDS)
        _checks.choice("preset", preset, PRESETS)
        if weight is None:
            weight = nn.Parameter(torch.empty(vocab_size, hidden_size, device=device, dtype=dtype))
            nn.init.normal_(weight, std=0.02)
        if not isinstance(weight, nn.Parameter):
            raise TypeError(f"weight must be an nn.Parameter to share, got {type(weight).__name__}; pass module.weight")
        _checks.floating("weight", weight)
        if weight.shape != (vocab_size, hidden_size):
            raise ValueError(
                f"weight must be [vocab_size, hidden_size] = [{vocab_size}, {hidden_size}], got {list(weight.shape)}; "
                f"pass the sizes it was made for"
            )
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros_like(weight[:, 0])) if bias else None
        self.feedback = feedback_for(feedback, weight, seed=seed)
        self.reduction: Reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.backend: Backend = backend
        self.preset: Preset = preset
        self.exit_index = exit_index

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        token_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        """Loss of hidden [..., D] against targets [...]; see `exit_cross_entropy`."""
        return exit_cross_entropy(
            hidden,
            self.weight,
            targets,
            feedback=self.feedback,
            linear_bias=self.bias,
            token_weight=token_weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            num_items=num_items,
            backend=self.backend,
            preset=self.preset,
            exit_index=self.exit_index,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden [..., D], soft-capped, with ordinary gradients: for inference and evaluation."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def update(self) -> None:
        """End of an optimiser step; once, also when several heads share one rule."""
        self.feedback.update()

    def extra_repr(self) -> str:
        """Sizes and options."""
        vocab_size, hidden_size = self.weight.shape
        return f"{hidden_size}, {vocab_size}, reduction={self.reduction!r}, softcap={self.softcap}"


def feedback_for(feedback: str | Feedback, weight: Tensor, *, seed: int) -> Feedback:
    """The rule of the exits of an unembedding [V, D]; this rank's part of it, where the unembedding is spread by rows.

    Args:
        feedback: the rule for all V tokens, or its name.
        weight: the unembedding.
        seed: of a rule given by name.

    Raises:
        TypeError, ValueError: the rule does not fit, or the unembedding is spread otherwise.
    """
    vocab_size, hidden_size = weight.shape
    mine, vocab_parallel = local_weight(weight, None)
    if isinstance(feedback, str):
        feedback = make_feedback(feedback, hidden_size, vocab_size, seed=seed)
        return (feedback if vocab_parallel is None else vocab_parallel.shard(feedback)).to(weight.device)
    _checks.feedback_fits(feedback, mine, weight)
    return feedback if vocab_parallel is None else vocab_parallel.shard(feedback)


def orthonormal_columns(
    d_out: int,
    rank: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
) -> Tensor:
    """A random matrix [d_out, rank] with orthonormal columns, made in fp32 and then converted.

    Raises:
        ValueError: rank is outside 1..d_out.
        TypeError: dtype is not floating point.
    """
    rank = _checks.rank(_checks.count("rank", rank, minimum=1), _checks.count("d_out", d_out, minimum=1))
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}; integers cannot hold orthonormal columns")
    return orthonormal_expander(d_out, rank, seed=fresh_seed(seed)).to(device=device, dtype=dtype)


def _plain_error(grad_logits: Tensor) -> Error:
    values = grad_logits.reshape(-1, grad_logits.shape[-1])
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return Error(values=values, scale=values.new_ones(values.shape[0]))


class DenseRandomCompressor(nn.Module):
    """`compress(e) = e K` with fixed K [V, R] iid N(0, 1/R); eq. (5). Buffer: codebook."""

    codebook: Tensor

    def __init__(self, vocab_size: int, rank: int, *, seed: int | None = None) -> None:
        super().__init__()
        self.vocab_size = _checks.count("vocab_size", vocab_size, minimum=1)
        rank = _checks.count("rank", rank, minimum=1)
        self.register_buffer("codebook", gaussian_codebook(vocab_size, rank, seed=fresh_seed(seed)))

    @property
    def rank(self) -> int:
        """R, columns of the code."""
        return self.codebook.shape[1]

    @torch.no_grad()
    def compress(self, grad_logits: Tensor, targets: Tensor) -> Tensor:
        """Code [..., R] of the error grad_logits [..., V], in its dtype; sums in fp32. The targets are not needed."""
        del targets
        _checks.compressor_error(grad_logits, self.vocab_size)
        with torch.autocast(grad_logits.device.type, enabled=False):
            error = _plain_error(grad_logits)
            code = error.matmul(self.codebook.to(error.values.dtype))
        return code.reshape(*grad_logits.shape[:-1], self.rank).to(grad_logits.dtype)


class HybridTopKTailSketchCompressor(nn.Module):
    """Exact codes for gold and top-k, a CountSketch for the rest; eq. (7). Buffers: exact_codes, bucket, sign."""

    exact_codes: Tensor
    bucket: Tensor
    sign: Tensor

    def __init__(
        self,
        vocab_size: int,
        *,
        rank_exact: int = 32,
        rank_tail: int = 96,
        topk: int = 8,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        seed = fresh_seed(seed)
        self.vocab_size = _checks.count("vocab_size", vocab_size, minimum=1)
        self.rank_exact = _checks.count("rank_exact", rank_exact, minimum=0)
        self.rank_tail = _checks.count("rank_tail", rank_tail, minimum=0)
        self.topk = _checks.count("topk", topk, minimum=0)
        self.register_buffer("exact_codes", unit_codebook(vocab_size, rank_exact, seed=seed))
        bucket, sign = count_sketch(vocab_size, max(rank_tail, 1), seed=seed)
        self.register_buffer("bucket", bucket.long())
        self.register_buffer("sign", sign.float())

    @property
    def rank(self) -> int:
        """R = rank_exact + rank_tail, columns of the code."""
        return self.rank_exact + self.rank_tail

    @torch.no_grad()
    def compress(self, grad_logits: Tensor, targets: Tensor) -> Tensor:
        """Code [..., R] of the error grad_logits [..., V] for targets [...], in its dtype; sums in fp32.

        Negative targets (ignored rows) have a zero error; which token counts as their gold then does not matter.
        """
        _checks.compressor_error(grad_logits, self.vocab_size)
        _checks.compressor_targets(targets, grad_logits)
        with torch.autocast(grad_logits.device.type, enabled=False):
            error = _plain_error(grad_logits)
            sketch = sketch_matrix(self.bucket, self.sign, max(self.rank_tail, 1), error.values.dtype)
            code = hybrid_code(
                error,
                targets.reshape(-1).long().clamp(0, self.vocab_size - 1),
                exact=self.exact_codes,
                sketch=sketch[:, : self.rank_tail],
                topk=self.topk,
            )
        return code.reshape(*grad_logits.shape[:-1], self.rank).to(grad_logits.dtype)


class FactorizedExitHead(nn.Module):
    """Drop-in head with fixed random codes: `head(h, shared_weight, targets) -> logits` [B, T, V].

    The logits and the gradient of shared_weight are exact; h receives `alpha · compress(e) Uᵀ`, eq. (4). Kept for
    existing checkpoints and training loops; `ExitHead` needs no [B, T, V] logits and no targets at inference.

    Args:
        d_model: D, width of the hidden state.
        vocab_size: V, number of tokens.
        mode: "dense" or "hybrid".
        rank: R, 1 ≤ R ≤ D.
        rank_exact: columns for gold and top-k (hybrid).
        topk: tokens kept besides gold (hybrid).
        alpha_init: the scalar gain.
        seed: seed of the codes; None draws one from torch's default generator.

    Raises:
        ValueError: an unknown mode, or a rank out of range.
    """

    U: Tensor
    alpha: Tensor

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        *,
        mode: Literal["dense", "hybrid"] = "hybrid",
        rank: int = 128,
        rank_exact: int = 32,
        topk: int = 8,
        alpha_init: float = 1.0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        _checks.choice("mode", mode, ("dense", "hybrid"))
        seed = fresh_seed(seed)
        self.vocab_size = _checks.count("vocab_size", vocab_size, minimum=1)
        rank = _checks.rank(rank, _checks.count("d_model", d_model, minimum=1))
        self.compressor: DenseRandomCompressor | HybridTopKTailSketchCompressor
        if mode == "dense":
            self.compressor = DenseRandomCompressor(vocab_size, rank, seed=seed)
        else:
            rank_exact = _checks.rank_exact(rank_exact, rank)
            self.compressor = HybridTopKTailSketchCompressor(
                vocab_size, rank_exact=rank_exact, rank_tail=rank - rank_exact, topk=topk, seed=seed
            )
        self.register_buffer("U", orthonormal_expander(d_model, rank, seed=seed))
        self.register_buffer("alpha", torch.tensor(_checks.finite("alpha_init", alpha_init)))

    def _apply(self, fn: Any, recurse: bool = True) -> FactorizedExitHead:
        # The gain multiplies everything: it keeps fp32 when the head is converted.
        alpha = self.alpha
        super()._apply(fn, recurse)
        self.alpha = alpha.to(self.U.device)
        return self

    def _rule(self) -> tuple[str, list[Tensor]]:
        options: dict[str, Any] = {"gain": 1.0}
        if isinstance(self.compressor, DenseRandomCompressor):
            return spec_text(Dense, name="dense", **options), [self.compressor.codebook, self.U]
        codes = self.compressor
        options |= {"topk": codes.topk, "rank_tail": codes.rank_tail}
        return spec_text(Hybrid, name="hybrid", **options), [codes.exact_codes, codes.bucket, codes.sign, self.U]

    def forward(self, h: Tensor, shared_weight: Tensor, targets: Tensor) -> Tensor:
        """Logits [..., V] for h [..., D], shared_weight [V, D] and targets [...]."""
        _checks.head_inputs(h, shared_weight, targets, (self.vocab_size, self.U.shape[0]))
        _checks.reverse_mode(h=h, shared_weight=shared_weight)
        rule, state = self._rule()
        return exit_logits(h, shared_weight, targets, state, self.alpha, rule, product_dtype(h, shared_weight))


class ExactParallelExitHead(nn.Module):
    """Drop-in head with the part of the gradient that logits reveal: `head(h, shared_weight, targets) -> logits`.

    h receives `h <e, z> / ‖h‖²`, eq. (8), and in two of the modes a coded residual orthogonal to h, eq. (9).

    Args:
        d_model: D, width of the hidden state.
        vocab_size: V, number of tokens.
        mode: "parallel_only", "parallel_gold" or "parallel_topmass".
        residual_rank: R of the residual's codes, 1 ≤ R ≤ D.
        residual_lambda: size of the residual.
        mass_threshold: probability the nucleus must reach, in (0, 1].
        seed: seed of the codes; None draws one from torch's default generator.

    Raises:
        ValueError: an unknown mode, or an option out of range.
    """

    token_codes: Tensor | None
    Q_base: Tensor | None
    # Longest nucleus: a longer one is cut at its most probable tokens, with a warning.
    nucleus_cap = 256

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        *,
        mode: Literal["parallel_only", "parallel_gold", "parallel_topmass"] = "parallel_only",
        residual_rank: int = 32,
        residual_lambda: float = 0.1,
        mass_threshold: float = 0.95,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        _checks.choice("mode", mode, ("parallel_only", "parallel_gold", "parallel_topmass"))
        self.d_model = _checks.count("d_model", d_model, minimum=1)
        self.vocab_size = _checks.count("vocab_size", vocab_size, minimum=1)
        self.mode = mode
        self.residual_lambda = _checks.finite("residual_lambda", residual_lambda)
        self.mass_threshold = _checks.fraction("mass_threshold", mass_threshold)
        token_codes, base = None, None
        if mode != "parallel_only":
            seed = fresh_seed(seed)
            rank = _checks.rank(residual_rank, d_model, "residual_rank")
            token_codes = unit_codebook(vocab_size, rank, seed=seed)
            base = orthonormal_expander(d_model, rank, seed=seed)
        self.register_buffer("token_codes", token_codes)
        self.register_buffer("Q_base", base)

    def forward(self, h: Tensor, shared_weight: Tensor, targets: Tensor) -> Tensor:
        """Logits [..., V] for h [..., D], shared_weight [V, D] and targets [...]."""
        _checks.head_inputs(h, shared_weight, targets, (self.vocab_size, self.d_model))
        _checks.reverse_mode(h=h, shared_weight=shared_weight)
        residual = {"parallel_only": None, "parallel_gold": "gold", "parallel_topmass": "topmass"}[self.mode]
        rule = spec_text(
            ExactParallel,
            name=self.mode,
            residual=residual,
            residual_gain=self.residual_lambda,
            mass_threshold=self.mass_threshold,
            nucleus_cap=self.nucleus_cap,
        )
        if self.token_codes is None or self.Q_base is None:
            state = [h.new_empty(shared_weight.shape[0], 0), h.new_empty(h.shape[-1], 0)]
        else:
            state = [self.token_codes, self.Q_base]
        gain = h.new_ones(())
        return exit_logits(h, shared_weight, targets, state, gain, rule, product_dtype(h, shared_weight))
