"""The numbers on the pages are those of the cells that are committed beside them."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from compare.made_up import BASE, cell
from docs.pages import ROOT, section
from localexit.compare.cells import Cell, CellFile
from localexit.compare.methods import CONTROLS
from localexit.compare.plans import PLANS
from localexit.compare.statistics import mean_estimate
from results_parts.found import NOT_RUN, row_of


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_page", ROOT / "benchmarks" / "results_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of results with cells of setting b0, in place of the committed one."""
    file = CellFile(tmp_path / "cells")
    diagnosis = {"step": 40, "num_tokens": 9, "rows_cosine": 0.5, "rows_error": None}
    numbers = dict.fromkeys(("batch_gradient_cosine", "feedback_cosine", "norm_ratio", "bias_ratio"), 0.25)
    exits = [{"exit": index, "gradient_cosine": value, **numbers} for index, value in enumerate((0.75, 0.5))]
    file.add(cell("transport", seed, 3.0 + seed) for seed in (0, 1, 2))
    file.add(cell("mirror:num_pairs=8", seed, 3.0 + gap + seed) for seed, gap in enumerate((0.0625, 0.125, 0.0625)))
    file.add([cell("dense@lr=0.5", 0, 2.0), cell("dense", 0, 3.5, diagnostics=({**diagnosis, "exits": exits},))])
    file.path.rename(tmp_path / "b0.jsonl")
    monkeypatch.setattr("results_parts.found.RESULTS", tmp_path)
    monkeypatch.setattr(script, "COLUMNS", {"A": ("b0", BASE.model, BASE.steps), "B": ("b1", "small", 400)})
    return tmp_path


def put(folder: Path, setting: str, cells: list[Cell]) -> None:
    """A file of results."""
    file = CellFile(folder / "cells")
    file.add(cells)
    file.path.rename(folder / f"{setting}.jsonl")


def test_pages_follow_from_the_cells(script: ModuleType) -> None:
    for path, text in script.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python benchmarks/results_page.py"


def test_results(script: ModuleType, results: Path) -> None:
    lines = script.tables.results("b0", "mini", "40").splitlines()
    assert lines[2] == "| `transport` | 4.100 | 4.000 |  |  | 3 | 4 | 2.00 |"
    assert "| +0.083 ± 0.090 |" not in lines[4]
    assert any(line.startswith("| `mirror:num_pairs=8` | 4.183 | 4.083 | (+0.083 ± 0.090) |") for line in lines)
    assert script.tables.results("b1", "small", "400") == NOT_RUN


def test_diagnosis_is_of_the_worst_exit(script: ModuleType, results: Path) -> None:
    (line,) = script.tables.diagnosis("b0", "mini", "40").splitlines()[2:]
    assert line == "| `dense` | 40 | 0.500 | 0.250 | 0.250 | 0.250 | 0.250 | 0.500 |"


def test_provenance(script: ModuleType, results: Path) -> None:
    assert script.tables.provenance("b0") == (
        "8 cells; device: cpu (1 threads); torch: 2.13.0; commit: unknown; text: stdlib (1,200 files, 4.5 MB, 1.5 M "
        "training tokens at V=2048, sha256 5f5f5f5f5f5f); load average 1.0 to 1.0."
    )
    assert script.tables.provenance("b1") == NOT_RUN


