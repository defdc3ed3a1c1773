"""The rules by name: what the command line, the tests and the reports iterate over."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor

from localexit._rules import check_options, feedback_options
from localexit.feedback.anchors import LogitAnchors
from localexit.feedback.base import RULE_CLASSES, Feedback
from localexit.feedback.factorized import Dense, Hybrid, Sketch
from localexit.feedback.parallel import ExactParallel
from localexit.feedback.rows import WeightMirror, WeightTransport
from localexit.feedback.shared import SharedAnchors


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One named rule: its class, the options its name fixes, what a reader wants to know of it."""

    rule: type[Feedback]
    fixed: dict[str, Any] = field(default_factory=dict)
    equation: str
    cost: str
    state: str


RULES: dict[str, Rule] = {
    "dense": Rule(rule=Dense, equation="gain · (e K) Uᵀ", cost="2NVR", state="V·R + D·R"),
    "sketch": Rule(rule=Sketch, equation="gain · sketch(e) Uᵀ", cost="2NVR", state="2V + D·R"),
    "hybrid": Rule(
        rule=Hybrid, equation="gain · [e_S Q, sketch(e − e_S)] Uᵀ", cost="2NVR + top-k", state="V·(R_exact + 2) + D·R"
    ),
    "parallel": Rule(
        rule=ExactParallel,
        fixed={"residual": None},
        equation="h ⟨e, z − b⟩ / ‖h‖²",
        cost="NV",
        state="none",
    ),
    "parallel_gold": Rule(
        rule=ExactParallel,
        fixed={"residual": "gold"},
        equation="… + λ R(h) e_gold q_gold",
        cost="NV + 4NDR",
        state="V·R + D·R",
    ),
    "parallel_topmass": Rule(
        rule=ExactParallel,
        fixed={"residual": "topmass"},
        equation="… + λ R(h) Σ_S e_v q_v",
        cost="NV + top-p + 4NDR",
        state="V·R + D·R",
    ),
    "anchors": Rule(
        rule=LogitAnchors,
        fixed={"sampled": False},
        equation="(e Z_Mᵀ)(H_M H_Mᵀ + λI)⁻¹ H_M",
        cost="2NVM + 2MVD",
        state="none",
    ),
    "anchors_sampled": Rule(
        rule=LogitAnchors,
        fixed={"sampled": True},
        equation="(Σ_kept e_v z_v + (Q/m) Σ_drawn ±z_v)(H_M H_Mᵀ + λI)⁻¹ H_M",
        cost="2N(1+k+m)M + 2NMD + 2MVD",
        state="none",
    ),
    "anchors_shared": Rule(
        rule=SharedAnchors,
        equation="Σ_kept e_v b_v + (Q/m) Σ_drawn ±b_v, B = Z_Mᵀ(H_M H_Mᵀ + λI)⁻¹ H_M of a step's first exit",
        cost="2N(1+k+m)D + 4MVD/L",
        state="none",
    ),
    "mirror": Rule(
        rule=WeightMirror,
        fixed={"sampled": False},
        equation="e B",
        cost="2NVD + 6MVD",
        state="V·D",
    ),
    "mirror_sampled": Rule(
        rule=WeightMirror,
        fixed={"sampled": True},
        equation="Σ_kept e_v b_v + (Q/m) Σ_drawn ±b_v",
        cost="2N(1+k+m)D + 6MVD",
        state="V·D",
    ),
    "transport": Rule(
        rule=WeightTransport,
        fixed={"sampled": False},
        equation="e W",
        cost="2NVD",
        state="none",
    ),
    "transport_sampled": Rule(
        rule=WeightTransport,
        fixed={"sampled": True},
        equation="Σ_kept e_v w_v + (Q/m) Σ_drawn ±w_v",
        cost="2N(1+k+m)D",
        state="none",
    ),
}


def make_feedback(name: str, hidden_size: int, vocab_size: int, *, seed: int | None = 0, **options: Any) -> Feedback:
    """Build a feedback rule by name.

    >>> make_feedback("dense", hidden_size=64, vocab_size=1000, gain=0.5)
    Dense(hidden_size=64, vocab_size=1000, gain=0.5)

    Args:
        name: one of `feedback_names()`.
        hidden_size: D, width of the hidden state.
        vocab_size: V, number of tokens.
        seed: seed of codes, draws and anchors; None draws one from torch's default generator.
        options: the rule's own options, see its class.

    Raises:
        ValueError: the name or an option is unknown, or an option is out of range.
    """
    check_options(name, options)
    entry = RULES[name]
    return entry.rule(hidden_size=hidden_size, vocab_size=vocab_size, seed=seed, **entry.fixed, **options)  # type: ignore[call-arg]


def rule_options(rule: Feedback) -> dict[str, Any]:
    """The options with which `make_feedback(rule.name, ...)` builds such a rule again.

    Raises:
        ValueError: the rule is none that `make_feedback` knows.
    """
    return {option: getattr(rule, option) for option in feedback_options(rule.name)}


def from_spec(spec: str, state: Sequence[Tensor]) -> Feedback:
    """The rule that `Feedback.spec()` and `Feedback.state()` describe, around the same tensors."""
    rule, options = _read(spec)
    return RULE_CLASSES[rule]._bare(options, state)


# Every exit of every step asks, and `literal_eval` leaves a reference cycle behind.
@lru_cache(maxsize=256)
def _read(spec: str) -> tuple[str, dict[str, Any]]:
    """Name of the class and its options."""
    rule, options, floats = ast.literal_eval(spec)
    return rule, options | {key: float.fromhex(text) for key, text in floats.items()}
