"""Our contenders: each rule in each way of calling an exit, and the bare products they are counted in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from localexit.exits import exit_cross_entropy, exit_step
from localexit.exits.functional import Preset, WeightGrad
from localexit.feedback import Feedback, WeightMirror
from localexit.train.config import FeedbackSpec

from .inputs import Inputs
from .plans import Backend, Mode, RulePlan

Kind = Literal["rule", "exact", "original", "products"]
PRODUCT, THREE_PRODUCTS = "h @ W.T", "three products"

# Gives the loss (None where there is none) and leaves its gradients in the inputs.
Run = Callable[[Inputs], Tensor | None]

# Why a rule may cost more than two products and a pass over the logits.
_NOTES = {
    "hybrid": "top-k of V per token",
    "parallel_topmass": "top-256 of V per token",
    "anchors_sampled": "top-k and draws of V per token, logits of 2D anchors",
    "anchors_shared": "top-k and draws of V per token, rows of W from 1.5D anchors, which a step has once",
    "mirror": "third product",
    "mirror_sampled": "top-k and draws of V per token",
    "transport": "third product",
    "transport_sampled": "top-k and draws of V per token",
}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One thing that is timed.

    Attributes:
        name: what tables call it.
        kind: a rule of ours, an exact head, an original head, or bare products.
        run: one call from inputs without gradients.
        note: why it costs more than others, or nothing.
        backend: what runs it, where there is a choice.
        is_exact: whether dh is the exact one too.
        is_filtered: whether dW leaves out what does not matter: its error is told, not judged.
        has_draws: whether feedback depends on draws.
        is_compiled: whether its first call with a shape compiles.
    """

    name: str
    kind: Kind
    run: Run
    note: str = ""
    backend: str | None = None
    is_exact: bool = False
    is_filtered: bool = False
    has_draws: bool = False
    is_compiled: bool = False

    def __call__(self, inputs: Inputs) -> Tensor | None:
        """Run with no gradients from before."""
        inputs.clear()
        return self.run(inputs)


def make_rule(spec: FeedbackSpec, inputs: Inputs) -> Feedback:
    """The rule for these inputs; a mirror has learned W, and is stored like it."""
    vocab_size, hidden_size = inputs.weight.shape
    rule = spec.build(hidden_size=hidden_size, vocab_size=vocab_size, seed=0).to(inputs.weight.device)
    if isinstance(rule, WeightMirror):
        rule.rows = inputs.weight.detach().clone()
    return rule


def rule_contenders(plans: Sequence[RulePlan], inputs: Inputs) -> list[Contender]:
    """One contender a plan; modes of one rule share its codes."""
    rules = {plan.rule: make_rule(plan.rule, inputs) for plan in plans}
    return [_rule_contender(plan, rules[plan.rule], inputs) for plan in plans]


def _rule_contender(plan: RulePlan, rule: Feedback, inputs: Inputs) -> Contender:
    notes = [_NOTES.get(plan.rule.name, "")]
    if plan.mode == "memory":
        notes.append("dW by vocabulary tiles, one product more")
    if isinstance(rule, WeightMirror) and plan.mode in ("autograd", "memory"):
        notes.append("update included")
    if plan.mode == "filtered":
        notes.append("small errors left out of dW")
    return Contender(
        name=str(plan),
        kind="rule",
        run=partial(_CALLS[plan.mode], rule, plan.backend),
        note="; ".join(filter(None, notes)),
        backend=_backend_that_runs(rule, plan.backend, inputs),
        is_exact=plan.rule.name == "transport",
        is_filtered=plan.mode == "filtered",
        has_draws=rule.num_draws > 0,
    )


def run_step(rule: Feedback, backend: Backend, inputs: Inputs, weight_grad: WeightGrad = "exact") -> Tensor:
    """An exit by `exit_step`, with what it collects for the rule, which is then forgotten."""
    step = exit_step(
        inputs.hidden,
        inputs.weight,
        inputs.target,
        feedback=rule,
        grad_weight=inputs.total,
        backend=backend,
        weight_grad=weight_grad,
    )
    # What a mirror collects it learns from once a training step; here it would be merged from call to call. And anchors
    # that exits share are measured by an exit that is alone.
    rule.discard()
    inputs.hidden.grad = step.feedback
    return step.loss


def _autograd(rule: Feedback, backend: Backend, inputs: Inputs, preset: Preset = "fast") -> Tensor:
    loss = exit_cross_entropy(
        inputs.hidden, inputs.weight, inputs.target, feedback=rule, backend=backend, preset=preset
    )
    loss.backward()
    rule.update()
    return loss.detach()


_CALLS: dict[Mode, Callable[[Feedback, Backend, Inputs], Tensor]] = {
    "step": run_step,
    "filtered": partial(run_step, weight_grad="filtered"),
    "autograd": _autograd,
    "memory": partial(_autograd, preset="memory"),
}


@torch.no_grad()
def _backend_that_runs(rule: Feedback, backend: Backend, inputs: Inputs) -> str:
    few = slice(8)
    _, stats = exit_cross_entropy(
        inputs.hidden[few], inputs.weight, inputs.target[few], feedback=rule, backend=backend, return_stats=True
    )
    return stats.backend


def product_contenders() -> list[Contender]:
    """The logits alone, the unit the others are counted in; and the floor of every exact head."""
    return [
        Contender(name=PRODUCT, kind="products", run=partial(_products, False), note="for scale: no loss, no gradient"),
        Contender(name=THREE_PRODUCTS, kind="products", run=partial(_products, True), note="of any exact head"),
    ]


@torch.no_grad()
def _products(with_gradients: bool, inputs: Inputs) -> None:
    weight = inputs.weight
    # A CPU pays for memory it has not touched before: there the logits go into one small buffer again and again.
    rows = 256 if weight.device.type == "cpu" else len(inputs.hidden)
    buffer = weight.new_empty(min(rows, len(inputs.hidden)), len(weight))
    weight_grad: Tensor | None = None
    for hidden in inputs.hidden.split(rows):
        logits = torch.mm(hidden, weight.T, out=buffer[: len(hidden)])
        if with_gradients:
            errors = logits.T
            weight_grad = torch.mm(errors, hidden) if weight_grad is None else weight_grad.addmm_(errors, hidden)
            torch.mm(logits, weight)