def test_pictures_are_written_and_shown(
    script: ModuleType, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("results_parts.pictures.IMAGES", tmp_path / "images")
    (tmp_path / "images").mkdir()
    page = tmp_path / "page.md"
    monkeypatch.setattr(script, "pages", lambda: {page: "<!-- cells: pictures b0 mini 40 -->\n<!-- end -->\n"})
    script.main([])
    written = {path.name for path in (tmp_path / "images").iterdir()}
    assert {"b0-differences-mini-40.svg", "b0-cosines-mini-40.svg"} <= written
    shown = script.pictures.shown("pictures", "b0", "mini", "40")
    assert all(f"](images/{name})" in shown for name in written)


def test_what_is_written_by_hand_has_no_measured_numbers(script: ModuleType) -> None:
    """Losses, differences and cosines of three decimals come from cells."""
    written = script.without_parts((ROOT / "docs/results.md").read_text(encoding="utf-8"))
    assert re.findall(r"\d\.\d{3}", written) == []


def test_what_the_pages_say_in_words_is_so(script: ModuleType) -> None:
    """Signs and orders that stand in sentences of docs/results.md and the README."""

    def mean(method: str, steps: int) -> float:
        row = row_of("b1-packages", "small", steps, method)
        assert row is not None
        assert row.to_exact is not None
        return row.to_exact.mean

    for steps in (400, 1600):
        assert abs(mean("mirror_sampled", steps)) < 0.015
    assert mean("backprop", 400) > 0.05
    assert mean("backprop", 1600) < -0.2
    assert mean("transport@exits=every:3", 1600) < mean("transport@exits=every:2", 1600) < -0.1
    assert abs(mean("transport@exit_body=mlp", 1600)) < 0.02


def test_numbers_in_a_sentence(script: ModuleType, results: Path) -> None:
    page = (
        "a <!-- cells: difference b0 mini 40 mirror:num_pairs=8 -->9<!-- end -->, "
        "<!-- cells: cosine b0 mini 40 dense -->9<!-- end --> and "
        "<!-- cells: to-backprop b0 mini 40 dense -->9<!-- end -->"
    )
    told = re.sub(r"<!--.*?-->", "", script.with_parts(page))
    assert told == "a (+0.083 ± 0.090), 0.500 and not run"


def test_settings_of_different_texts_are_never_paired(script: ModuleType, results: Path) -> None:
    put(results, "other", [cell("dense@lr=0.5", 0, 3.0, corpus={"sha256": "0" * 64, "name": "packages"})])
    with pytest.raises(ValueError, match="expected one text for all"):
        script.tables.sweep("other", "b0", "mini", "40")


def test_exits_of_other_kinds_have_a_table_of_their_own(script: ModuleType, results: Path) -> None:
    assert script.tables.structures("b0", "mini", "40") == NOT_RUN
    structure = [cell("transport@exits=every:3", seed, 3.25 + seed, flops_per_token=3e6) for seed in (0, 1)]
    losses = [cell(name, seed, 3.5 + seed) for name in ("transport", "backprop", "dense") for seed in (0, 1)]
    put(results, "b1", [*structure, *losses])
    lines = script.tables.structures("b1", "mini", "40").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| `transport`",
        "| `transport@exits=every:3`",
        "| `backprop`",
    ]
    assert lines[3].endswith("| 2 | 3.750 | -0.250 ± 0.000 | -0.250 ± 0.000 | 2 | 3 | 0.0 |")
    assert "every:3" not in script.tables.results("b1", "mini", "40")
    assert "every:3" not in script.pictures.shown("pictures", "b1", "mini", "40")


def test_budgets(script: ModuleType, results: Path) -> None:
    """What was trained with one budget alone is left out, and what a budget lacks is empty."""
    assert script.tables.budget_table("b0", "mini") == NOT_RUN
    cells = [
        cell(name, 0, loss, config=replace(BASE, steps=steps))
        for steps, methods in (
            (80, {"transport": 3.0, "mirror": 3.25, "hybrid": 4.0}),
            (40, {"transport": 3.5, "mirror": 3.5625, "dense": 4.0}),
            (320, {"transport": 2.5, "mirror": 2.5}),
        )
        for name, loss in methods.items()
    ]
    put(results, "b1", cells)
    assert script.tables.budget_table("b1", "mini").splitlines() == [
        "| method | 40 steps | 80 steps | 320 steps |",
        "| --- | --- | --- | --- |",
        "| `transport` | 3.500 nats/token | 3.000 nats/token | 2.500 nats/token |",
        "| `mirror` | (+0.062) | (+0.250) | (+0.000) |",
    ]
    assert "mirror 40: +0.062, 80: +0.250, 320: 0.000." in script.pictures.shown("budget-picture", "b1", "mini")


def test_ladder(script: ModuleType, results: Path) -> None:
    assert script.tables.ladder_table("b0") == script.tables.slopes("b0") == NOT_RUN
    models = (("small-768", 3.0, 4e6), ("small-256", 4.0, 1e6), ("small", 3.5, 2e6))
    put(
        results,
        "b2",
        [
            cell(name, seed, loss + gap, config=replace(BASE, model=model), flops_per_token=flops)
            for model, loss, flops in models
            for name, gap in (("transport", 0.0), ("backprop", 0.25))
            for seed in (0, 1)
        ],
    )
    lines = script.tables.ladder_table("b2").splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [f"| {width}" for width in (256, 256, 512, 512, 768, 768)]
    assert lines[1] == "| 256 | 40 | `backprop` | 4.250 | +0.250 ± 0.000 |  | 2 | 0.00 |"
    # ln(3 / 4) / ln 4: the middle point does not turn a line through three evenly spaced ones.
    assert script.tables.slopes("b2").splitlines()[2].startswith("| `transport` | 3 | -0.208 ± 0.")
    assert "of 2 methods" in script.pictures.shown("ladder-picture", "b2")


