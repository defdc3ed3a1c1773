"""The numbers on the pages are those of the cells that are committed beside them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from compare.made_up import BASE, cell
from docs.pages import ROOT, section
from localexit.compare.cells import CellFile
from localexit.compare.methods import CONTROLS
from localexit.compare.plans import PLANS
from localexit.compare.statistics import mean_estimate


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
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "COLUMNS", {"A": ("b0", BASE.model, BASE.steps), "B": ("b1", "small", 400)})
    return tmp_path


def test_pages_follow_from_the_cells(script: ModuleType) -> None:
    for path, text in script.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python benchmarks/results_page.py"


def test_results(script: ModuleType, results: Path) -> None:
    lines = script.results_table("b0", "mini", "40").splitlines()
    assert lines[2] == "| `transport` | 4.100 | 4.000 |  |  | 3 | 4 | 2.00 |"
    assert "| +0.083 ± 0.090 |" not in lines[4]
    assert any(line.startswith("| `mirror:num_pairs=8` | 4.183 | 4.083 | (+0.083 ± 0.090) |") for line in lines)
    assert script.results_table("b1", "small", "400") == script.NOT_MEASURED


def test_diagnosis_is_of_the_worst_exit(script: ModuleType, results: Path) -> None:
    (line,) = script.diagnosis_table("b0", "mini", "40").splitlines()[2:]
    assert line == "| `dense` | 40 | 0.500 | 0.250 | 0.250 | 0.250 | 0.250 | 0.500 |"


def test_pictures_are_written_and_shown(
    script: ModuleType, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "IMAGES", tmp_path / "images")
    (tmp_path / "images").mkdir()
    page = tmp_path / "page.md"
    monkeypatch.setattr(script, "pages", lambda: {page: "<!-- cells: pictures b0 mini 40 -->\n<!-- end -->\n"})
    script.main([])
    written = {path.name for path in (tmp_path / "images").iterdir()}
    assert {"b0-differences-mini-40.svg", "b0-cosines-mini-40.svg"} <= written
    shown = script.pictures("b0", "mini", "40")
    assert all(f"](images/{name})" in shown for name in written)


def test_verdicts(script: ModuleType) -> None:
    estimate = mean_estimate([0.1, 0.11, 0.12])
    assert [script.verdict(estimate, limit) for limit in (0.05, 0.11, 0.2)] == ["missed", "unresolved", "reached"]
    assert script.verdict(None, 0.1) == ""


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
    once = script.with_tables(page)
    assert "old" not in once
    assert "| `dense` |" in once
    assert once.startswith("before\n")
    assert once.endswith("<!-- end -->\nafter\n")
    assert script.with_tables(once) == once


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
