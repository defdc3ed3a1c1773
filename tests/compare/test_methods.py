"""What a method is written as, and what it makes of a configuration."""

from __future__ import annotations

import pytest

from localexit.compare.methods import CONTROLS, SAME_FOR_ALL, Method, method_names
from localexit.feedback import feedback_names
from localexit.train.config import TrainConfig

BASE = TrainConfig(model="mini", lr=1e-3)


def test_every_rule_and_the_controls() -> None:
    assert method_names() == (*feedback_names(), "backprop", "backprop_all", "direct", "frozen")


@pytest.mark.parametrize(
    "text",
    [
        "mirror_sampled:topk=8,num_draws=4@lr=0.002,exits=every:2",
        "direct",
        "backprop@clip=2",
        "transport@exit_weights=0.5/1/2",
        "mirror@exit_body=block",
    ],
)
def test_written_form_reads_back(text: str) -> None:
    assert str(Method.parse(text)) == text
    assert Method.parse(str(Method.parse(text))) == Method.parse(text)


def test_own_settings_win_over_tuned_ones_and_those_over_the_base() -> None:
    tuned = {"lr": 5e-3, "unembedding_std": 0.1}
    config = Method.parse("anchors:num_anchors=7@lr=0.25").config(BASE, tuned)
    assert (config.lr, config.unembedding_std, str(config.feedback)) == (0.25, 0.1, "anchors:num_anchors=7")
    assert Method.parse("anchors").config(BASE, tuned).lr == 5e-3


@pytest.mark.parametrize("name", method_names())
def test_methods_differ_in_what_they_name_alone(name: str) -> None:
    config, expected = Method.parse(name).config(BASE, {}).to_json(), BASE.to_json()
    fixed = CONTROLS[name].settings if name in CONTROLS else {}
    assert {key for key in expected if config[key] != expected[key]} <= {"feedback", *fixed}
    assert config == {**expected, "feedback": config["feedback"], **fixed}


def test_controls() -> None:
    assert Method.parse("backprop").config(BASE, {}).exits == "-1"
    assert Method.parse("backprop_all").config(BASE, {}).backward == "joint"
    assert Method.parse("frozen").config(BASE, {}).train_blocks is False
    direct = Method.parse("direct").config(BASE, {})
    assert (direct.backward, str(direct.feedback)) == ("direct", "dense:rank=128")
    assert str(Method.parse("direct:rank=4").config(BASE, {}).feedback) == "dense:rank=4"


def test_exits_with_a_block_of_their_own() -> None:
    assert Method.parse("mirror@exit_body=block").config(BASE, {}).exit_body == "block"
    with pytest.raises(ValueError, match="exit_body must be one of 'norm', 'mlp', 'block', got 'blocks'"):
        Method.parse("mirror@exit_body=blocks").config(BASE, {})


def test_several_numbers() -> None:
    assert Method.parse("transport@exit_weights=0.5/1/2").config(BASE, {}).exit_weights == (0.5, 1.0, 2.0)


def test_exits_are_text_though_they_look_like_numbers() -> None:
    assert Method.parse("transport@exits=2").config(BASE, {}).exits == "2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mirrors", "method must be one of"),
        ("dense:topk=3", "has no option 'topk'"),
        ("dense@steps=3", "setting of method 'dense' must be one of"),
        ("dense:rank", "got 'dense:rank'"),
        ("dense@lr", "got 'dense@lr'"),
        ("backprop:rank=3", "has no option 'rank'"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Method.parse(text)


def test_what_makes_runs_comparable_is_no_setting() -> None:
    assert {"data", "steps", "seed", "batch_size", "context", "model", "precision"} <= SAME_FOR_ALL
    for name in ("steps", "seed", "data"):
        with pytest.raises(ValueError, match="setting"):
            Method.parse(f"dense@{name}=1")
