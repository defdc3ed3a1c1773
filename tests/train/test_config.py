from __future__ import annotations

import json
from typing import Any

import pytest

from localexit.feedback import feedback_names
from localexit.train.config import FeedbackSpec, TrainConfig, exit_indices


@pytest.mark.parametrize("name", feedback_names())
def test_a_rule_is_written_by_its_name(name: str) -> None:
    spec = FeedbackSpec.parse(name)
    assert str(spec) == name
    assert spec.build(hidden_size=16, vocab_size=40, seed=0).name == name


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("mirror:num_pairs=32", (("num_pairs", 32),)),
        ("dense:gain=0.5", (("gain", 0.5),)),
        ("anchors:ridge=1e-3,num_anchors=4", (("ridge", 1e-3), ("num_anchors", 4))),
    ],
)
def test_options_of_a_rule_reach_it(text: str, options: tuple[tuple[str, object], ...]) -> None:
    spec = FeedbackSpec.parse(text)
    assert spec.options == options
    assert FeedbackSpec.parse(str(spec)) == spec
    rule = spec.build(hidden_size=16, vocab_size=40, seed=0)
    assert {key: getattr(rule, key) for key, _ in options} == dict(options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mirorr", "feedback must be one of 'dense'"),
        ("", "feedback must be one of"),
        ("dense:rnk=3", "'dense' has no option 'rnk'; expected one of rank"),
        ("dense:rank", "NAME:OPTION=VALUE"),
        ("dense:rank=", "NAME:OPTION=VALUE"),
        ("dense:,", "NAME:OPTION=VALUE"),
        ("dense:rank=3,gain=1,rank=3", "option 'rank' is given twice"),
        ("parallel_gold:residual=topmass", "has no option 'residual'"),
    ],
)
def test_a_bad_rule_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeedbackSpec.parse(text)


def test_a_configuration_survives_json() -> None:
    config = TrainConfig(feedback=FeedbackSpec.parse("mirror:num_pairs=8"), lr=1e-3, betas=(0.8, 0.9), vocab_size=300)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_configuration_of_another_version_names_the_fields() -> None:
    content = TrainConfig().to_json()
    del content["lr"]
    content["velocity"] = 1
    with pytest.raises(ValueError, match=r"lr, velocity"):
        TrainConfig.from_json(content)


def test_a_configuration_of_the_first_version_means_what_it_did() -> None:
    content = TrainConfig(lr=0.5).to_json()
    for field in ("unembedding_std", "unembedding_init", "non_finite", "max_skipped"):
        del content[field]
    assert TrainConfig.from_json(content) == TrainConfig(lr=0.5, non_finite="stop")


def test_differences_name_the_fields_and_leave_the_free_ones_out() -> None:
    config = TrainConfig()
    other = TrainConfig(lr=1e-2, feedback=FeedbackSpec.parse("dense"), threads=7, device="cpu")
    assert config.differences(other) == [
        "feedback: the run has 'mirror', got 'dense'",
        f"lr: the run has {config.lr!r}, got 0.01",
    ]
    assert config.differences(config) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("optimizer", "in_backward"), ("exits_per_step", 1), ("exit_warmup", 2), ("shard", True)],
)
def test_what_differs_from_step_to_step_is_not_recorded(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"cuda_graph replays the same work.*expected {field}="):
        TrainConfig(cuda_graph=True, **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("steps", 1.5, "steps must be an integer"),
        ("batch_size", 0, "batch_size must be at least 1"),
        ("accumulate", -1, "accumulate must be at least 1"),
        ("context", 1, "context must be at least 2"),
        ("warmup_steps", -1, "warmup_steps must be at least 0"),
        ("warmup_steps", 10**6, "warmup_steps must be below steps"),
        ("vocab_size", 0, "vocab_size must be at least 1"),
        ("threads", 0, "threads must be at least 1"),
        ("lr", 0.0, "lr must be a positive number"),
        ("lr", float("nan"), "lr must be a positive number"),
        ("clip", float("inf"), "clip must be a positive number"),
        ("weight_decay", -0.1, "weight_decay must be"),
        ("final_lr", 0.0, "final_lr must be in"),
        ("final_lr", 1.5, "final_lr must be in"),
        ("betas", (0.9, 1.0), "betas must be two numbers"),
        ("betas", (0.9,), "betas must be two numbers"),
        ("betas", (0.9, 0.95, 0.99), "betas must be two numbers"),
        ("betas", (-0.1, 0.9), "betas must be two numbers"),
        ("betas", (0.9, float("nan")), "betas must be two numbers"),
        ("betas", ("a", "b"), "betas must be two numbers"),
        ("exits", "everything", "exits must be 'every'"),
        ("exits", "every:", "exits must be 'every'"),
        ("exits", "all", "exits must be 'every'"),
        ("exit_norm", "batch", "exit_norm must be one of"),
        ("backward", "later", "backward must be one of"),
        ("decay", "exponential", "decay must be one of"),
        ("non_finite", "ignore", "non_finite must be one of 'stop', 'skip'"),
        ("unembedding_init", "weights", "unembedding_init must be one of 'random', 'codes'"),
        ("unembedding_init", "codes", "needs feedback 'dense', .* got 'mirror'; pass feedback dense"),
        ("max_skipped", -1, "max_skipped must be at least 0"),
        ("precision", "fp8", "precision must be one of"),
        ("label_smoothing", 1.0, "label_smoothing must be in"),
        ("z_loss", -1.0, "z_loss must be"),
        ("seed", -1, "seed must be at least 0"),
        ("sample_tokens", -1, "sample_tokens must be at least 0"),
        ("eval_every", 0, "eval_every must be at least 1"),
        ("eval_tokens", 0, "eval_tokens must be at least 1"),
        ("checkpoint_every", 0, "checkpoint_every must be at least 1"),
        ("log_every", 0, "log_every must be at least 1"),
    ],
)
def test_bad_values_are_refused_by_name(field: str, value: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        TrainConfig(**{field: value})  # type: ignore[arg-type]


def test_codes_do_not_overwrite_a_trained_unembedding() -> None:
    with pytest.raises(ValueError, match="unembedding_init='codes' is for presets, .* got model 'owner/name'"):
        TrainConfig(model="owner/name", feedback=FeedbackSpec.parse("dense"), unembedding_init="codes")


def test_exits_are_written_as_attach_takes_them() -> None:
    assert exit_indices("every:2") == "every:2"
    assert exit_indices("1,3,-1") == (1, 3, -1)


def test_controls_have_no_feedback_to_diagnose() -> None:
    with pytest.raises(ValueError, match="diagnose_every is for stream and deferred"):
        TrainConfig(diagnose_every=3, backward="joint")
    assert TrainConfig(diagnose_every=3, backward="deferred").diagnose_every == 3
