"""The audit for locality passes on attached models, and notices units that hear of each other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from local.decoders import DECODERS, WIDTH, Block, PlainDecoder, batch, build
from local.rules import attached
from localexit.local import LocalModel
from localexit.measure import LocalityAudit, audit_locality

MODES = ("deferred", "stream")


def audit(model: nn.Module, rule: str = "dense", **options: Any) -> LocalityAudit:
    return audit_locality(attached(model, rule, **options), *batch())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DECODERS)
def test_attached_models_are_local(name: str, mode: str) -> None:
    result = audit(build(name), backward=mode)
    assert result.num_units == 3
    assert result.passed


@pytest.mark.parametrize("rule", ["mirror_sampled", "anchors", "anchors_shared", "parallel_gold", "transport"])
def test_with_other_rules(rule: str) -> None:
    assert audit(build("plain"), rule).passed


def test_an_audit_forgets_what_was_measured_before_and_leaves_nothing_measured() -> None:
    """Rows from before are not of the audited tokens, and those of the audit are nothing to train with."""
    local = attached(build("plain"), "anchors_shared", backward="stream")
    ids, labels = batch()
    local(ids.flip(0), labels.flip(0))
    assert audit_locality(local, ids, labels) == audit(build("plain"), "anchors_shared", backward="stream")
    assert local.feedback.measured is None


def test_units_of_several_blocks_and_tied_embeddings() -> None:
    result = audit(build("gpt2", 4, is_tied=True), exits="every:2")
    assert (result.num_units, result.passed) == (2, True)


def test_one_unit_alone_is_local() -> None:
    assert audit(build("plain", 1)).passed


@pytest.mark.parametrize("mode", MODES)
def test_everything_is_as_before_afterwards(mode: str) -> None:
    local = attached(build("plain"), "dense", backward=mode, exit_weights=(1.0, 0.5, 2.0)).eval()
    local.model.norm.train()
    local.model.head.weight.grad = torch.ones_like(local.model.head.weight)
    state = copy.deepcopy(local.state_dict())
    random_state = torch.get_rng_state()
    audit_locality(local, *batch())
    assert all(torch.equal(tensor, state[key]) for key, tensor in local.state_dict().items())
    assert [key for key, p in local.named_parameters() if p.grad is not None] == ["model.head.weight"]
    assert torch.equal(local.model.head.weight.grad, torch.ones_like(local.model.head.weight))
    assert [module for module in local.modules() if module.training] == [local.model.norm]
    assert local.exit_weights == (1.0, 0.5, 2.0)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_dropout_is_the_same_in_every_step() -> None:
    model = build("plain")
    model.blocks[1].mix = nn.Sequential(model.blocks[1].mix, nn.Dropout(0.5))
    assert audit(model).passed


class Peeking(Block):
    """Reads a number off a later block's parameters."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.later: list[Block] = []

    def forward(self, hidden: Tensor, decay: Tensor) -> Tensor:
        return super().forward(hidden + self.later[0].up.weight.detach().mean(), decay)


def test_a_unit_that_reads_a_later_units_parameters_is_noticed() -> None:
    model = PlainDecoder(3).double()
    model.blocks[0] = Peeking(WIDTH).double()
    model.blocks[0].later.append(model.blocks[2])
    result = audit(model.train())
    assert result.heard_parameters == ((0, 2), (1, 2))
    assert result.heard_losses == ()
    assert not result.passed


def leak(source: nn.Parameter, into: nn.Parameter) -> None:
    """From now on the gradient of one parameter is added to another's."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        amount = torch.full_like(into, float(parameter.grad.sum()))
        into.grad = amount if into.grad is None else into.grad + amount

    source.register_post_accumulate_grad_hook(add)


def test_a_gradient_that_crosses_units_is_noticed() -> None:
    model = build("plain")
    leak(model.blocks[2].up.weight, model.blocks[0].up.bias)
    result = audit(model)
    assert (0, 2) in result.heard_losses
    assert (0, 2) in result.heard_parameters
    assert not result.passed


def test_a_unit_that_does_not_learn_is_noticed() -> None:
    """A mirror feeds nothing back before its first update."""
    local = attached(build("plain"), "mirror")
    local.feedback.rows.zero_()
    result = audit_locality(local, *batch())
    assert result.deaf == (0, 1, 2)
    assert not result.passed


def test_a_frozen_unit_need_not_learn() -> None:
    model = build("plain")
    model.blocks[1].requires_grad_(False)
    assert audit(model).passed


class Noisy(Block):
    """Random numbers of its own, which no seed reaches."""

    generator = torch.Generator().manual_seed(0)

    def forward(self, hidden: Tensor, decay: Tensor) -> Tensor:
        return super().forward(hidden + torch.randn(hidden.shape, generator=self.generator), decay)


def test_a_model_that_is_not_reproducible_cannot_pass() -> None:
    model = PlainDecoder(3).double()
    model.blocks[0] = Noisy(WIDTH).double()
    result = audit(model.train())
    assert not result.is_reproducible
    assert not result.passed


def test_labels_that_do_not_fit_are_refused_and_nothing_is_left_changed() -> None:
    local: LocalModel = attached(build("plain"), "dense").eval()
    ids, labels = batch()
    with pytest.raises(ValueError, match="labels have shape"):
        audit_locality(local, ids, labels[:, :3])
    assert not local.training
