"""The tables of docs/costs.md are what the formulas and the measurements give."""

from __future__ import annotations

import json
import re

import pytest

import costs_formulas
import costs_page
from docs.pages import ROOT, page, table

TEXT = page("costs.md")


def test_the_page_is_what_formulas_and_results_say() -> None:
    assert costs_page.written(TEXT) == TEXT, "run `make tables`"


def test_the_figure_is_what_the_results_say() -> None:
    assert costs_page.figure(costs_page.results("steps_gpu")) == costs_page.FIGURE.read_bytes(), "run `make tables`"


def test_every_table_has_its_place() -> None:
    assert set(re.findall(r"<!-- ([a-z-]+) -->", TEXT)) - {"end"} == set(costs_page.BLOCKS)


def test_a_factor_by_hand() -> None:
    small = costs_formulas.Shape(num_blocks=12, hidden_size=768, vocab_size=50304)
    # 72·12·768² + 12·4·50304·768 against 72·12·768² + 6·50304·768.
    assert costs_formulas.local(small, 12) / costs_formulas.backprop(small) == pytest.approx(2364014592 / 741408768)


def test_break_even_is_the_last_number_of_exits_within_the_limit() -> None:
    for shape in costs_formulas.SHAPES:
        for limit in costs_formulas.LIMITS:
            num = costs_formulas.exits_within(shape, limit)
            assert costs_formulas.local(shape, num) <= limit * costs_formulas.backprop(shape) * (1 + 1e-9)
            assert costs_formulas.local(shape, num + 1) > limit * costs_formulas.backprop(shape)


def test_the_measured_memory_is_that_of_the_file() -> None:
    rows = table(TEXT, "peak of the activations, MiB, at")
    measured = json.loads((ROOT / "benchmarks" / "results" / "depth_cpu.json").read_text())["memory"]
    for row, cell in zip(rows, measured.values(), strict=True):
        peaks = [f"{peak / 2**20:.1f}" for peak in cell["peak_bytes"].values()]
        assert [row["4"], row["8"], row["16"], row["32"], row["64 blocks"]] == peaks
        assert row["a block more"] == f"{abs(cell['bytes_a_block']) / 2**20:.3f}"
