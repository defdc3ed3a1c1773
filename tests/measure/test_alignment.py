"""Every number of the diagnosis against a case worked out by hand, or by an independent computation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from local.decoders import WIDTH, batch, build
from local.explicit import parts_of
from local.rules import attached
from localexit.feedback import Dense, Feedback, SharedAnchors, Sketch, WeightMirror, feedback_names, make_feedback
from localexit.feedback.shared import MeasuredRows
from localexit.local import LocalModel
from localexit.measure import Diagnostician, diagnose
from localexit.measure.alignment import _Sums, block_parameters, stand_in


def sums_of(feedback: Tensor, exact: Tensor) -> _Sums:
    sums = _Sums([])
    sums.add_tokens(feedback, exact)
    return sums


def test_numbers_of_two_tokens() -> None:
    """f = (3, 4), (0, 2) and g = (4, 3), (2, 0): cosines 24/25 and 0, ‖f‖ = ‖g‖ = √29.

    Sums (3, 6) and (6, 3): the difference (-3, 3) against (6, 3).
    """
    found = sums_of(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[4.0, 3.0], [2.0, 0.0]])).diagnosis(7)
    assert found.exit == 7
    assert found.feedback_cosine == pytest.approx(0.48)
    assert found.norm_ratio == pytest.approx(1.0)
    assert found.bias_ratio == pytest.approx(math.sqrt(18 / 45))
    assert (found.gradient_cosine, found.batch_gradient_cosine) == (0.0, 0.0)


def test_batches_are_added_up() -> None:
    """Gradients (1, 0), (1, 1) against (1, 0), (1, -1): batch cosines 1 and 0, sums (2, 1) and (2, -1): 3/5."""
    sums = sums_of(torch.tensor([[6.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    sums.add_tokens(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    sums.add_gradients(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    sums.add_gradients(torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0]))
    found = sums.diagnosis(0)
    assert found.feedback_cosine == pytest.approx(0.5)
    assert found.norm_ratio == pytest.approx(6 / math.sqrt(8))
    assert found.bias_ratio == pytest.approx(math.sqrt(16 + 4) / math.sqrt(8))
    assert found.batch_gradient_cosine == pytest.approx(0.5)
    assert found.gradient_cosine == pytest.approx(0.6)


def test_nothing_fed_back_has_nothing_in_common() -> None:
    found = sums_of(torch.zeros(2, 3), torch.ones(2, 3)).diagnosis(0)
    assert (found.feedback_cosine, found.norm_ratio, found.bias_ratio) == (0.0, 0.0, 1.0)


class Scaled(Feedback):
    """The exact gradient times a factor: everything about it is known."""

    options = ("factor",)
    codes = ("rows",)
    needs_weight = True
    name = "scaled"

    def __init__(self, factor: float) -> None:
        super().__init__(hidden_size=WIDTH, vocab_size=37, seed=0)
        self.factor = factor

    def prepare(self, anchors: object, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (self.rows.to(dtype),)  # type: ignore[operator]

    def forward(self, error: object, tokens: object, prepared: tuple[Tensor, ...]) -> Tensor:
        return self.factor * error.matmul(prepared[0])  # type: ignore[attr-defined]


@pytest.mark.parametrize("factor", [0.5, -2.0])
def test_a_scaled_exact_gradient(factor: float) -> None:
    from localexit.local import attach

    local = attach(build("plain"), feedback=Scaled(factor))
    for found in diagnose(local, batch()[0]).exits:
        sign = math.copysign(1, factor)
        assert found.feedback_cosine == pytest.approx(sign)
        assert found.norm_ratio == pytest.approx(abs(factor))
        assert found.bias_ratio == pytest.approx(abs(factor - 1))
        assert found.gradient_cosine == pytest.approx(sign)
        assert found.batch_gradient_cosine == pytest.approx(sign)


def explicit_gradients(rule_name: str, ids: Tensor, labels: Tensor, *, exact: bool) -> list[Tensor]:
    """Per block: its gradient in the explicit loop over blocks, with a rule or with exact gradients."""
    from local.explicit import explicit_step

    model = build("plain")
    rule = attached(build("plain"), rule_name).feedback
    parts = parts_of("plain", model)
    explicit_step(parts, ids, labels, make_feedback("transport", WIDTH, 37) if exact else rule)
    return [torch.cat([p.grad.flatten() for p in block.parameters()]) for block in parts.blocks]


@pytest.mark.parametrize("mode", ["deferred", "stream"])
@pytest.mark.parametrize("rule_name", ["dense", "mirror", "anchors", "hybrid"])
def test_block_gradients_are_those_of_the_explicit_loop(rule_name: str, mode: str) -> None:
    ids, labels = batch()
    ours = explicit_gradients(rule_name, ids, labels, exact=False)
    exact = explicit_gradients(rule_name, ids, labels, exact=True)
    found = diagnose(attached(build("plain"), rule_name, backward=mode), ids, labels)
    for index, exit_ in enumerate(found.exits):
        expected = float(torch.cosine_similarity(ours[index], exact[index], dim=0))
        assert exit_.gradient_cosine == pytest.approx(expected, abs=1e-6)
        assert abs(exit_.gradient_cosine) < 0.9999


def test_embeddings_are_no_block() -> None:
    local = attached(build("plain"))
    names = {id(p): name for name, p in local.model.named_parameters()}
    assert {names[id(p)].split(".")[0] for p in block_parameters(local, 0)} == {"blocks"}


def state(local: LocalModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in local.state_dict().items()}


@pytest.mark.parametrize("rule_name", feedback_names())
def test_measuring_changes_nothing(rule_name: str) -> None:
    ids, labels = batch()
    seen, unseen = (attached(build("plain"), rule_name, backward="stream").train() for _ in range(2))
    for local in (seen, unseen):
        local(ids, labels)
        if local is seen:
            diagnose(local, ids, labels)
        local.update()
        local(ids, labels)
    for name, tensor in state(unseen).items():
        assert torch.equal(state(seen)[name], tensor), name
    for (name, ours), (_, theirs) in zip(seen.named_parameters(), unseen.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name
    assert all(module.training for module in seen.modules())


def test_batches_draw_anew() -> None:
    """With the same draws for every batch, a batch twice would be the same as once; noise would never average out."""
    ids, labels = batch()
    local = attached(build("plain"), "mirror_sampled")
    local.feedback.topk = 0
    many = Diagnostician(local)
    for _ in range(32):
        many.add(ids, labels)
    result = many.result()
    assert result.num_batches == 32
    assert result.num_tokens == 32 * int((labels[:, 1:] != -100).sum())
    once = diagnose(local, ids, labels)
    assert result.exits[-1].batch_gradient_cosine != pytest.approx(once.exits[-1].batch_gradient_cosine, abs=1e-9)


def test_shared_anchors_are_those_of_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured once a batch, by its first exit, apart from what a training step under way has measured."""
    (ids, labels), local = batch(), attached(build("plain"), "anchors_shared")
    local(ids, labels)
    kept, measured = local.feedback.measured, []
    solved = SharedAnchors.solved

    def counted(self: SharedAnchors, hidden: Tensor, *arguments: Any, **options: Any) -> MeasuredRows:
        measured.append(hidden)
        return solved(self, hidden, *arguments, **options)

    monkeypatch.setattr(SharedAnchors, "solved", counted)
    diagnostician = Diagnostician(local.eval())
    for _ in range(2):
        diagnostician.add(ids, labels)
    assert len(measured) == 2
    assert not torch.equal(*measured)
    assert local.feedback.measured is kept
    assert not local.feedback.training


