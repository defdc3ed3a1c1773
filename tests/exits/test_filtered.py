"""dW without the errors that do not matter: which are left out, and what that costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from localexit import exit_cross_entropy, exit_step, make_feedback
from localexit.exits.chunked import FILTER_THRESHOLD
from localexit.exits.reference import reference_exit
from localexit.feedback.groups import GROUP

NUM_TOKENS, HIDDEN, VOCAB = 11, 16, 3 * GROUP + 17


def make_case() -> tuple[Tensor, Tensor, Tensor]:
    """Peaked predictions: in most groups of tokens there is no error worth the name."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    target = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)
    hidden = torch.randn(NUM_TOKENS, HIDDEN, generator=generator, dtype=torch.float64) + 1.5 * weight[target]
    target[3] = -100
    return hidden, weight, target


def expected_weight_grad(error: Tensor, hidden: Tensor, target: Tensor) -> tuple[Tensor, int]:
    """By loops over rows and groups, and how many of both were left out; error [N, V] for a row weight of one."""
    total, num_left_out = torch.zeros(VOCAB, HIDDEN, dtype=torch.float64), 0
    for row, (e, h) in enumerate(zip(error, hidden, strict=True)):
        for start in range(0, VOCAB, GROUP):
            group = slice(start, min(start + GROUP, VOCAB))
            if e[group].abs().max() < FILTER_THRESHOLD and not group.start <= target[row] < group.stop:
                num_left_out += 1
                continue
            total[group] += torch.outer(e[group], h)
    return total, num_left_out


def test_small_groups_are_left_out_of_dw_and_of_nothing_else() -> None:
    hidden, weight, target = make_case()
    rule = make_feedback("dense", HIDDEN, VOCAB)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = exit_cross_entropy(*leaves, target, feedback=rule, reduction="sum", weight_grad="filtered")
    loss.backward()
    exact = reference_exit(hidden, weight, target, feedback=rule, reduction="sum")
    counted = target != -100
    kept, num_left_out = expected_weight_grad(exact.error[counted], hidden[counted], target[counted])
    assert num_left_out > NUM_TOKENS // 2
    assert torch.allclose(loss.detach(), exact.loss)
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    assert torch.allclose(leaves[0].grad, exact.feedback)
    assert torch.allclose(leaves[1].grad, kept, atol=1e-12)
    error = (kept - exact.weight_grad).norm() / exact.weight_grad.norm()
    assert 0 < error < 1e-3


def test_the_group_of_the_gold_token_counts_however_small_its_errors_are() -> None:
    """A prediction that is all but certain, and right."""
    weight = torch.eye(VOCAB, HIDDEN, dtype=torch.float64)
    hidden, target = 25 * weight[3:4], torch.tensor([3])
    total, exact = torch.zeros_like(weight), torch.zeros_like(weight)
    for grad, weight_grad in ((total, "filtered"), (exact, "exact")):
        rule = make_feedback("dense", HIDDEN, VOCAB)
        exit_step(hidden, weight, target, feedback=rule, grad_weight=grad, weight_grad=weight_grad)
    assert 0 < exact.abs().max() < FILTER_THRESHOLD
    assert torch.equal(total[:GROUP], exact[:GROUP])
    assert not total[GROUP:].any()


def test_the_threshold_is_what_the_documentation_says() -> None:
    assert FILTER_THRESHOLD == 2**-12


def test_the_threshold_does_not_depend_on_token_weights_or_chunks() -> None:
    hidden, weight, target = make_case()
    rule = make_feedback("dense", HIDDEN, VOCAB)

    def grad(**options: object) -> Tensor:
        total = torch.zeros_like(weight)
        exit_step(hidden, weight, target, feedback=rule, grad_weight=total, weight_grad="filtered", **options)
        return total

    once = grad(reduction="sum")
    tiny = torch.full((NUM_TOKENS,), 1e-6, dtype=torch.float64)
    assert torch.allclose(1e6 * grad(reduction="sum", token_weight=tiny), once)
    assert torch.allclose(grad(reduction="sum", chunk_bytes=2 * VOCAB * 8), once)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"preset": "memory"}, "preset"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"weight_grad": "some"}, "some"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, object], names: str) -> None:
    hidden, weight, target = make_case()
    rule = make_feedback("dense", HIDDEN, VOCAB)
    with pytest.raises(ValueError, match=rf"weight_grad.*{names}"):
        exit_cross_entropy(hidden, weight, target, feedback=rule, **{"weight_grad": "filtered", **options})
