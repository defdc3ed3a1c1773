"""The tables of docs/costs.md are what the formulas and the measurements give."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType

import pytest

from docs.pages import ROOT, page, table


@pytest.fixture(scope="module")
def costs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("formulas_of_costs", ROOT / "benchmarks" / "costs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_formulas(costs: ModuleType) -> None:
    text = page("costs.md")
    assert text.count(costs.BEGIN) == text.count(costs.END) == 1
    assert text.split(costs.BEGIN)[1].split(costs.END)[0] == costs.tables()


def test_a_factor_by_hand(costs: ModuleType) -> None:
    small = costs.Shape(num_blocks=12, hidden_size=768, vocab_size=50304)
    # 72·12·768² + 12·4·50304·768 against 72·12·768² + 6·50304·768.
    assert costs.local(small, 12) / costs.backprop(small) == pytest.approx(2364014592 / 741408768)


def test_break_even_is_the_last_number_of_exits_within_the_limit(costs: ModuleType) -> None:
    for shape in costs.SHAPES:
        for limit in costs.LIMITS:
            num = costs.exits_within(shape, limit)
            assert costs.local(shape, num) <= limit * costs.backprop(shape) * (1 + 1e-9)
            assert costs.local(shape, num + 1) > limit * costs.backprop(shape)


def test_the_measured_memory_is_that_of_the_file() -> None:
    rows = table(page("costs.md"), "peak of the activations, MiB, at")
    measured = json.loads((ROOT / "benchmarks" / "results" / "depth_cpu.json").read_text())["memory"]
    for row, cell in zip(rows, measured.values(), strict=True):
        peaks = [f"{peak / 2**20:.1f}" for peak in cell["peak_bytes"].values()]
        assert [row["4"], row["8"], row["16"], row["32"], row["64 blocks"]] == peaks
        assert row["a block more"] == f"{abs(cell['bytes_a_block']) / 2**20:.3f}"
