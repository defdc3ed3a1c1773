"""Inputs of one exit, the rules in a state worth testing, and what an exit and its oracle make of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from localexit import exit_cross_entropy, feedback_names, make_feedback
from localexit.exits.reference import reference_exit
from localexit.feedback import Feedback

RULES = feedback_names()
IGNORED = -100

# Small enough for the oracle's loops, large enough that every part of a rule does something.
SMALL: dict[str, dict[str, Any]] = {
    "dense": {"rank": 5, "gain": 0.7},
    "sketch": {"rank": 5, "gain": 1.3},
    "hybrid": {"rank": 5, "rank_exact": 2, "topk": 3, "gain": 0.9},
    "parallel": {},
    "parallel_gold": {"residual_rank": 4, "residual_gain": 0.5},
    "parallel_topmass": {"residual_rank": 4, "residual_gain": 0.5, "mass_threshold": 0.6},
    "anchors": {"num_anchors": 4},
    "anchors_sampled": {"num_anchors": 6, "topk": 3, "num_draws": 4},
    "anchors_shared": {"num_anchors": 6, "topk": 3, "num_draws": 4},
    "mirror": {"num_pairs": 4},
    "mirror_sampled": {"num_pairs": 4, "topk": 3, "num_draws": 4},
    "transport": {},
    "transport_sampled": {"topk": 3, "num_draws": 4},
}


def small_rule(name: str, width: int, vocab: int, *, seed: int = 3, **options: Any) -> Feedback:
    """A rule by name with small options, ranks cut to the width; a mirror has learned something already."""
    chosen = {key: min(value, width) if "rank" in key else value for key, value in SMALL[name].items()} | options
    rule = make_feedback(name, width, vocab, seed=seed, **chosen)
    if name.startswith("mirror"):
        rule.rows.normal_(generator=torch.Generator().manual_seed(seed + 1))
    return rule


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Tensors of one exit: hidden [..., D], weight [V, D], target [...], bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None = None

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def to(self, dtype: torch.dtype) -> Inputs:
        """Hidden, weight and bias in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)


def make_inputs(
    rows: int = 7, width: int = 9, vocab: int = 130, *, ignored: int = 0, bias: bool = False, seed: int = 0
) -> Inputs:
    """Random fp64 inputs; the hidden states of the ignored rows are NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(rows, width), 0.6 * normal(vocab, width)
    target = torch.randint(vocab, (rows,), generator=generator)
    left_out = torch.randperm(rows, generator=generator)[:ignored]
    hidden[left_out], target[left_out] = torch.nan, IGNORED
    return Inputs(hidden=hidden, weight=weight, target=target, bias=normal(vocab) if bias else None)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one exit gave: loss, feedback and gradients."""

    loss: Tensor
    feedback: Tensor
    weight_grad: Tensor
    bias_grad: Tensor | None

    def items(self) -> dict[str, Tensor]:
        """By name, what there is."""
        named = {"loss": self.loss, "feedback": self.feedback, "dW": self.weight_grad}
        return named if self.bias_grad is None else named | {"db": self.bias_grad}


def run(inputs: Inputs, rule: Feedback, *, upstream: Tensor | None = None, **options: Any) -> Outcome:
    """`exit_cross_entropy` and its backward."""
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_()
    bias = None if inputs.bias is None else inputs.bias.detach().requires_grad_()
    loss = exit_cross_entropy(hidden, weight, inputs.target, feedback=rule, linear_bias=bias, **options)
    assert isinstance(loss, Tensor)
    loss.backward(upstream)
    assert hidden.grad is not None
    assert weight.grad is not None
    bias_grad = None if bias is None else bias.grad
    return Outcome(loss=loss.detach(), feedback=hidden.grad, weight_grad=weight.grad, bias_grad=bias_grad)


def expected(inputs: Inputs, rule: Feedback, *, upstream: Tensor | None = None, **options: Any) -> Outcome:
    """The same from the oracle, in fp64."""
    options.pop("chunk_bytes", None)
    weight = options.pop("token_weight", None)
    result = reference_exit(
        inputs.hidden.reshape(-1, inputs.width),
        inputs.weight,
        inputs.target.reshape(-1),
        feedback=rule,
        linear_bias=inputs.bias,
        token_weight=None if weight is None else weight.reshape(-1),
        upstream=None if upstream is None else upstream.flatten() if upstream.dim() else upstream,
        **options,
    )
    loss = result.loss.reshape(inputs.target.shape) if options.get("reduction") == "none" else result.loss
    return Outcome(
        loss=loss,
        feedback=result.feedback.reshape(inputs.hidden.shape),
        weight_grad=result.weight_grad,
        bias_grad=None if inputs.bias is None else result.bias_grad,
    )
