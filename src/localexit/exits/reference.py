"""The oracle: an exit with whole logits in fp64, the error by autograd, and one naive equation per rule.

Slow, large, and independent of the code it judges: nothing here is shared with the rules but the tensors they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from localexit.feedback.base import Feedback
from localexit.feedback.draws import choose_rows, stratified_uniforms


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What an exit must give, in fp64.

    Attributes:
        loss: 0-dim, or [N] for reduction "none".
        row_loss: [N] unweighted, 0 on ignored rows.
        error: [N, V] gradient of the (weighted, reduced) loss at the raw logits.
        feedback: [N, D] by the rule's equation.
        weight_grad, bias_grad: exact, [V, D] and [V].
        lse, log_prob, entropy: [N].
        argmax: [N].
        rows: [V, D], what the exits of a step share under a rule that shares anchors; None under others.
    """

    loss: Tensor
    row_loss: Tensor
    error: Tensor
    feedback: Tensor
    weight_grad: Tensor
    bias_grad: Tensor
    lse: Tensor
    log_prob: Tensor
    entropy: Tensor
    argmax: Tensor
    rows: Tensor | None


@dataclass(frozen=True, kw_only=True)
class _Case:
    """Everything an equation may need: error e, hidden h, raw logits without bias, targets, probabilities, draws."""

    e: Tensor
    h: Tensor
    z: Tensor
    p: Tensor
    target: Tensor
    weight: Tensor
    anchors: Tensor | None
    uniforms: Tensor | None
    rows: Tensor | None = None


def reference_exit(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    feedback: Feedback,
    linear_bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    num_items: float | None = None,
    exit_index: int = 0,
    upstream: Tensor | None = None,
    rows: Tensor | None = None,
) -> Reference:
    """Run the oracle; arguments as for `exit_cross_entropy`, tensors flat, `upstream` [N] for reduction "none".

    `rows` are those of the step's first exit, for its later ones under a rule that shares anchors.
    """
    h, w = hidden.detach().double(), weight.detach().double()
    b = torch.zeros(w.shape[0]) if linear_bias is None else linear_bias.detach().double()
    counted = target != ignore_index
    h = torch.where(counted[:, None], h, 0)
    raw = (h @ w.T + b).requires_grad_()
    logits = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    gold = torch.where(counted, target, 0).long()
    row_loss = F.cross_entropy(logits, gold, reduction="none", label_smoothing=label_smoothing)
    row_loss = torch.where(counted, row_loss + z_loss * logits.logsumexp(1).square(), 0)
    scale = torch.ones(len(gold), dtype=torch.float64) if token_weight is None else token_weight.detach().double()
    scale = torch.where(counted, scale, 0)
    if reduction == "mean":
        scale = scale / (max(int(counted.sum()), 1) if num_items is None else num_items)
    weighted = scale * row_loss
    loss = weighted if reduction == "none" else weighted.sum()
    (e,) = torch.autograd.grad(loss, raw, upstream.double() if upstream is not None else torch.ones_like(loss))
    log_probs = logits.detach().log_softmax(1)
    chooser = (feedback.seed, feedback.step, exit_index)
    all_rows = torch.arange(len(gold))
    case = _Case(
        e=e,
        h=h,
        z=(raw - b).detach(),
        p=log_probs.exp(),
        target=gold,
        weight=w,
        anchors=choose_rows(*chooser, counted, feedback.num_anchors) if feedback.num_anchors else None,
        uniforms=stratified_uniforms(*chooser, all_rows, feedback.num_draws) if feedback.num_draws else None,
    )
    if feedback.name == "anchors_shared":
        case = replace(case, rows=_anchor_rows(feedback, case) if rows is None else rows)
    return Reference(
        loss=loss.detach(),
        row_loss=row_loss.detach(),
        error=e,
        feedback=torch.where(counted[:, None], _EQUATIONS[feedback.name](feedback, case), 0),
        weight_grad=e.T @ h,
        bias_grad=e.sum(0),
        lse=torch.where(counted, logits.detach().logsumexp(1), 0),
        log_prob=torch.where(counted, log_probs.gather(1, gold[:, None])[:, 0], 0),
        entropy=torch.where(counted, -(log_probs.exp() * log_probs).nan_to_num(0).sum(1), 0),
        argmax=torch.where(counted, log_probs.argmax(1), 0),
        rows=case.rows,
    )


def _dense(rule: Any, case: _Case) -> Tensor:
    return rule.gain * case.e @ rule.codebook.double() @ rule.expander.double().T


def _sketch(rule: Any, case: _Case) -> Tensor:
    code = torch.zeros(len(case.e), rule.expander.shape[1], dtype=torch.float64)
    for token, (bucket, sign) in enumerate(zip(rule.bucket.tolist(), rule.sign.tolist(), strict=True)):
        code[:, bucket] += sign * case.e[:, token]
    return rule.gain * code @ rule.expander.double().T


def _top_ids(row: Tensor, gold: int, k: int) -> list[int]:
    order = sorted((v for v in range(len(row)) if v != gold), key=lambda v: -abs(float(row[v])))
    return order[:k]


