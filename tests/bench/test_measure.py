"""The whole way from gate to results, with inputs small enough for a test."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.machines import gpu_like, quiet
from localexit.bench import contenders, gate, peers
from localexit.bench.config import BenchConfig
from localexit.bench.gate import GateError, check_rules
from localexit.bench.inputs import Inputs, exact, make_inputs, relative_error
from localexit.bench.measure import measure
from localexit.bench.plans import Case, Mode, Peer, RulePlan, default_plans
from localexit.bench.shapes import Shape
from localexit.train.config import FeedbackSpec

TINY = Shape(num_tokens=32, hidden_size=48, vocab_size=301)
CPU = torch.device("cpu")


def plan(name: str = "dense", mode: Mode = "step") -> RulePlan:
    return RulePlan(rule=FeedbackSpec.parse(name), mode=mode)


def case(*plans: RulePlan, peers: tuple[Peer, ...] = (), original: Path | None = None) -> Case:
    return Case(shape=TINY, plans=plans, peers=peers, original=original)


def test_all_that_is_measured_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # The oracle's loops over tokens are most of the time.
    monkeypatch.setattr(gate, "_SMALL", Shape(num_tokens=12, hidden_size=32, vocab_size=200))
    # Each rule once, and two of them in every mode.
    plans = [p for p in default_plans("cuda") if p.mode == "step" or p.rule.name in ("anchors", "mirror_sampled")]
    everything = case(*plans, peers=("F.cross_entropy", "liger"))
    measured = measure(everything, gpu_like(), rounds=5, say=quiet)
    named = {result["name"]: result for result in measured["results"]}
    assert set(named) == {*map(str, everything.plans), "F.cross_entropy", "h @ W.T", "three products"}
    assert measured["not_available"] == {"liger": "RuntimeError: needs a CUDA device"}
    assert measured["dtype"] == "bfloat16"
    for name, result in named.items():
        assert len(result["times_ms"]) == 5
        assert result["min_ms"] <= result["median_ms"] <= result["max_ms"]
        if result["kind"] == "products":
            assert (result["error"], result["peak_mib"]) == (None, None)
        else:
            assert 0 < result["error"] < 0.05
            assert result["peak_mib"] == len(name)
        assert result["backend"] == ("torch" if result["kind"] == "rule" else None)
    assert named["h @ W.T"]["products"] == named["F.cross_entropy"]["vs_eager"] == 1.0


def scaled(run: Any, part: str, inputs: Inputs) -> Tensor:
    loss: Tensor = run(inputs)
    assert inputs.hidden.grad is not None
    if part == "loss":
        return loss * 1.01
    if part == "dW":
        inputs.weight_grad[3] *= -1
    if part == "feedback":
        inputs.hidden.grad = inputs.hidden.grad * 0.95
    return loss


@pytest.mark.parametrize("part", ["loss", "dW", "feedback"])
@pytest.mark.parametrize("mode", ["step", "autograd"])
def test_nothing_is_timed_when_something_is_wrong(part: str, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> dict[str, Any]:
        raise AssertionError("timed")

    right = contenders._CALLS[mode]
    monkeypatch.setitem(contenders._CALLS, mode, lambda *given: scaled(partial(right, *given[:2]), part, given[2]))
    platform = replace(gpu_like(), timer=never)
    with pytest.raises(GateError, match=rf"dense {mode}: {part} is off by .* nothing is timed"):
        measure(case(plan(mode=mode)), platform, rounds=5, say=quiet)


def test_dw_is_checked_again_at_the_measured_size(monkeypatch: pytest.MonkeyPatch) -> None:
    right = contenders._CALLS["step"]

    def wrong_when_large(*given: Any) -> Tensor:
        inputs = given[-1]
        loss = right(*given)
        if len(inputs.weight) == TINY.vocab_size:
            inputs.total[inputs.target[0]] = 0
        return loss

    monkeypatch.setitem(contenders._CALLS, "step", wrong_when_large)
    check_rules([plan()], TINY.hidden_size, CPU)
    with pytest.raises(GateError, match="dense step: loss or gradient"):
        measure(case(plan()), gpu_like(), rounds=5, say=quiet)


def test_the_exact_rule_must_be_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    right = contenders._CALLS["step"]

    def halved_when_large(*given: Any) -> Tensor:
        loss = right(*given)
        if len(given[-1].weight) == TINY.vocab_size:
            given[-1].hidden.grad *= 0.5
        return loss

    monkeypatch.setitem(contenders._CALLS, "step", halved_when_large)
    measure(case(plan("anchors")), gpu_like(), rounds=5, say=quiet)
    with pytest.raises(GateError, match="transport step"):
        measure(case(plan("transport")), gpu_like(), rounds=5, say=quiet)


def test_a_peer_that_does_not_run_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("no kernel\nfor this card")

    monkeypatch.setitem(peers._LOADERS, "F.linear_cross_entropy", lambda: broken)
    wanted = case(plan(), peers=("F.cross_entropy", "F.linear_cross_entropy"))
    measured = measure(wanted, gpu_like(), rounds=5, say=quiet)
    assert measured["not_available"] == {"F.linear_cross_entropy": "RuntimeError: no kernel"}
    assert "F.linear_cross_entropy" not in {result["name"] for result in measured["results"]}


def test_a_peer_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers._LOADERS, "quack", lambda: importlib.import_module("a_head_of_nobody"))
    found, reasons = peers.peer_contenders(["quack"], torch.device("cuda"))
    assert (found, reasons) == ([], {"quack": "package a_head_of_nobody is not installed"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch.compile", "F.linear_cross_entropy"])
def test_peers_of_torch_give_what_plain_pytorch_gives(name: Peer) -> None:
    (peer,), _ = peers.peer_contenders([name], CPU)
    inputs = make_inputs(TINY, dtype=torch.float32, device=CPU)
    expected = exact(inputs, dtype=torch.float64)
    loss = peer(inputs)
    assert loss is not None
    assert inputs.hidden.grad is not None
    assert relative_error(loss, expected.loss) < 1e-5
    assert relative_error(inputs.weight_grad, expected.weight_grad) < 1e-5
    assert relative_error(inputs.hidden.grad, expected.hidden_grad) < 1e-5


HEADS = """
import torch

