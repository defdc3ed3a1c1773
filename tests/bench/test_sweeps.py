from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import pytest
import torch

from bench.machines import gpu_like, quiet
from localexit.bench import command, shared
from localexit.bench.config import BenchConfig
from localexit.bench.gate import GateError
from localexit.bench.measure import measure
from localexit.bench.plans import Case, RulePlan
from localexit.bench.record import Results
from localexit.bench.shapes import Shape
from localexit.bench.shared import make_exits, measure_shared, one_step
from localexit.bench.sweeps import Letter, default_sweep
from localexit.bench.timing import Times
from localexit.train.config import FeedbackSpec

SHAPE = "16x32x200"


def config(**options: Any) -> BenchConfig:
    return BenchConfig(shapes=(SHAPE,), peers=("F.cross_entropy",), **options)


def run(options: BenchConfig, path: Path | None = None) -> dict[str, Any]:
    results = Results(path, {"device": "a machine", "threads": 1, "versions": {"torch": torch.__version__}})
    command.run_parts(options, gpu_like(), results, say=quiet)
    return results.content


@pytest.mark.parametrize(
    ("letter", "field"), [("N", "num_tokens"), ("D", "hidden_size"), ("V", "vocab_size")], ids=lambda value: value
)
def test_one_size_varies_and_the_others_stay(letter: Letter, field: str) -> None:
    content = run(config(sweep=letter, values=(24, 48), rules=("dense",), modes=("step",)))
    points = content["sweeps"][letter]
    assert list(points) == ["24", "48"]
    fixed = vars(Shape.parse(SHAPE))
    assert {value: measured["shape"] for value, measured in points.items()} == {
        str(value): {**fixed, field: value} for value in (24, 48)
    }


@pytest.mark.parametrize(("letter", "option", "rule"), [("R", "rank", "sketch"), ("M", "num_anchors", "anchors")])
def test_an_option_of_the_rules_varies(letter: Letter, option: str, rule: str) -> None:
    points = run(config(sweep=letter, values=(4, 9), modes=("step",)))["sweeps"][letter]
    for value, measured in points.items():
        assert f"{rule}:{option}={value} step" in measured["plans"]
        assert measured["shape"] == vars(Shape.parse(SHAPE))
        assert {result["name"] for result in measured["results"]} >= {*measured["plans"], "F.cross_entropy"}