def test_what_stands_in_for_w() -> None:
    dense = Dense(WIDTH, 37, rank=5, gain=0.5)
    torch.testing.assert_close(stand_in(dense), 0.5 * dense.codebook @ dense.expander.T)
    sketch = Sketch(WIDTH, 37, rank=5)
    expected = sketch.sign[:, None] * sketch.expander.T[sketch.bucket.long()]
    torch.testing.assert_close(stand_in(sketch), expected)
    mirror = WeightMirror(WIDTH, 37, sampled=True)
    mirror.rows.normal_()
    assert torch.equal(stand_in(mirror), mirror.rows)
    for name in ("transport", "transport_sampled", "anchors", "anchors_shared", "hybrid", "parallel", "parallel_gold"):
        assert stand_in(make_feedback(name, WIDTH, 37)) is None


def test_distance_of_a_mirror() -> None:
    local = attached(build("plain"), "mirror")
    with torch.no_grad():
        local.feedback.rows.copy_(1.5 * local.unembedding.weight)
    found = diagnose(local, batch()[0])
    assert found.rows_error == pytest.approx(0.5, rel=1e-6)
    assert found.rows_cosine == pytest.approx(1.0)
    dense = diagnose(attached(build("plain"), "dense"), batch()[0])
    assert dense.rows_error is None
    assert dense.rows_cosine is not None
    assert abs(dense.rows_cosine) < 0.3


def test_frozen_blocks_have_no_gradient_to_judge() -> None:
    local = attached(build("plain"))
    local.model.blocks.requires_grad_(False)
    found = diagnose(local, batch()[0])
    assert found.exits[1].gradient_cosine == 0.0
    assert found.exits[1].feedback_cosine == pytest.approx(1.0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one, got none"):
        Diagnostician(attached(build("plain"))).result()
    with pytest.raises(ValueError, match="backward='joint'"):
        diagnose(attached(build("plain"), backward="joint"), batch()[0])


def test_json_has_every_number() -> None:
    found = diagnose(attached(build("plain"), "mirror"), batch()[0])
    content = found.to_json()
    assert content["rows_error"] == found.rows_error
    assert [exit_["gradient_cosine"] for exit_ in content["exits"]] == [e.gradient_cosine for e in found.exits]