def _hybrid(rule: Any, case: _Case) -> Tensor:
    rank_exact = rule.exact_codes.shape[1]
    code = torch.zeros(len(case.e), rule.expander.shape[1], dtype=torch.float64)
    for i, row in enumerate(case.e):
        gold = int(case.target[i])
        chosen = {gold, *_top_ids(row, gold, rule.topk)} if rank_exact else set()
        for v, entry in enumerate(row):
            if v in chosen:
                code[i, :rank_exact] += entry * rule.exact_codes[v].double()
            elif rule.rank_tail:
                code[i, rank_exact + int(rule.bucket[v])] += entry * int(rule.sign[v])
    return rule.gain * code @ rule.expander.double().T


def _parallel(rule: Any, case: _Case) -> Tensor:
    f = torch.zeros_like(case.h)
    for i, h in enumerate(case.h):
        if h.any():
            f[i] = h * (case.e[i] @ case.z[i]) / (h @ h)
    return f


def _with_residual(rule: Any, case: _Case, chosen: Callable[[int], set[int]]) -> Tensor:
    f = _parallel(rule, case)
    base = rule.residual_base.double()
    for i, h in enumerate(case.h):
        if not h.any():
            continue
        unit = h / h.norm()
        projected = base - torch.outer(unit, unit @ base)
        # Of a column along h nothing is left: it stays (nearly) zero.
        projected = projected / projected.norm(dim=0, keepdim=True).clamp_min(1e-4)
        code = sum(case.e[i, v] * rule.token_codes[v].double() for v in chosen(i))
        f[i] += rule.residual_gain * projected @ code
    return f


def _parallel_gold(rule: Any, case: _Case) -> Tensor:
    return _with_residual(rule, case, lambda i: {int(case.target[i])})


def _parallel_topmass(rule: Any, case: _Case) -> Tensor:
    def chosen(i: int) -> set[int]:
        tokens, mass = {int(case.target[i])}, 0.0
        for v in case.p[i].argsort(descending=True)[: rule.nucleus_cap].tolist():
            if mass >= rule.mass_threshold:
                break
            tokens.add(v)
            mass += float(case.p[i, v])
        return tokens

    return _with_residual(rule, case, chosen)


def _anchor_rows(rule: Any, case: _Case) -> Tensor:
    """What eq. (10) has in place of W: Z_Mᵀ (H_M H_Mᵀ + λI)⁻¹ H_M, [V, D]."""
    assert case.anchors is not None
    anchors = case.anchors[case.h[case.anchors].any(1)]
    if len(anchors) == 0:
        return torch.zeros_like(case.weight)
    h, z = case.h[anchors], case.z[anchors]
    shortest = 1e-8 * h.norm()
    unit, unit_z = h.mean(0) / h.mean(0).norm(), z.mean(0) / h.mean(0).norm()
    z, h = z - torch.outer(h @ unit, unit_z), h - torch.outer(h @ unit, unit)
    rest = max(h.norm(), shortest)
    h_m, z_m = torch.cat([h, rest * unit[None]]), torch.cat([z, rest * unit_z[None]])
    gram = h_m @ h_m.T
    ridge = rule.ridge * gram.trace() / len(anchors)
    rows = z_m.T @ torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=torch.float64), h_m)
    if getattr(rule, "rank", None) is None:
        return rows
    spread = h_m.T @ h_m
    axes = torch.linalg.qr(spread @ torch.linalg.qr(spread @ torch.linalg.qr(spread[:, : rule.rank]).Q).Q).Q
    return rows @ axes @ axes.T


def _sampled(rule: Any, case: _Case, rows: Tensor | None) -> Tensor:
    assert case.uniforms is not None
    assert rows is not None
    f = torch.zeros_like(case.h)
    for i, row in enumerate(case.e):
        gold = int(case.target[i])
        kept = [gold, *_top_ids(row, gold, rule.topk)]
        f[i] = row[kept] @ rows[kept]
        tail = row.abs().clone()
        tail[kept] = 0
        running, mass = tail.cumsum(0), tail.sum()
        if mass > 0:
            for u in case.uniforms[i].double():
                drawn = int((running <= u * mass).sum())
                f[i] += row[drawn].sign() * mass / case.uniforms.shape[1] * rows[drawn]
    return f


_EQUATIONS: dict[str, Callable[[Any, _Case], Tensor]] = {
    "dense": _dense,
    "sketch": _sketch,
    "hybrid": _hybrid,
    "parallel": _parallel,
    "parallel_gold": _parallel_gold,
    "parallel_topmass": _parallel_topmass,
    "anchors": lambda rule, case: case.e @ _anchor_rows(rule, case),
    "anchors_sampled": lambda rule, case: _sampled(rule, case, _anchor_rows(rule, case)),
    "anchors_shared": lambda rule, case: _sampled(rule, case, case.rows),
    "mirror": lambda rule, case: case.e @ rule.rows.double(),
    "mirror_sampled": lambda rule, case: _sampled(rule, case, rule.rows.double()),
    "transport": lambda rule, case: case.e @ case.weight,
    "transport_sampled": lambda rule, case: _sampled(rule, case, case.weight),
}