class Head(torch.nn.Module):
    def __init__(self, hidden_size, vocab_size, *, seed, mode, rank=None):
        super().__init__()
        self.register_buffer("codes", torch.zeros(vocab_size, 1))

    def forward(self, hidden, weight, targets):
        return hidden @ weight.T

FactorizedExitHead = ExactParallelExitHead = Head
"""


def test_the_original_heads_come_from_their_file(tmp_path: Path) -> None:
    (tmp_path / "heads.py").write_text(HEADS)
    measured = measure(case(original=tmp_path / "heads.py"), gpu_like(), rounds=5, say=quiet)
    kinds = {result["name"]: result["kind"] for result in measured["results"]}
    assert {name for name, kind in kinds.items() if kind == "original"} == set(peers.ORIGINALS)


def test_inputs_are_as_peaked_as_a_model_that_learned() -> None:
    shape = Shape(num_tokens=256, hidden_size=256, vocab_size=4000)
    for margin, low, high in ((0.0, 0.4, 1.4), (9.2, 0.0, 1e-3)):
        inputs = make_inputs(shape, dtype=torch.float32, device=CPU, margin=margin)
        assert low < float(exact(inputs, dtype=torch.float64).loss) < high


def test_exact_gradients_are_autograds() -> None:
    inputs = make_inputs(TINY, dtype=torch.float64, device=CPU)
    loss = torch.nn.functional.cross_entropy(inputs.hidden @ inputs.weight.T, inputs.target)
    loss.backward()
    found = exact(inputs, dtype=torch.float64, rows=5)
    assert inputs.hidden.grad is not None
    assert relative_error(found.loss, loss.detach()) < 1e-12
    assert relative_error(found.weight_grad, inputs.weight_grad) < 1e-12
    assert relative_error(found.hidden_grad, inputs.hidden.grad) < 1e-12


def test_three_products_are_those_of_an_exact_head() -> None:
    bare = {contender.name: contender for contender in contenders.product_contenders()}
    inputs = make_inputs(replace(TINY, num_tokens=200), dtype=torch.float32, device=CPU)
    flops = {}
    for name, contender in bare.items():
        with FlopCounterMode(display=False) as counter:
            contender(inputs)
        flops[name] = counter.get_total_flops()
    product = 2 * 200 * math.prod((TINY.hidden_size, TINY.vocab_size))
    assert flops == {"h @ W.T": product, "three products": 3 * product}


def test_a_rule_is_called_as_people_call_it_unless_told_otherwise() -> None:
    rules = ("anchors:num_anchors=7",)
    chosen = BenchConfig(rules=rules).plans("cuda")
    assert list(map(str, chosen)) == [f"{rules[0]} {mode}" for mode in ("step", "filtered", "autograd", "memory")]
    (told,) = BenchConfig(rules=rules, modes=("step",), backend="torch").plans("cpu")
    assert str(told) == "anchors:num_anchors=7 step torch"
