"""Feedback rules called directly, with any error, past the exit."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers.cases import Inputs
from localexit.exits.chunked import measure
from localexit.feedback import Error, Feedback, Tokens
from localexit.feedback.draws import choose_rows, stratified_uniforms
from localexit.feedback.registry import from_spec


def apply(
    rule: Feedback, values: Tensor, inputs: Inputs, *, scale: Tensor | None = None, exit_index: int = 0
) -> Tensor:
    """The feedback for the error `scale[:, None] * values` [n, V]; all else the rule sees comes from `inputs`."""
    logits = inputs.hidden @ inputs.weight.T
    draws = (rule.seed, rule.step, exit_index)
    is_counted = torch.ones(len(values), dtype=torch.bool)
    anchors = None
    if rule.num_anchors:
        rows = choose_rows(*draws, is_counted, rule.num_anchors)
        anchors = measure(inputs.hidden[rows], inputs.weight, is_counted[rows])
    uniforms = stratified_uniforms(*draws, torch.arange(len(values)), rule.num_draws) if rule.num_draws else None
    tokens = Tokens(
        hidden=inputs.hidden,
        target=inputs.target,
        logits=logits,
        log_normaliser=logits.logsumexp(1),
        uniforms=uniforms,
    )
    error = Error(
        values=values,
        scale=values.new_ones(len(values)) if scale is None else scale,
        logit_product=(values * logits).sum(1),
    )
    bound = from_spec(rule.spec(), rule.state(inputs.weight))
    feedback: Tensor = bound(error, tokens, bound.prepare(anchors, values.dtype))
    return feedback


def cross_entropy_error(inputs: Inputs) -> Tensor:
    """e = p - y [n, V]."""
    probabilities = (inputs.hidden @ inputs.weight.T).softmax(1)
    return probabilities - torch.nn.functional.one_hot(inputs.target, inputs.vocab)


def signed_error(inputs: Inputs, seed: int = 5) -> Tensor:
    """An error with entries of both signs everywhere, as label smoothing or an odd upstream gradient makes it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(inputs.hidden), inputs.vocab, generator=generator, dtype=torch.float64)
