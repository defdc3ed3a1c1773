"""Loss and error of one chunk of logits, in place: the plain steps, in plain PyTorch.

For a row with logits z (raw), c = softcap(z) and p = softmax(c), with label smoothing ε, z-loss weight ζ:

    loss = -(1-ε) log p[gold] - (ε/V) Σ_v log p[v] + ζ lse²
    e    = [ (1 + 2 ζ lse) p - (1-ε) onehot(gold) - ε/V ] · softcap'(z)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from localexit.feedback.groups import by_rows


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Options of the loss, see `exit_cross_entropy`."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """What one pass over a chunk of logits [n, V] leaves, besides the error in their place.

    Attributes:
        loss: [n], unweighted.
        gold_logit: [n], the (soft-capped) logit of the gold token.
        log_prob: [n], log-probability of the gold token.
        argmax: int64 [n], or empty when no statistics were asked for.
        entropy: [n] in nats, or empty likewise.
        scale: [n], the error is this times what stands in place of the logits; None means one.
        weighted_scale: [n], the scale times the row weight, from a step that knew it.
        raw: [n, V] the raw logits, kept only where something needs them.
        logit_product: [n] `<error, z - b>`, for rules with `needs_logits`.
    """

    loss: Tensor
    gold_logit: Tensor
    log_prob: Tensor
    argmax: Tensor
    entropy: Tensor
    scale: Tensor | None = None
    weighted_scale: Tensor | None = None
    raw: Tensor | None = None
    logit_product: Tensor | None = None

    @property
    def lse(self) -> Tensor:
        """Log-sum-exp of the (soft-capped) logits, [n]."""
        return self.gold_logit - self.log_prob


def loss_and_error(
    logits: Tensor,
    target: Tensor,
    options: LossOptions,
    *,
    need_error: bool,
    need_logits: bool,
    need_groups: bool,
    need_stats: bool,
    bias: Tensor | None = None,
    scratch: Tensor | None = None,
) -> RowResult:
    """Turn raw logits [n, V] into the error for row weight one, in place, and return what the rows yield.

    Args:
        logits: fp32 or fp64 [n, V], raw (bias included); overwritten.
        target: int64 [n] in 0..V-1.
        options: options of the loss.
        need_error: False for the loss alone (`logits` then hold probabilities).
        need_logits: keep the raw logits and their product with the error.
        need_groups: a backend may keep maxima and sums of groups for selections; this one does not.
        need_stats: also arg-max and entropy.
        bias: [V], already part of the logits; `logit_product` leaves it out.
        scratch: at least [n, V], to keep raw logits in: `RowResult.raw` of an earlier chunk. A fresh one of this size
            costs a CPU more than all the rest of this function.
    """
    del need_groups
    gold = target[:, None]
    keeps_raw = need_error and (need_logits or options.softcap is not None)
    raw = _copy(logits, scratch) if keeps_raw else None
    _apply_softcap(logits, options.softcap)
    largest, gold_logit = logits.amax(1), logits.gather(1, gold)[:, 0]
    mean = logits.mean(1) if options.label_smoothing else None
    argmax = logits.argmax(1) if need_stats else target.new_empty(0)
    probs = torch.softmax(logits, dim=1, out=logits)
    # log Σ exp(z - largest): the largest entry is exp(0) over that sum. Differences to it lose nothing.
    log_sum = -probs.amax(1).log()
    lse, log_prob = largest + log_sum, (gold_logit - largest) - log_sum
    loss = _loss(log_prob, lse, mean, options)
    entropy = by_rows(_entropy, probs) if need_stats else loss.new_empty(0)
    product = None
    if need_error:
        _probs_to_error(probs, gold, lse, raw, options)
        product = _logit_product(probs, raw, bias) if need_logits else None
    return RowResult(
        loss=loss,
        gold_logit=gold_logit,
        log_prob=log_prob,
        argmax=argmax,
        entropy=entropy,
        raw=raw,
        logit_product=product,
    )


def _copy(logits: Tensor, scratch: Tensor | None) -> Tensor:
    return logits.clone() if scratch is None else scratch[: len(logits)].copy_(logits)


def _apply_softcap(logits: Tensor, softcap: float | None) -> None:
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)


def _loss(log_prob: Tensor, lse: Tensor, mean: Tensor | None, options: LossOptions) -> Tensor:
    loss = -log_prob
    if mean is not None:
        smooth = options.label_smoothing
        loss = (1 - smooth) * loss + smooth * (lse - mean)
    if options.z_loss:
        loss = loss + options.z_loss * lse.square()
    return loss


def _entropy(probs: Tensor) -> Tensor:
    # 0 log 0 = 0; and much faster than `torch.special.entr`, which takes one logarithm at a time.
    return -(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(1)


def _probs_to_error(probs: Tensor, gold: Tensor, lse: Tensor, raw: Tensor | None, options: LossOptions) -> None:
    if options.z_loss:
        probs.mul_((1 + 2 * options.z_loss * lse)[:, None])
    if options.label_smoothing:
        probs.sub_(options.label_smoothing / probs.shape[1])
    probs.scatter_add_(1, gold, probs.new_full(gold.shape, options.label_smoothing - 1))
    if options.softcap is not None:
        assert raw is not None
        probs.mul_(1 - (raw / options.softcap).tanh_().square_())


def _logit_product(error: Tensor, raw: Tensor | None, bias: Tensor | None) -> Tensor:
    """`<error, z - b>` row by row."""
    assert raw is not None
    return row_dot(error, raw if bias is None else raw - bias.to(raw.dtype))


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the rows of two [n, V] matrices: [n]."""
    # `sum` adds pairwise. A matrix product adds one after the other, and at V = 5000 is off by forty times as much.
    return by_rows(lambda a, b: (a * b).sum(1), a, b)


