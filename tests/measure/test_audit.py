"""The audit of a whole model, on copies, as a table."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from helpers.cases import RULES
from local.decoders import DECODERS, VOCAB, WIDTH, batch, build
from localexit import ExitSchedule, StepInBackward, attach, make_feedback
from localexit.measure import audit_attached, audit_locality, audit_model
from localexit.measure.checks import Check, table


@pytest.mark.parametrize("name", RULES)
def test_every_rule_on_a_plain_model(name: str) -> None:
    report = audit_model(build("plain"), name)
    assert report.locality.passed
    assert report.transport.feedback == name
    assert report.transport.passed == report.passed == (not name.startswith("transport"))


@pytest.mark.parametrize("backward", ["deferred", "stream"])
@pytest.mark.parametrize("name", DECODERS)
def test_families_and_modes(name: str, backward: str) -> None:
    assert audit_model(build(name), backward=backward).passed


def test_a_model_in_fp32_with_given_tokens_and_exits() -> None:
    ids, labels = batch()
    report = audit_model(
        build("llama", 4).float(), "anchors", input_ids=ids, labels=labels, exits="every:2", exit_norm="copy", seed=3
    )
    assert report.passed
    assert report.locality.num_units == 2


def test_neither_model_nor_rule_is_changed() -> None:
    model, rule = build("plain"), make_feedback("mirror", WIDTH, VOCAB)
    state = copy.deepcopy(model.state_dict())
    assert audit_model(model, rule).passed
    assert "forward" not in model.__dict__
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert int(rule.step) == 0
    assert not rule.rows.any()


def test_an_attached_model_is_audited_as_it_is_and_not_changed() -> None:
    local = attach(build("plain"), feedback="mirror", exits="every:2")
    local(*batch())
    local.update()
    state = copy.deepcopy(local.state_dict())
    report = audit_attached(local)
    assert report.passed
    assert report.locality.num_units == 2
    assert all(torch.equal(tensor, state[key]) for key, tensor in local.state_dict().items())
    assert not any(unit.grad is not None for unit in local.parameters())


def test_no_warning_about_norms() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audit_model(build("plain"), "parallel_gold")


def test_the_report_is_a_table_with_a_verdict() -> None:
    lines = str(audit_model(build("plain"), "dense")).splitlines()
    assert lines[0] == "audit of feedback 'dense' on 3 units: passed"
    assert lines[2].split() == ["check", "measured", "expected"]
    assert len(lines) == 3 + 10
    assert all(line.startswith("ok ") for line in lines[3:])
    failed = str(audit_model(build("plain"), "transport"))
    assert failed.splitlines()[0].endswith("FAILED")
    assert "FAILED  null space: the feedback stays" in failed


def test_columns_are_aligned() -> None:
    checks = [
        Check(name="a", measured="1", expected="one", passed=True),
        Check(name="a long name", measured="1000", expected="a thousand", passed=False),
    ]
    assert table(checks).splitlines() == [
        "        check        measured  expected",
        "ok      a            1         one",
        "FAILED  a long name  1000      a thousand",
    ]


@pytest.mark.parametrize("exit_body", ["mlp", "block"])
def test_exits_that_sit_out_and_steps_in_the_backward_do_not_disturb_an_audit(exit_body: str) -> None:
    local = attach(
        build("plain"),
        feedback="dense",
        backward="stream",
        schedule=ExitSchedule(exits_per_step=1, token_share=0.5),
        exit_body=exit_body,
    )
    stepper = StepInBackward(local, torch.optim.SGD(local.parameters(), lr=0.1))
    state = copy.deepcopy(local.state_dict())
    assert audit_attached(local).passed
    assert audit_locality(local, *batch()).passed
    assert all(torch.equal(tensor, state[name]) for name, tensor in local.state_dict().items())
    assert local.schedule == ExitSchedule(exits_per_step=1, token_share=0.5)
    assert local.in_backward is stepper
