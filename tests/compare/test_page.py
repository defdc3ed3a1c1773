"""The page says what the cells say, needs nothing but itself, and stays whole with odd cells."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from compare.made_up import BASE, cell
from localexit.compare.cells import Cell
from localexit.compare.charts import budget_chart, group_charts, ladder_chart
from localexit.compare.page import write_page
from localexit.compare.results import budgets, groups, ladder


def diagnosis(step: int, *cosines: float, rows_error: float | None = None) -> dict[str, Any]:
    numbers = ("feedback_cosine", "norm_ratio", "bias_ratio", "batch_gradient_cosine")
    exits = [
        {"exit": index, "gradient_cosine": value, **dict.fromkeys(numbers, 0.25)} for index, value in enumerate(cosines)
    ]
    return {"step": step, "num_tokens": 17136, "rows_cosine": None, "rows_error": rows_error, "exits": exits}


CELLS = [
    *(cell("transport", seed, 3.0 + seed) for seed in (0, 1)),
    *(cell("backprop", seed, 2.875 + seed) for seed in (0, 1)),
    cell("mirror", 0, 3.0625, diagnostics=(diagnosis(4, 0.5, 0.75), diagnosis(40, 0.96, 0.99, rows_error=0.375))),
    cell("hybrid", 0, 9.9, status="diverged", detail="NaN", valid=()),
]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_page(CELLS, tmp_path_factory.mktemp("page")).read_text(encoding="utf-8")


def cells_of(html: str, method: str) -> list[str]:
    """Texts of the first table row of a method."""
    row = re.search(rf"<tr><th[^>]*><span[^>]*></span><bdi>{re.escape(method)}</bdi>.*?</tr>", html, re.DOTALL)
    assert row, method
    return re.findall(r"<td[^>]*>(.*?)</td>", row[0])


def test_results(html: str) -> None:
    assert cells_of(html, "transport")[:5] == ["3.600", "3.500", "", "+0.125 ±0.000", "2"]
    assert cells_of(html, "mirror")[:5] == ["3.163", "3.062", "(+0.062)", "(+0.188)", "1"]
    assert cells_of(html, "hybrid")[:2] == ["–", "–"]
    assert cells_of(html, "hybrid")[4] == "0 +1 diverged"


def test_diagnosis_of_the_last_step(html: str) -> None:
    table = html.split("Feedback against the exact gradient")[1].split("</table>")[0]
    assert "0.960" in table
    assert "0.990" in table
    assert "0.375" in table
    assert "0.500" not in table


def test_the_page_needs_nothing_else(html: str) -> None:
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", html)
    assert "<script" not in html


def test_equal_cells_are_an_equal_page_and_the_charts_are_files(tmp_path: Path) -> None:
    once, again = (write_page(CELLS, tmp_path / name) for name in "ab")
    assert once.read_bytes() == again.read_bytes()
    names = sorted(path.name for path in (tmp_path / "a" / "plots").iterdir())
    assert names == [f"{what}-mini-40.png" for what in ("cosines", "cost", "curves", "differences")]


def test_hostile_names_are_text(tmp_path: Path) -> None:
    made = replace(cell("dense", 0, 3.0), device="<img src=x>", commit="</table><script>")
    html = write_page([made], tmp_path).read_text(encoding="utf-8")
    assert "<img src=x>" not in html
    assert "<script" not in html


def charts_of(cells: list[Cell]) -> dict[str, Any]:
    (group,) = groups(cells)
    return {chart.name.split("-")[0]: chart for chart in group_charts(group)}


def test_charts_are_left_out_where_there_is_nothing_to_draw() -> None:
    assert set(charts_of(CELLS)) == {"differences", "curves", "cost", "cosines"}
    assert set(charts_of([cell("dense", 0, 3.0)])) == {"curves", "cost"}
    assert charts_of([cell("dense", 0, 3.0, status="diverged", valid=())]) == {}


def test_what_the_charts_show() -> None:
    charts = charts_of(CELLS)
    widths = [bar.get_width() for bar in charts["differences"].figure.axes[0].patches]
    assert widths == pytest.approx([0.0625, -0.125])
    curves = {line.get_label(): line for line in charts["cosines"].figure.axes[0].lines}
    assert any(list(line.get_ydata()) == [0.5, 0.96] for line in curves.values())
    assert "mirror +0.062" in charts["differences"].alt


@pytest.mark.parametrize("chart", ["differences", "curves", "cost", "cosines"])
def test_long_names_are_drawn_whole_and_inside_the_picture(chart: str) -> None:
    name = "dense:rank=512@unembedding_init=codes,lr=0.001,unembedding_std=0.02"
    figure = charts_of([*CELLS, cell(name, 0, 3.5, diagnostics=(diagnosis(40, 0.25),))])[chart].figure
    boxes = [text.get_window_extent() for text in figure.findobj(Text) if text.get_text() == name]
    assert boxes
    # A tick has a second label right of the axes, which is not drawn.
    assert figure.bbox.x0 <= boxes[0].x0 < boxes[0].x1 <= figure.bbox.x1


def test_no_two_methods_are_drawn_alike() -> None:
    names = ("transport", "backprop", *(f"dense:rank={rank}" for rank in range(1, 15)))
    lines = charts_of([cell(name, 0, 3.0) for name in names])["curves"].figure.axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(names) == 16


def test_ladder() -> None:
    """Loss ∝ FLOPs^-0.1 by construction, in both seeds; what was trained on one model alone has no ladder."""
    cells = [cell("dense", 0, 3.0)]
    for index, model in enumerate(("small-256", "small", "small-768")):
        for seed in (0, 1):
            factor = 4.0**index
            made = cell("transport", seed, 4 * factor**-0.1, config=replace(BASE, model=model))
            cells.append(replace(made, flops_per_token=1e6 * factor))
    found = ladder(cells)
    assert found is not None
    assert list(found.points) == ["transport"]
    assert found.slopes["transport"].mean == pytest.approx(-0.1)
    assert [point.flops for point in found.points["transport"]] == pytest.approx([1.28e9, 5.12e9, 2.048e10])
    assert [point.loss for point in found.points["transport"]] == pytest.approx([4, 4 * 4**-0.1, 4 * 16**-0.1])
    assert ladder(CELLS) is None
    # Losses from 3.03 to 4, with a margin, on a logarithmic axis, whose own ticks would be powers of ten.
    axes = ladder_chart(found).figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["3", "3.2", "3.4", "3.6", "3.8", "4"]


def test_seeds_of_one_size_do_not_narrow_the_interval_of_a_slope() -> None:
    """They share what their size is off by."""
    models, losses = ("small-256", "small", "small-768"), (4.0, 3.0, 2.9)
    cells = {
        seed: [
            replace(cell("transport", seed, loss, config=replace(BASE, model=model)), flops_per_token=4.0**index)
            for index, (model, loss) in enumerate(zip(models, losses, strict=True))
        ]
        for seed in (0, 1, 2)
    }
    one, three = ladder(cells[0]), ladder([c for seed in cells for c in cells[seed]])
    assert one is not None
    assert three is not None
    assert three.slopes["transport"].half_width == pytest.approx(one.slopes["transport"].half_width)


def test_budgets_are_on_the_page(tmp_path: Path) -> None:
    other = replace(BASE, steps=80)
    more = [cell("transport", seed, 2.5, config=other) for seed in (0, 1)]
    more += [cell("backprop", seed, gap + 2.5, config=other) for seed, gap in ((0, 0.125), (1, 0.375))]
    html = write_page([*CELLS, *more], tmp_path).read_text(encoding="utf-8")
    assert "over optimiser steps: backprop 40: −0.125, 80: +0.250." in html
    (chart,) = (found for mine in budgets(groups([*CELLS, *more])) if (found := budget_chart(mine)))
    (line,) = (line for line in chart.figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_marker() == "o")
    assert [list(line.get_xdata()), list(line.get_ydata())] == [[40, 80], [-0.125, 0.25]]
    assert budgets(groups(CELLS)) == ()


def test_the_ladder_is_on_the_page(tmp_path: Path) -> None:
    cells = [
        cell("transport", 0, 3.0 - index, config=replace(BASE, model=m)) for index, m in enumerate(("tiny", "mini"))
    ]
    cells[1] = replace(cells[1], flops_per_token=2e7)
    assert "validation loss against training FLOPs" in write_page(cells, tmp_path).read_text(encoding="utf-8")
    assert (tmp_path / "plots" / "ladder.png").is_file()
