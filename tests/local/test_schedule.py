"""Exits that take part in some steps, or see some tokens: cheaper, and unbiased; and the warm-up of their weights."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localexit
from local.decoders import batch, build, count_hooks, gradients
from local.explicit import parts_of
from local.rules import attached
from localexit import exit_cross_entropy
from localexit.feedback.draws import SEEN_STREAM, choose_exits, choose_rows
from localexit.local import ExitSchedule, LocalModel, attach

MODES = ("stream", "deferred")


def train(local: LocalModel, ids: Tensor, labels: Tensor, **inputs: Tensor) -> Tensor:
    out = local(ids, labels, **inputs)
    if local.backward_mode == "deferred":
        out.loss.backward()
    return out.exit_losses


def test_every_choice_of_exits_is_as_likely() -> None:
    counts = Counter(choose_exits(7, step, 2, 4) for step in range(3000))
    assert set(counts) == set(combinations(range(4), 2))
    # 3000 draws of 6 equally likely choices: 500 each, standard deviation 20.
    assert all(abs(count - 500) < 100 for count in counts.values())
    assert [choose_exits(8, step, 2, 4) for step in range(20)] != [choose_exits(7, step, 2, 4) for step in range(20)]
    assert choose_exits(7, 0, 4, 4) == (0, 1, 2, 3)


@pytest.mark.parametrize("mode", MODES)
def test_an_exit_that_sits_out_leaves_its_unit_alone_and_the_others_as_they_were(mode: str) -> None:
    ids, labels = batch()
    everybody, model = build("plain"), build("plain")
    expected_losses = train(attached(everybody, backward=mode), ids, labels)
    local = attached(model, backward=mode, schedule=ExitSchedule(exits_per_step=1))
    chosen = choose_exits(local.feedback.seed, 0, 1, 3)[0]
    losses = train(local, ids, labels)
    assert [bool(torch.isnan(loss)) for loss in losses] == [index != chosen for index in range(3)]
    torch.testing.assert_close(losses[chosen], expected_losses[chosen])
    for index, block in enumerate(model.blocks):
        for parameter, reference in zip(block.parameters(), everybody.blocks[index].parameters(), strict=True):
            if index == chosen:
                torch.testing.assert_close(parameter.grad, 3 * reference.grad)
            else:
                assert parameter.grad is None


@pytest.mark.parametrize(("mode", "function"), [("stream", "exit_step"), ("deferred", "exit_cross_entropy")])
def test_an_exit_that_sits_out_is_not_called(mode: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def watched(*arguments: Any, **options: Any) -> Any:
        called.append(options["exit_index"])
        return original(*arguments, **options)

    original = getattr(localexit, function)
    monkeypatch.setattr(f"localexit.local.steps.{function}", watched)
    local = attached(build("plain"), backward=mode, schedule=ExitSchedule(exits_per_step=1))
    for step in range(4):
        train(local, *batch())
        local.update()
        assert called == [choose_exits(local.feedback.seed, at, 1, 3)[0] for at in range(step + 1)]


def test_nothing_runs_behind_the_last_exit_that_takes_part() -> None:
    model = build("plain", 4)
    local = attached(model, schedule=ExitSchedule(exits_per_step=1), backward="stream")
    ran: list[int] = []
    for index, block in enumerate(model.blocks):
        block.up.register_forward_hook(lambda *_, index=index: ran.append(index))
    seen = set()
    for step in range(12):
        ran.clear()
        local(*batch())
        chosen = choose_exits(local.feedback.seed, step, 1, 4)[0]
        assert ran == list(range(chosen + 1))
        seen.add(chosen)
        local.update()
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("mode", MODES)
def test_over_all_choices_of_exits_the_mean_gradient_is_that_of_all(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from localexit.local import schedule

    ids, labels = batch()
    reference, model = build("plain", 4), build("plain", 4)
    train(attached(reference, backward=mode), ids, labels)
    local = attached(model, backward=mode, schedule=ExitSchedule(exits_per_step=2))
    choices = list(combinations(range(4), 2))
    for choice in choices:
        monkeypatch.setattr(schedule, "choose_exits", lambda *_, choice=choice: choice)
        train(local, ids, labels)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient / len(choices), gradients(reference)[name])


def explicit_subsample(model: nn.Module, ids: Tensor, labels: Tensor, num: int, seed: int) -> list[Tensor]:
    """A loop over the blocks with exact exits that each see `num` of the tokens, all of which count alike."""
    parts = parts_of("plain", model)
    target = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1).flatten()
    hidden, extras = parts.embed(ids)
    losses = []
    for index, block in enumerate(parts.blocks):
        hidden = parts.run(block, hidden, *extras)
        rows = choose_rows(seed, torch.tensor(0), index, target != -100, num, 0, SEEN_STREAM)
        logits = parts.head(parts.norm(hidden).flatten(0, 1)[rows])
        losses.append(nn.functional.cross_entropy(logits, target[rows]))
        losses[-1].backward()
        hidden, extras = hidden.detach(), tuple(extra.detach() for extra in extras)
    return losses


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9, 1e-6])
def test_subsampled_exits_equal_an_explicit_loop(share: float, mode: str) -> None:
    """14 tokens of which 11 count: also one token, and more tokens than count."""
    ids, labels = batch()
    reference, model = build("plain"), build("plain")
    local = attached(model, backward=mode, schedule=ExitSchedule(token_share=share))
    expected = explicit_subsample(reference, ids, labels, max(1, round(14 * share)), local.feedback.seed)
    torch.testing.assert_close(train(local, ids, labels), torch.stack(expected).detach())
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(gradients(model)[name], gradient)


def test_the_exit_computes_only_with_the_tokens_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    from localexit.local import steps

    seen: list[int] = []
    whole = steps.exit_step

    def recording(normed: Tensor, *args: object, **options: object) -> object:
        seen.append(normed.shape[:-1].numel())
        return whole(normed, *args, **options)

    monkeypatch.setattr(steps, "exit_step", recording)
    model = build("plain")
    normed: list[int] = []
    model.norm.register_forward_hook(lambda _m, args, _o: normed.append(args[0].shape[:-1].numel()))
    local = attached(model, backward="stream", schedule=ExitSchedule(token_share=0.25))
    normed.clear()
    local(*batch(rows=4, length=8))
    assert seen == normed == [8, 8, 8]


def test_the_mean_over_draws_of_tokens_is_the_loss_and_gradient_of_all() -> None:
    ids, labels = batch()
    weight = torch.rand(2, 7, dtype=torch.float64)
    reference, model = build("plain", 1), build("plain", 1)
    expected = train(attached(reference, backward="stream"), ids, labels, token_weight=weight)
    local = attached(model, backward="stream", schedule=ExitSchedule(token_share=0.3))
    losses = []
    for _ in range(600):
        losses.append(train(local, ids, labels, token_weight=weight))
        local.update()
    losses = torch.stack(losses)
    error = losses.std() / 600**0.5
    assert abs(losses.mean() - expected[0]) < 4 * error < 0.1
    drawn, whole = (torch.cat([g.flatten() for g in gradients(m).values()]) for m in (model, reference))
    assert (drawn / 600 - whole).norm() < 0.1 * whole.norm()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", [ExitSchedule(token_share=0.4), ExitSchedule(exits_per_step=2)])
def test_draws_are_those_of_the_step_and_not_of_the_call(schedule: ExitSchedule, mode: str) -> None:
    ids, labels = batch()
    found = []
    for _ in range(2):
        local = attached(build("plain"), backward=mode, schedule=schedule)
        steps = []
        for _ in range(5):
            steps.append(train(local, ids, labels))
            local.update()
        found.append(torch.stack(steps))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0, equal_nan=True)
    assert len({tuple(step.nan_to_num().tolist()) for step in found[0]}) > 1


def test_the_draws_of_a_step_are_saved_with_the_rule() -> None:
    schedule = ExitSchedule(exits_per_step=1, token_share=0.5)
    local, other = (attached(build("plain"), backward="stream", schedule=schedule) for _ in range(2))
    local.update()
    local.update()
    other.load_state_dict(local.state_dict())
    assert torch.equal(train(local, *batch()).nan_to_num(), train(other, *batch()).nan_to_num())


@pytest.mark.parametrize("mode", MODES)
def test_warm_up_raises_each_exits_weight_linearly(mode: str) -> None:
    ids, labels = batch()
    reference = build("plain")
    train(attached(reference, backward=mode), ids, labels)
    model = build("plain")
    local = attached(model, backward=mode, exit_weights=(1.0, 2.0, 1.0), schedule=ExitSchedule(warmup=(0, 4, 2)))
    for expected in [(1.0, 0.5, 0.5), (1.0, 1.0, 1.0), (1.0, 1.5, 1.0), (1.0, 2.0, 1.0), (1.0, 2.0, 1.0)]:
        model.zero_grad()
        train(local, ids, labels)
        for block, whole, weight in zip(model.blocks, reference.blocks, expected, strict=True):
            torch.testing.assert_close(block.up.weight.grad, weight * whole.up.weight.grad)
        local.update()


def test_one_number_of_warm_up_steps_is_for_all_exits() -> None:
    assert ExitSchedule(warmup=4).weights((1.0, 2.0), seed=0, step=1) == (0.5, 1.0)
    assert ExitSchedule().weights((1.0, 2.0), seed=0, step=1) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"exits_per_step": 0}, ValueError, "exits_per_step must be at least 1, got 0"),
        ({"exits_per_step": 1.5}, TypeError, "exits_per_step must be an integer"),
        ({"token_share": 0.0}, ValueError, r"token_share must be in \(0, 1\], got 0.0"),
        ({"token_share": 1.1}, ValueError, "token_share"),
        ({"token_share": "half"}, TypeError, "token_share must be a number"),
        ({"warmup": -1}, ValueError, "warmup must be at least 0"),
        ({"warmup": (1, -1)}, ValueError, "warmup must be at least 0"),
    ],
)
def test_bad_schedules(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ExitSchedule(**options)


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (ExitSchedule(exits_per_step=4), {}, "exits_per_step must be at most 3, the number of exits, got 4"),
        (ExitSchedule(warmup=(1, 2)), {}, r"one number of steps or 3, one per exit, got \[1, 2\]"),
        (ExitSchedule(exits_per_step=1), {"backward": "direct"}, "exits_per_step is not for backward='direct'"),
    ],
)
def test_schedules_that_do_not_fit_the_model(schedule: ExitSchedule, options: dict[str, str], message: str) -> None:
    model = build("plain")
    with pytest.raises(ValueError, match=message):
        attach(model, feedback="dense", schedule=schedule, **options)
    assert count_hooks(model) == 0


@pytest.mark.parametrize("share", [1.0, 0.5, 1e-9])
def test_a_single_label_is_seen_and_counts_as_one(share: float) -> None:
    """Whatever the share, each exit sees a token at least, and one that counts where there is one."""
    model = build("plain")
    ids, _ = batch()
    labels = torch.full_like(ids, -100)
    labels[1, 4] = 9
    expected = nn.functional.cross_entropy(model(ids)[1, 3], torch.tensor(9)).detach()
    losses = train(attached(model, schedule=ExitSchedule(token_share=share)), ids, labels)
    torch.testing.assert_close(losses[-1], expected)


@pytest.mark.parametrize(("share", "expected"), [(1e-9, 1), (0.1, 1), (0.25, 4), (0.99, 14)])
def test_how_many_of_14_tokens_are_seen(share: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(hidden: Tensor, *arguments: object, **options: object) -> Tensor:
        seen.append(hidden.shape[:-1].numel())
        return exit_cross_entropy(hidden, *arguments, **options)

    monkeypatch.setattr("localexit.local.steps.exit_cross_entropy", watched)
    train(attached(build("plain"), schedule=ExitSchedule(token_share=share)), *batch())
    assert seen == [expected] * 3


def test_all_exits_may_take_part_in_every_step() -> None:
    local = attached(build("plain"), schedule=ExitSchedule(exits_per_step=3))
    assert local.step_weights() == attached(build("plain")).step_weights()
