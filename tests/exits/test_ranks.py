"""Exits whose batch is shared by ranks: every rule computes what one process computes on the whole batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from helpers.ranks import run_ranks
from localexit import (
    DataParallel,
    VocabParallel,
    WeightMirror,
    exit_cross_entropy,
    exit_step,
    feedback_names,
    make_feedback,
)
from localexit.exits.ranks import choose_among_ranks
from localexit.feedback.draws import choice_keys

NUM_ROWS, WIDTH, VOCAB = 24, 8, 61


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets of the whole batch; half of the first rank's tokens are ignored."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(NUM_ROWS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    target = torch.randint(VOCAB, (NUM_ROWS,), generator=generator)
    target[: NUM_ROWS // 4] = -100
    return hidden, weight, target


def rule(name: str) -> Any:
    options: dict[str, int] = {"anchors": {"num_anchors": 6}, "mirror": {"num_pairs": 6}}.get(name, {})
    made = make_feedback(name, WIDTH, VOCAB, seed=3, **options).double()
    if isinstance(made, WeightMirror):
        made.rows.normal_(generator=torch.Generator().manual_seed(2))
    return made


def one_exit(name: str, *, is_autograd: bool, data_parallel: DataParallel | None = None) -> dict[str, Tensor]:
    """Loss, feedback and dW of this rank's part, and the mirror after its update; numbers as means over ranks."""
    hidden, weight, target = problem()
    rank, size = (0, 1) if data_parallel is None else (data_parallel.rank, data_parallel.size)
    rows = slice(rank * NUM_ROWS // size, (rank + 1) * NUM_ROWS // size)
    made = rule(name)
    options: dict[str, Any] = {"feedback": made, "first_row": rows.start, "data_parallel": data_parallel}
    if is_autograd:
        mine, weight = hidden[rows].requires_grad_(), weight.requires_grad_()
        loss = exit_cross_entropy(mine, weight, target[rows], **options)
        loss.backward()
        feedback, grad = mine.grad, weight.grad
    else:
        grad = torch.zeros_like(weight)
        step = exit_step(hidden[rows], weight, target[rows], grad_weight=grad, **options)
        loss, feedback = step.loss, step.feedback
    made.update()
    assert feedback is not None
    assert grad is not None
    shared = torch.cat([loss.detach().reshape(1), grad.flatten()])
    if data_parallel is not None:
        shared = data_parallel.mean(shared)
    # A rank's feedback is that of its own loss, which counts 1 / size in the mean.
    return {"shared": shared, "feedback": feedback / size, "state": getattr(made, "rows", torch.empty(0))}


def all_exits() -> dict[tuple[str, bool], dict[str, Tensor]]:
    data_parallel = DataParallel() if dist.is_initialized() else None
    return {
        (name, is_autograd): one_exit(name, is_autograd=is_autograd, data_parallel=data_parallel)
        for name in feedback_names()
        for is_autograd in (False, True)
    }


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_compute_what_one_process_does(num_ranks: int) -> None:
    alone = all_exits()
    ranks = run_ranks(all_exits, num_ranks)
    for key, expected in alone.items():
        parts = [rank[key] for rank in ranks]
        for part in parts:
            torch.testing.assert_close(part["shared"], expected["shared"], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(part["state"], expected["state"], rtol=1e-9, atol=1e-12)
        feedback = torch.cat([part["feedback"] for part in parts])
        torch.testing.assert_close(feedback, expected["feedback"], rtol=1e-9, atol=1e-12)


def fewer_tokens_than_anchors() -> Tensor:
    """One token counts on the first rank, none on the second, and four anchors are wanted."""
    data_parallel = DataParallel()
    hidden, weight, _ = problem()
    target = torch.full((3,), -100)
    target[: 1 - data_parallel.rank] = 5
    made = make_feedback("anchors", WIDTH, VOCAB, num_anchors=4).double()
    mine = hidden[3 * data_parallel.rank :][:3].requires_grad_()
    loss, stats = exit_cross_entropy(
        mine,
        weight,
        target,
        feedback=made,
        first_row=3 * data_parallel.rank,
        data_parallel=data_parallel,
        return_stats=True,
    )
    loss.backward()
    assert int(stats.num_anchors) == 1
    assert mine.grad is not None
    return mine.grad


def test_a_rank_without_tokens() -> None:
    first, second = run_ranks(fewer_tokens_than_anchors, 2)
    assert first[0].any()
    assert not first[1:].any()
    assert not second.any()


@pytest.mark.parametrize("ranks", [None, SimpleNamespace(gather=lambda part: part)], ids=["alone", "a rank"])
def test_a_first_token_that_is_ignored_is_not_chosen(ranks: Any) -> None:
    is_counted = torch.tensor([False, True, True])
    keys = choice_keys(3, torch.tensor(0), 0, is_counted)
    chosen = choose_among_ranks(torch.ones(3, WIDTH), keys, 3, ranks)
    assert chosen.is_counted.tolist() == [True, True, False]
    assert chosen.hidden[:, 0].tolist() == [1, 1, 0]


def test_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match="start the script with torchrun"):
        DataParallel()
    with pytest.raises(ValueError, match="start the script with torchrun"):
        VocabParallel(vocab_size=VOCAB)


def make_one_of_a_foreign_group() -> str:
    group = dist.new_group([0])
    if dist.get_rank() == 0:
        return str(DataParallel(group=group).size)
    with pytest.raises(ValueError, match="not in the group"):
        DataParallel(group=group)
    return "refused"


def test_refuses_a_group_without_this_process() -> None:
    assert run_ranks(make_one_of_a_foreign_group, 2) == ["1", "refused"]


def make_one_of_no_group() -> None:
    with pytest.raises(TypeError, match="ProcessGroup or None, got int"):
        DataParallel(group=3)  # type: ignore[arg-type]


def test_refuses_what_is_no_group() -> None:
    run_ranks(make_one_of_no_group, 1)
