"""Small exits, and what their gradients must be: shared by the tests of the operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from localexit import ExactParallelExitHead, FactorizedExitHead
from localexit.exits.reference import Reference, reference_exit
from localexit.feedback import Feedback, feedback_names, feedback_options, make_feedback

RULES = feedback_names()
# Rules that keep state between steps, draw, or choose anchors: what compilation and recomputation could disturb.
STATEFUL_RULES = ("anchors", "anchors_sampled", "anchors_shared", "mirror", "mirror_sampled", "transport_sampled")
# Every fp32 result is off by a few roundings of sums over tens of terms; the true gradient is off by 10 % or more.
CLOSE, FAR = 2e-6, 0.05
NUM_TOKENS, WIDTH, VOCAB = 24, 16, 96

HEADS = ("dense", "hybrid", "parallel_only", "parallel_gold", "parallel_topmass")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One exit with random inputs, every fifth token ignored."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    rule: Feedback

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Fresh leaves for hidden and weight."""
        return self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()

    def oracle(self, **options: Any) -> Reference:
        return reference_exit(self.hidden, self.weight, self.target, feedback=self.rule, **options)

    def true_gradient(self, **options: Any) -> Tensor:
        return self.oracle(**options).error @ self.weight.double()


def make_rule(name: str, *, seed: int = 3) -> Feedback:
    """A rule by name; a mirror gets rows as if it had learned something: its zeros would feed nothing back."""
    # Fewer than the width: neither an anchor rule nor a mirror becomes the true gradient within a step or two.
    options = {"num_anchors": 8} if "anchors" in name else {"num_pairs": 8} if "mirror" in name else {}
    if "num_draws" in feedback_options(name):
        # With these no draw lies so close to its neighbour that the rounding of bf16 or fp16 takes it there.
        options |= {"topk": 16, "num_draws": 16}
    rule = make_feedback(name, WIDTH, VOCAB, seed=seed, **options)
    if "mirror" in name:
        rule.rows.normal_(generator=torch.Generator().manual_seed(seed))
    return rule


def make_case(name: str, *, num_tokens: int = NUM_TOKENS, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(VOCAB, (num_tokens,), generator=generator)
    target[::5] = -100
    return Case(
        hidden=torch.randn(num_tokens, WIDTH, generator=generator).to(dtype),
        weight=(0.3 * torch.randn(VOCAB, WIDTH, generator=generator)).to(dtype),
        target=target,
        rule=make_rule(name),
    )


def make_head(mode: str) -> FactorizedExitHead | ExactParallelExitHead:
    if mode == "dense":
        return FactorizedExitHead(WIDTH, VOCAB, mode="dense", rank=8, seed=0)
    if mode == "hybrid":
        return FactorizedExitHead(WIDTH, VOCAB, mode="hybrid", rank=8, rank_exact=3, topk=2, seed=0)
    return ExactParallelExitHead(WIDTH, VOCAB, mode=mode, residual_rank=8, seed=0)  # type: ignore[arg-type]


def head_loss(head: torch.nn.Module, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden, weight, target).float(), target)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def assert_feedback(case: Case, hidden_grad: Tensor, **options: Any) -> None:
    """The hidden state received the rule's feedback; for every rule but the exact one, not the true gradient."""
    assert relative_error(hidden_grad, case.oracle(**options).feedback) < CLOSE
    is_exact = case.rule.name == "transport"
    assert (relative_error(hidden_grad, case.true_gradient(**options)) > FAR) != is_exact
