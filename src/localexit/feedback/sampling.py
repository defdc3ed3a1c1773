"""A product of the error with a [V, R] matrix, whole or through an unbiased sample of its rows; eq. (12)."""

from __future__ import annotations

from torch import Tensor

from localexit import _checks
from localexit.feedback.base import Error, Feedback, Tokens

# Options of a rule of this kind, for `Feedback.options`.
SAMPLING_OPTIONS = ("sampled", "selects", "topk", "num_draws")


def sampled_rows(error: Error, tokens: Tokens, rows: Tensor, *, topk: int) -> Tensor:
    """An unbiased estimate of `e @ rows` from few rows; eq. (12).

    Gold and the top-k errors are kept exactly; the tail is drawn in proportion to its error. Dropping the tail
    instead would be biased.

    error of n tokens; rows [V, R]; the draws are `tokens.uniforms`. Returns [n, R].
    """
    assert tokens.uniforms is not None, "the caller draws uniforms for rules with num_draws"
    ids, weights = error.select(topk, tokens.uniforms, tokens.target)
    return error.weighted_rows(ids, weights, rows)


class Sampling(Feedback):
    """What rules share that multiply the error with a matrix of V rows, all of them or a few."""

    sampled: bool
    topk: int

    def _set_sampling(self, sampled: bool, topk: int, num_draws: int) -> None:
        self.sampled = bool(sampled)
        # Which entries are kept exactly depends on the error.
        self.is_additive = not self.sampled
        self.selects = self.sampled
        self.topk = _checks.count("topk", topk, minimum=0)
        self.num_draws = _checks.count("num_draws", num_draws, minimum=1) if sampled else 0

    def _times(self, error: Error, tokens: Tokens, rows: Tensor) -> Tensor:
        """`e @ rows` for rows [V, R], or its estimate: [n, R]."""
        if self.sampled:
            return sampled_rows(error, tokens, rows, topk=self.topk)
        return error.matmul(rows)
