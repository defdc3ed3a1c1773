"""Errors against fp64, in every dtype and where heads are known to go wrong: at most twice plain PyTorch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.machines import gpu_like, quiet
from localexit import cli
from localexit.bench import numerics, platforms
from localexit.bench.gate import GateError
from localexit.bench.inputs import exact, make_inputs
from localexit.bench.numerics import Trial, check_numerics, measure_numerics, trials
from localexit.bench.shapes import Shape

SMALL = Shape(num_tokens=16, hidden_size=32, vocab_size=200)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return measure_numerics(SMALL, gpu_like(), backend="auto", say=quiet)


def test_every_error_is_within_twice_plain_pytorchs(measured: dict[str, Any]) -> None:
    wrong = {(r["trial"], r["name"]) for r in measured["results"] if not r["is_within"]}
    assert wrong == set()


def test_every_dtype_is_strained(measured: dict[str, Any]) -> None:
    names = {r["trial"] for r in measured["results"]}
    assert names == {
        *(f"{what} {dtype}" for what in ("peaked", "p_gold 0.9999") for dtype in ("float32", "bfloat16", "float16")),
        *(f"{what} {dtype}" for what in ("logits + 1e4", "V=262144") for dtype in ("float32", "bfloat16")),
        "loss x 65536 / 16384 float16",
        "the same, p_gold 0.9999 float16",
    }
    assert len(measured["results"]) == len(names) * 6


def test_feedback_of_rules_is_near_its_equation(measured: dict[str, Any]) -> None:
    for r in measured["results"]:
        if "float32" in r["trial"] and "1e4" not in r["trial"]:
            assert r["feedback"] < 1e-3, r


def test_a_confident_gold_token_has_that_probability() -> None:
    for trial in trials(Shape(num_tokens=64, hidden_size=256, vocab_size=1000)):
        if "0.9999" in trial.name:
            inputs = make_inputs(trial.shape, dtype=torch.float32, device=torch.device("cpu"), margin=trial.margin)
            assert float((-exact(inputs, dtype=torch.float64).loss).exp()) == pytest.approx(0.9999, abs=3e-5)


@pytest.mark.parametrize("part", ["loss", "dW", "dh"])
def test_an_error_beyond_the_budget_is_refused(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = numerics.exit_cross_entropy

    def wrong(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
        loss = right(hidden, weight, target, **options)
        assert isinstance(loss, Tensor)
        if part == "loss":
            return loss + 1e-3 * loss.detach()
        (hidden if part == "dh" else weight).register_hook(lambda grad: grad * 1.01)
        return loss

    trial = Trial(name="peaked", shape=SMALL, dtype=torch.float32)
    monkeypatch.setattr(numerics, "exit_cross_entropy", wrong)
    monkeypatch.setattr(numerics, "trials", lambda _: (trial,))
    found = measure_numerics(SMALL, gpu_like(), backend="auto", say=quiet)
    # Of feedback only the exact rule's has a counterpart in plain PyTorch.
    affected = "transport" if part == "dh" else "anchors fast; .*transport"
    with pytest.raises(GateError, match=f"plus one rounding: peaked float32 {affected}"):
        check_numerics(found)


def test_the_scale_of_the_loss_is_taken_out_again() -> None:
    plain = Trial(name="plain", shape=SMALL, dtype=torch.float64)
    scaled = Trial(name="scaled", shape=SMALL, dtype=torch.float64, scale=65536.0, num_items=16384)
    for trial in (plain, scaled):
        for row in numerics._errors(trial, torch.device("cpu"), "auto"):
            assert max(row["loss"], row["weight_grad"]) < 1e-12


def test_the_command_tells_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = Trial(name="peaked", shape=SMALL, dtype=torch.float32)
    monkeypatch.setattr(numerics, "trials", lambda _: (trial,))
    monkeypatch.setattr(platforms, "cpu", lambda **_: gpu_like())
    arguments = ["bench", "--cpu", "--numerics", "--output", str(tmp_path / "exit.json")]
    assert cli.run(arguments) == 0
    assert "peaked float32" in capsys.readouterr().out
    # A second time it is read.
    monkeypatch.setattr(numerics, "trials", lambda _: 1 / 0)
    assert cli.run(arguments) == 0


def test_wrong_numbers_are_shown_before_the_command_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = Trial(name="peaked", shape=SMALL, dtype=torch.float32)
    right = numerics.exit_cross_entropy
    monkeypatch.setattr(numerics, "exit_cross_entropy", lambda *args, **options: 1.01 * right(*args, **options))
    monkeypatch.setattr(numerics, "trials", lambda _: (trial,))
    monkeypatch.setattr(platforms, "cpu", lambda **_: gpu_like())
    assert cli.run(["bench", "--cpu", "--numerics"]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("NO") == 6
    assert printed.err.splitlines()[-1].startswith("localexit: off by more than twice plain PyTorch")
