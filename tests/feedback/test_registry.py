"""The rules by name."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from helpers.cases import RULES, SMALL
from localexit import LogitAnchors, exit_cross_entropy, exit_step, feedback_names, make_feedback
from localexit.exits.reference import _EQUATIONS
from localexit.feedback import RULES as TABLE
from localexit.feedback import Error, Tokens, feedback_options


def test_names() -> None:
    assert feedback_names() == (
        "dense",
        "sketch",
        "hybrid",
        "parallel",
        "parallel_gold",
        "parallel_topmass",
        "anchors",
        "anchors_sampled",
        "anchors_shared",
        "mirror",
        "mirror_sampled",
        "transport",
        "transport_sampled",
    )


def test_every_rule_has_an_equation_in_the_oracle() -> None:
    assert set(_EQUATIONS) == set(feedback_names())


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_called_what_it_was_asked_for(name: str) -> None:
    assert make_feedback(name, 40, 11).name == name
    assert TABLE[name].equation
    assert TABLE[name].cost
    assert TABLE[name].state


@pytest.mark.parametrize("name", RULES)
def test_options_are_the_constructor_s(name: str) -> None:
    """Every argument of a rule's class is an option of one of its names, or what its name fixes."""
    sizes = {"self", "hidden_size", "vocab_size", "seed"}
    entry = TABLE[name]
    taken = [key for key in inspect.signature(entry.rule.__init__).parameters if key not in sizes]
    assert set(feedback_options(name)) <= set(taken) - set(entry.fixed)
    named = [other for other in RULES if TABLE[other].rule is entry.rule]
    assert {key for other in named for key in (*feedback_options(other), *TABLE[other].fixed)} == set(taken)


@pytest.mark.parametrize("name", RULES)
def test_every_option_has_an_effect(name: str) -> None:
    """No option is taken and not applied: each one listed changes an attribute or a buffer of the rule."""
    for option in feedback_options(name):
        default, other = make_feedback(name, 40, 11), make_feedback(name, 40, 11, **{option: changed(option)})
        shapes = [{key: tuple(b.shape) for key, b in rule.named_buffers()} for rule in (default, other)]
        assert shapes[0] != shapes[1] or getattr(default, option) != getattr(other, option), option


def changed(option: str) -> float | str:
    others = {"gain": 0.5, "residual_gain": 0.5, "mass_threshold": 0.5, "ridge": 0.5, "storage": "bf16"}
    return others.get(option, 7)


@pytest.mark.parametrize("name", RULES)
def test_only_transport_declares_the_weight(name: str) -> None:
    assert make_feedback(name, 9, 11).needs_weight == name.startswith("transport")


@pytest.mark.parametrize(("name", "option"), [("parallel", "residual"), ("mirror", "sampled"), ("transport", "topk")])
def test_options_the_name_decides_are_refused(name: str, option: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' has no option '{option}'"):
        make_feedback(name, 9, 11, **{option: 1})


def test_the_small_rules_of_the_tests_cover_all() -> None:
    assert tuple(SMALL) == feedback_names()


class Halved(LogitAnchors):
    """A rule defined outside the package."""

    name = "halved"

    def forward(self, error: Error, tokens: Tokens, prepared: tuple[Tensor, ...]) -> Tensor:
        return super().forward(error, tokens, prepared) / 2


def test_a_rule_defined_elsewhere_runs_through_the_exit() -> None:
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(9, 8), torch.randn(40, 8), torch.arange(9)
    whole = exit_step(hidden, weight, target, feedback=LogitAnchors(8, 40)).feedback
    half = exit_step(hidden, weight, target, feedback=Halved(8, 40)).feedback
    assert whole is not None
    assert torch.equal(half, whole / 2)
    leaf = hidden.clone().requires_grad_()
    exit_cross_entropy(leaf, weight, target, feedback=Halved(8, 40)).backward()
    assert torch.equal(leaf.grad, half)


def test_ranks_that_are_left_out() -> None:
    """128 for codes, 32 for the residual, as far as there is room."""
    assert make_feedback("dense", 200, 11).expander.shape == (200, 128)
    assert make_feedback("parallel_gold", 200, 11).residual_base.shape == (200, 32)
    assert make_feedback("parallel_gold", 20, 11).residual_base.shape == (20, 20)


def test_ranks_are_told() -> None:
    assert make_feedback("parallel_gold", 20, 11, residual_rank=7).residual_rank == 7
    assert make_feedback("parallel", 20, 11).residual_rank == 0
    hybrid = make_feedback("hybrid", 20, 11, rank=9, rank_exact=4)
    assert (hybrid.rank, hybrid.rank_exact, hybrid.rank_tail) == (9, 4, 5)
    assert [make_feedback(name, 20, 11, rank=9).rank for name in ("dense", "sketch")] == [9, 9]


def test_what_a_rule_asks_of_the_exit() -> None:
    """More than a rule needs would be measured in vain, and refused by backends that cannot."""
    rules = {name: make_feedback(name, 40, 11) for name in RULES}
    assert {name for name, rule in rules.items() if rule.needs_logits} == {
        "parallel",
        "parallel_gold",
        "parallel_topmass",
    }
    selecting = {"hybrid", "anchors_sampled", "anchors_shared", "mirror_sampled", "transport_sampled"}
    assert {name for name, rule in rules.items() if rule.selects} == selecting
    assert {name for name, rule in rules.items() if not rule.is_additive} == selecting
    assert {name for name, rule in rules.items() if rule.num_draws} == selecting - {"hybrid"}
    assert {name for name, rule in rules.items() if rule.num_anchors} == {
        "anchors",
        "anchors_sampled",
        "anchors_shared",
    }
    assert {name for name, rule in rules.items() if rule.num_pairs} == {"mirror", "mirror_sampled"}


@pytest.mark.parametrize("name", RULES)
def test_the_seed_that_is_left_out_is_zero(name: str) -> None:
    """Made by its class as by its name: what is not asked for repeats."""
    assert make_feedback(name, 40, 11).seed == 0
    assert TABLE[name].rule(40, 11).seed == 0


@pytest.mark.parametrize("name", ["hybrid", "anchors_sampled", "anchors_shared", "mirror_sampled", "transport_sampled"])
def test_gold_alone_may_be_kept_exactly(name: str) -> None:
    assert make_feedback(name, 40, 11, topk=0).topk == 0