def test_a_rule_without_the_option_is_refused() -> None:
    with pytest.raises(ValueError, match="'mirror' has no option 'rank'"):
        run(config(sweep="R", values=(4,), rules=("mirror",)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("letter", get_args(Letter))
def test_what_varies_by_default_grows_and_fits_the_width(letter: Letter, device: str) -> None:
    sweep = default_sweep(letter, device)
    assert list(sweep.values) == sorted(set(sweep.values))
    assert len(sweep.values) >= 5
    if letter == "R":
        assert max(sweep.values) <= sweep.base.hidden_size


def test_one_way_of_calling_is_enough_for_a_sweep() -> None:
    points = run(config(sweep="D", values=(24,), rules=("anchors", "dense")))["sweeps"]["D"]
    assert points["24"]["plans"] == ["dense autograd", "anchors autograd"]


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def fake(case: Case, *_: object, rounds: int, **__: object) -> dict[str, Any]:
        measured.append(case.shape.vocab_size)
        return {**case.summary(), "rounds": rounds}

    monkeypatch.setattr(command, "measure", fake)
    monkeypatch.setattr("localexit.bench.record.read_results", lambda path: json.loads(path.read_text()))
    for values in ((100, 200), (100, 200, 300)):
        run(config(sweep="V", values=values), tmp_path / "exit.json")
    assert measured == [100, 200, 300]


PLAN = RulePlan(rule=FeedbackSpec(name="anchors"), mode="step")
EXITS = Case(shape=Shape.parse(SHAPE), plans=(PLAN,), peers=())


def test_exits_share_one_accumulator_and_one_weight() -> None:
    first, *others = make_exits(EXITS, gpu_like(), 3)
    for index, other in enumerate(others, start=1):
        assert other.total is first.total
        assert other.weight is first.weight
        assert torch.equal(other.hidden, first.hidden.roll(index, 0))
        assert torch.equal(other.target, first.target.roll(index))


def test_an_exit_among_several_against_one_alone() -> None:
    def timer(runs: Any, *, rounds: int, say: Any) -> dict[str, Times]:
        for run in runs.values():
            run()
        # Four exits take three times as long as one.
        return {name: Times(ms=(6.0 if name.endswith("4)") else 2.0,) * rounds) for name in runs}

    measured = measure_shared(EXITS, replace(gpu_like(), timer=timer), num_exits=4, rounds=5, say=quiet)
    (result,) = measured["results"]
    assert (result["alone_ms"], result["exit_ms"], result["exit_to_alone"]) == (2.0, 1.5, 0.75)
    assert measured["num_exits"] == 4


def test_exits_that_lose_a_gradient_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "one_step", lambda rule, backend, exits: one_step(rule, backend, exits[1:]))
    with pytest.raises(GateError, match=r"anchors step: dW of 4 exits is off by 2\.5e-01"):
        measure_shared(EXITS, gpu_like(), num_exits=4, rounds=5, say=quiet)


def test_every_part_is_shown_and_drawn(tmp_path: Path) -> None:
    from localexit.bench.plots import charts, write_plots
    from localexit.bench.tables import shown

    rules = ("anchors", "dense")
    content = run(config(rules=rules, modes=("step",)))
    content |= run(config(rules=rules, sweep="D", values=(24, 48)))
    content |= run(config(rules=rules, shared_exits=2))
    text = shown(content)
    assert f"{SHAPE}: N=16 D=32 V=200 bfloat16, median of 5" in text
    assert "ms at D =" in text
    assert "2 exits that share W" in text
    paths = list(write_plots(content, tmp_path / "new", stem="exit"))
    assert [path.name for path in paths] == [f"exit-{SHAPE}.svg", "exit-sweep-D.svg"]
    for path in paths:
        words = "".join(ElementTree.fromstring(path.read_text(encoding="utf-8")).itertext())
        assert "anchors" in words
        assert "F.cross_entropy" in words
    bars, lines = charts(content)
    assert "5 heads" in bars.alt
    assert "from 24 to 48" in lines.alt


def test_a_bar_that_is_cut_says_so() -> None:
    from localexit.bench.plots import times_chart

    measured = measure(replace(EXITS, peers=("F.cross_entropy",)), gpu_like(), rounds=5, say=quiet)
    for result in measured["results"]:
        result["products"] = 100.0 if result["kind"] == "exact" else 1.0
    assert "100.00 (cut)" in times_chart("x", measured, device="a machine").svg.decode()


def test_without_matplotlib_there_are_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda _: None)
    monkeypatch.setattr(command.platforms, "cpu", lambda **_: gpu_like())
    table = command.run_bench(config(cpu=True, rules=("dense",), modes=("step",), output=tmp_path / "exit.json"))
    assert "dense step" in table
    assert "no pictures without matplotlib" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


def result(name: str, kind: str, ms: float, mib: float | None) -> dict[str, Any]:
    return {"name": name, "kind": kind, "median_ms": ms, "peak_mib": mib}


def test_where_ours_loses() -> None:
    from localexit.bench.tables import losses_table

    results = [
        result("a", "rule", 30.0, 500.0),
        result("b", "rule", 9.0, 900.0),
        result("fast", "exact", 10.0, 800.0),
        result("lean", "exact", 40.0, 100.0),
        result("old", "original", 1.0, 1.0),
    ]
    lines = losses_table({"shapes": {"here": {"results": results}}}).splitlines()
    assert [line.split() for line in lines if line.startswith("here")] == [
        ["here", "a", "30.00", "3.00", "fast"],
        ["here", "a", "500", "5.00", "lean"],
    ]
    assert "faster or leaner" in losses_table({"shapes": {"here": {"results": results[:2]}}})
