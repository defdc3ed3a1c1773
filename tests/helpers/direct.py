"""Feedback rules called directly, with any error, past the exit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helpers.cases import Inputs
from localexit.exits.chunked import measure
from localexit.feedback import Anchors, Error, Feedback, SharedAnchors, Tokens
from localexit.feedback.draws import choose_rows, stratified_uniforms
from localexit.feedback.registry import from_spec


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What a rule draws in one call: anchors, and uniform numbers [n, m]."""

    anchors: Anchors | None
    uniforms: Tensor | None

    def of_rows(self, rows: Tensor) -> Draws:
        """The same draws for some of the tokens."""
        return replace(self, uniforms=None if self.uniforms is None else self.uniforms[rows])

    def of_vocabulary(self, order: Tensor) -> Draws:
        """The same draws for a vocabulary in another order."""
        anchors = None if self.anchors is None else replace(self.anchors, logits=self.anchors.logits[:, order])
        return replace(self, anchors=anchors)


def fixed_draws(rule: Feedback, inputs: Inputs, *, exit_index: int = 0) -> Draws:
    """The draws of a call in which every token counts."""
    draws = (rule.seed, rule.step, exit_index)
    is_counted = torch.ones(len(inputs.hidden), dtype=torch.bool)
    anchors = None
    if rule.num_anchors:
        rows = choose_rows(*draws, is_counted, rule.num_anchors)
        anchors = measure(inputs.hidden[rows], inputs.weight, is_counted[rows])
    rows = torch.arange(len(inputs.hidden))
    return Draws(
        anchors=anchors, uniforms=stratified_uniforms(*draws, rows, rule.num_draws) if rule.num_draws else None
    )


def apply(
    rule: Feedback,
    values: Tensor,
    inputs: Inputs,
    *,
    scale: Tensor | None = None,
    exit_index: int = 0,
    draws: Draws | None = None,
) -> Tensor:
    """The feedback for the error `scale[:, None] * values` [n, V]; all else the rule sees comes from `inputs`."""
    logits = inputs.hidden @ inputs.weight.T
    draws = fixed_draws(rule, inputs, exit_index=exit_index) if draws is None else draws
    tokens = Tokens(
        hidden=inputs.hidden,
        target=inputs.target,
        logits=logits,
        log_normaliser=logits.logsumexp(1) if rule.needs_logits else None,
        uniforms=draws.uniforms,
    )
    error = Error(
        values=values,
        scale=values.new_ones(len(values)) if scale is None else scale,
        logit_product=(values * logits).sum(1),
    )
    bound = from_spec(rule.spec(), _state(rule, inputs, draws))
    feedback: Tensor = bound(error, tokens, bound.prepare(draws.anchors, values.dtype))
    return feedback


def _state(rule: Feedback, inputs: Inputs, draws: Draws) -> list[Tensor]:
    """What the exit gives the rule; anchors that the exits of a step share are those of this one."""
    if not isinstance(rule, SharedAnchors):
        return rule.state(inputs.weight)
    anchors = draws.anchors
    assert anchors is not None, "it measures anchors"
    is_counted = torch.ones(len(anchors.hidden), dtype=torch.bool)
    return [rule.solved(anchors.hidden, is_counted, [anchors.logits], dtype=anchors.logits.dtype).rows]


def cross_entropy_error(inputs: Inputs) -> Tensor:
    """e = p - y [n, V]."""
    probabilities = (inputs.hidden @ inputs.weight.T).softmax(1)
    return probabilities - torch.nn.functional.one_hot(inputs.target, inputs.vocab)


def signed_error(inputs: Inputs, seed: int = 5) -> Tensor:
    """An error with entries of both signs everywhere, as label smoothing or an odd upstream gradient makes it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(inputs.hidden), inputs.vocab, generator=generator, dtype=torch.float64)