def test_sweep(script: ModuleType, results: Path) -> None:
    cells = [
        cell(f"dense@unembedding_init=codes,lr={lr},unembedding_std={std}", 0, loss)
        for lr, std, loss in ((0.25, 0.02, 4.0), (0.5, 0.02, 3.5), (0.5, 0.1, 3.25))
    ]
    put(results, "codes", cells)
    assert script.tables.sweep("codes", "b0", "mini", "40").splitlines()[2:] == [
        "| `dense@unembedding_init=codes` | 0.25 | 4.000, +1.000 |  |",
        "| `dense@unembedding_init=codes` | 0.5 | 3.500, +0.500 | 3.250, +0.250 |",
    ]
    assert "| 3.500 |" in script.tables.sweep("codes", "b9", "mini", "40")
    # A cell of the sweep is shown as it is, not as the mean over seeds of those with the tuned values.
    put(results, "own", [cell("mirror@lr=0.001,unembedding_std=0.02", 0, 3.125)])
    config = replace(BASE, lr=0.001, unembedding_std=0.02)
    tuned = [cell("mirror", seed, 3.25, config=config) for seed in (0, 1)]
    put(results, "base", [cell("transport", seed, 3.0) for seed in (0, 1)] + tuned)
    assert "3.125, +0.125" in script.tables.sweep("own", "base", "mini", "40")
    assert script.tables.sweep("absent", "b0", "mini", "40") == NOT_RUN


def test_verdicts(script: ModuleType) -> None:
    estimate = mean_estimate([0.1, 0.11, 0.12])
    assert [script.tables.verdict(estimate, limit) for limit in (0.05, 0.11, 0.2)] == [
        "missed",
        "unresolved",
        "reached",
    ]
    assert script.tables.verdict(None, 0.1) == ""


def test_columns_are_replaced_and_the_rest_stays(script: ModuleType, results: Path) -> None:
    of_rules = "| rule | A | B |\n|---|---|---|\n| `mirror` | +9 | +8 |\n| `hybrid` | +6 | +7 |\n"
    page = f"{of_rules}\n| name | A |\n|---|---|\n| mirror | 1 |\n"
    columns = script.rule_columns(with_options=False)
    assert list(columns) == ["A"]
    measured = {rule: value for rule, value in columns["A"].items() if value}
    assert measured == {"transport": "0", "mirror": "+0.083", "dense": "+0.500"}
    assert script.with_columns(page, columns) == page.replace("+9", "+0.083").replace(
        "| `hybrid` | +6 |", "| `hybrid` | |"
    )
    shown = script.rule_columns(with_options=True)["A: difference"]
    assert shown["mirror"] == "+0.083 (num_pairs=8)"
    assert shown["hybrid"] == "not measured"


def test_blocks_are_written_anew_each_time(script: ModuleType, results: Path) -> None:
    page = "before\n<!-- cells: results b0 mini 40 -->\nold\n<!-- end -->\nafter\n"
    once = script.with_parts(page)
    assert "old" not in once
    assert "| `dense` |" in once
    assert once.startswith("before\n")
    assert once.endswith("<!-- end -->\nafter\n")
    assert script.with_parts(once) == once


def test_best_settings_of_a_sweep_are_kept(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = tmp_path / "tuned.json"
    tuned.write_text('{"b0": {"dense": {"lr": 9}, "sketch": {"lr": 8}}, "b1": {}}')
    monkeypatch.setattr(script, "TUNED", tuned)
    CellFile(tmp_path).add([cell("dense@lr=0.5", 0, 2.0), cell("dense@lr=0.25", 0, 3.0)])
    script.main(["--tune", "b0", str(tmp_path)])
    assert json.loads(tuned.read_text()) == {"b0": {"dense": {"lr": 0.5}, "sketch": {"lr": 8}}, "b1": {}}


def test_the_page_names_every_preset_and_control() -> None:
    text = section((ROOT / "docs/results.md").read_text(encoding="utf-8"), "How it is measured")
    for name in (*PLANS, *CONTROLS):
        assert f"| `{name}` |" in text


@pytest.mark.parametrize("setting", ["b0", "b1"])
def test_the_committed_settings_are_those_of_the_sweep(
    setting: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = script.TUNED.read_text(encoding="utf-8")
    written: list[str] = []
    monkeypatch.setattr(Path, "write_text", lambda _path, text, **_: written.append(text))
    script.main(["--tune", setting, str(script.ROOT / f"benchmarks/results/{setting}-sweep.jsonl")])
    assert written == [committed]
