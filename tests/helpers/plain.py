"""An exit in plain PyTorch with whole logits, every step in one dtype: what low precision is measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.cases import IGNORED, Inputs, Outcome
from localexit.exits.loss import loss_and_error
from localexit.feedback import Feedback
from localexit.feedback.draws import choose_rows, stratified_uniforms

# The plain step of a chunk: the error in place of the logits, and nothing kept.
plain_pass = partial(loss_and_error, need_error=True, need_logits=False, need_groups=False, need_stats=False)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What a rule may look at, all in one dtype: error e, hidden h, logits z without bias, probabilities p, draws."""

    e: Tensor
    h: Tensor
    z: Tensor
    p: Tensor
    gold: Tensor
    weight: Tensor
    anchors: Tensor
    uniforms: Tensor


def plain_exit(
    inputs: Inputs,
    rule: Feedback,
    *,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    num_items: float | None = None,
) -> Outcome:
    """Loss, the rule's feedback, dW and db, rounded after every operation like any PyTorch code in that dtype."""
    counted = inputs.target != IGNORED
    hidden = torch.where(counted[:, None], inputs.hidden, 0)
    weight = inputs.weight.detach().clone().requires_grad_()
    bias = None if inputs.bias is None else inputs.bias.detach().clone().requires_grad_()
    raw = F.linear(hidden, weight, bias)
    raw.retain_grad()
    logits = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    rows = F.cross_entropy(logits, inputs.target, reduction="none", label_smoothing=label_smoothing)
    rows = torch.where(counted, rows + z_loss * logits.logsumexp(1).square(), 0)
    rows = rows if token_weight is None else rows * torch.where(counted, token_weight, 0).to(rows.dtype)
    count = counted.sum() if num_items is None else num_items
    loss = rows.sum() / count if reduction == "mean" else rows.sum()
    loss.backward()
    assert raw.grad is not None
    assert weight.grad is not None
    draws = (rule.seed, rule.step, 0)
    seen = _Seen(
        e=raw.grad,
        h=hidden,
        z=(raw if bias is None else raw - bias).detach(),
        p=logits.detach().softmax(1),
        gold=torch.where(counted, inputs.target, 0),
        weight=inputs.weight,
        anchors=choose_rows(*draws, counted, rule.num_anchors),
        uniforms=stratified_uniforms(*draws, torch.arange(len(hidden)), rule.num_draws),
    )
    feedback = torch.where(counted[:, None], _RULES[rule.name](rule, seen), 0)
    bias_grad = None if bias is None else bias.grad
    return Outcome(loss=loss.detach(), feedback=feedback, weight_grad=weight.grad, bias_grad=bias_grad)


def _expand(rule: Any, code: Tensor) -> Tensor:
    return rule.gain * (code @ rule.expander.to(code.dtype).T)


def _dense(rule: Any, seen: _Seen) -> Tensor:
    return _expand(rule, seen.e @ rule.codebook.to(seen.e.dtype))


def _sketched(e: Tensor, bucket: Tensor, sign: Tensor, rank: int) -> Tensor:
    return e.new_zeros(len(e), rank).index_add(1, bucket.long(), e * sign.to(e.dtype))


def _sketch(rule: Any, seen: _Seen) -> Tensor:
    return _expand(rule, _sketched(seen.e, rule.bucket, rule.sign, rule.expander.shape[1]))


def _is_kept(seen: _Seen, topk: int) -> Tensor:
    """Bool [N, V]: gold, and the largest entries in magnitude besides."""
    gold = F.one_hot(seen.gold, seen.e.shape[1]).bool()
    top = seen.e.abs().masked_fill(gold, -1).topk(min(topk, seen.e.shape[1] - 1), 1).indices
    return gold.scatter(1, top, True)


def _hybrid(rule: Any, seen: _Seen) -> Tensor:
    head = torch.where(_is_kept(seen, rule.topk), seen.e, 0)
    code = head @ rule.exact_codes.to(seen.e.dtype)
    tail = _sketched(seen.e - head, rule.bucket, rule.sign, rule.rank_tail)
    return _expand(rule, torch.cat([code, tail], 1))


def _parallel(_: Any, seen: _Seen) -> Tensor:
    return seen.h * ((seen.e * seen.z).sum(1) / seen.h.square().sum(1))[:, None]


