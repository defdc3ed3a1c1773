"""The tables of docs/costs.md are what the formulas and the measurements give."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from types import ModuleType

import pytest

from docs.pages import ROOT, page

TEXT = page("costs.md")


@pytest.fixture(scope="module")
def writer() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("costs_page")


@pytest.fixture(scope="module")
def costs(writer: ModuleType) -> ModuleType:
    formulas: ModuleType = writer.costs_formulas
    return formulas


def test_the_page_is_what_formulas_and_results_say(writer: ModuleType) -> None:
    assert writer.written(TEXT) == TEXT, "run `make tables`"


def test_the_figure_is_what_the_results_say(writer: ModuleType) -> None:
    assert writer.figure(writer.results("steps_gpu")) == writer.FIGURE.read_bytes(), "run `make tables`"


def test_every_table_has_its_place(writer: ModuleType) -> None:
    assert set(re.findall(r"<!-- ([a-z-]+) -->", TEXT)) - {"end"} == set(writer.BLOCKS)


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
