"""How text is chosen from logits, as a value. Without torch."""

from __future__ import annotations

from dataclasses import dataclass

from localexit import _values

# Probabilities of the most likely token at which an exit may count as sure.
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from the logits.

    Attributes:
        max_new_tokens: most tokens to add.
        temperature: what logits are divided by; 0 takes the most likely token.
        top_k: choose among the k most likely; None among all.
        seed: of the choice.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = 50
    seed: int = 0

    def __post_init__(self) -> None:
        _values.count("max_new_tokens", self.max_new_tokens, minimum=0)
        _values.non_negative("temperature", self.temperature)
        _values.count("seed", _values.seed(self.seed), minimum=0)
        if self.top_k is not None:
            _values.count("top_k", self.top_k, minimum=1)