def _residual(rule: Any, seen: _Seen, is_chosen: Tensor) -> Tensor:
    code = torch.where(is_chosen, seen.e, 0) @ rule.token_codes.to(seen.e.dtype)
    unit = seen.h / seen.h.norm(dim=1, keepdim=True)
    base = rule.residual_base.to(seen.e.dtype)
    columns = base - unit[:, :, None] * (unit @ base)[:, None, :]  # [N, D, R]
    columns = columns / columns.norm(dim=1, keepdim=True)
    return _parallel(rule, seen) + rule.residual_gain * (columns @ code[:, :, None])[:, :, 0]


def _parallel_gold(rule: Any, seen: _Seen) -> Tensor:
    return _residual(rule, seen, _is_kept(seen, 0))


def _parallel_topmass(rule: Any, seen: _Seen) -> Tensor:
    mass, order = seen.p.sort(dim=1, descending=True)
    is_inside = torch.zeros_like(mass, dtype=torch.bool).scatter(1, order, mass.cumsum(1) - mass < rule.mass_threshold)
    return _residual(rule, seen, is_inside | _is_kept(seen, 0))


def _anchor_logits(rule: Any, seen: _Seen) -> tuple[Tensor, Tensor]:
    """Z_Mᵀ [V, M], and what takes its columns back to the hidden states [M, D]."""
    h, z = seen.h[seen.anchors], seen.z[seen.anchors]
    # PyTorch solves in fp32 and fp64 only.
    h, z = h.float(), z.float()
    mean, mean_z = h.mean(0) / h.mean(0).norm(), z.mean(0) / h.mean(0).norm()
    z, h = z - torch.outer(h @ mean, mean_z), h - torch.outer(h @ mean, mean)
    z, h = torch.cat([z, h.norm() * mean_z[None]]), torch.cat([h, h.norm() * mean[None]])
    gram = h @ h.T
    ridge = rule.ridge * gram.trace() / len(seen.anchors)
    back = torch.linalg.solve(gram + ridge * torch.eye(len(h)), h)
    assert getattr(rule, "rank", None) is None, "the cases of low precision have none"
    return z.T.to(seen.e.dtype), back.to(seen.e.dtype)


def _anchors(rule: Any, seen: _Seen) -> Tensor:
    logits, back = _anchor_logits(rule, seen)
    return seen.e @ logits @ back


def _anchors_sampled(rule: Any, seen: _Seen) -> Tensor:
    logits, back = _anchor_logits(rule, seen)
    return _sampled(rule, seen, logits) @ back


def _anchors_shared(rule: Any, seen: _Seen) -> Tensor:
    logits, back = _anchor_logits(rule, seen)
    return _sampled(rule, seen, (logits.float() @ back.float()).to(seen.e.dtype))


def _sampled(rule: Any, seen: _Seen, rows: Tensor) -> Tensor:
    is_kept = _is_kept(seen, rule.topk)
    tail = torch.where(is_kept, 0, seen.e)
    running = tail.abs().cumsum(1)
    mass = running[:, -1:]
    drawn = torch.searchsorted(running, seen.uniforms.to(mass.dtype) * mass, right=True).clamp_max(tail.shape[1] - 1)
    weights = tail.gather(1, drawn).sign() * mass / rule.num_draws
    return torch.where(is_kept, seen.e, 0) @ rows + (weights[:, :, None] * rows[drawn]).sum(1)


_RULES: dict[str, Callable[[Any, _Seen], Tensor]] = {
    "dense": _dense,
    "sketch": _sketch,
    "hybrid": _hybrid,
    "parallel": _parallel,
    "parallel_gold": _parallel_gold,
    "parallel_topmass": _parallel_topmass,
    "anchors": _anchors,
    "anchors_sampled": _anchors_sampled,
    "anchors_shared": _anchors_shared,
    "mirror": lambda rule, seen: seen.e @ rule.rows.to(seen.e.dtype),
    "mirror_sampled": lambda rule, seen: _sampled(rule, seen, rule.rows.to(seen.e.dtype)),
    "transport": lambda _, seen: seen.e @ seen.weight,
    "transport_sampled": lambda rule, seen: _sampled(rule, seen, seen.weight),
}