def tile_error(
    logits: Tensor,
    target: Tensor,
    gold_logit: Tensor,
    log_prob: Tensor,
    is_counted: Tensor,
    options: LossOptions,
    vocab_size: int,
    bias: Tensor | None,
    first: int,
) -> None:
    """Turn a tile of raw logits [N, n] into the error for row weight one, in place.

    Probabilities are relative to the gold token's: where logits have much in common, a rounded log-sum-exp would
    change all of them.

    Args:
        logits: fp32 or fp64, bias included; overwritten.
        target: integer [N].
        gold_logit: [N], as the first pass saw it.
        log_prob: [N], of the gold token.
        is_counted: bool [N]; other rows become zero, whatever they hold.
        options: options of the loss.
        vocab_size: V of the whole vocabulary.
        bias: part of the logits already.
        first: the tile's first token; the gold token may be elsewhere.
    """
    del bias
    slope = None
    if options.softcap is not None:
        capped = logits.div_(options.softcap).tanh_()
        slope = 1 - capped.square()
        logits.mul_(options.softcap)
    probs = logits.sub_(gold_logit[:, None]).add_(log_prob[:, None]).exp_()
    scale = 1 + 2 * options.z_loss * (gold_logit - log_prob)
    if options.z_loss:
        probs.mul_(scale[:, None])
    # p - 1 of a confident prediction from its logarithm: the difference would be one of rounded terms.
    gold_error = (scale - 1) * log_prob.exp() + log_prob.expm1() + options.label_smoothing
    target = target - first
    is_here = (target >= 0) & (target < logits.shape[1])
    gold = torch.where(is_here, target, 0).long()[:, None]
    probs.scatter_(1, gold, torch.where(is_here, gold_error, probs[:, 0])[:, None])
    if options.label_smoothing:
        probs.sub_(options.label_smoothing / vocab_size)
    if slope is not None:
        probs.mul_(slope)
    probs.masked_fill_(~is_counted[:, None], 0)
