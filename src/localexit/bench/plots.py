"""Results as pictures: what contenders cost on a shape, and how the cost follows one size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from localexit.report.drawing import WIDE, Chart, Curve, draw, label_ends, rendered, scale_log
from localexit.report.theme import FAINT, MUTED, Color, canvas, drawable, figure_style, run_style

from .shapes import Shape
from .tables import name_in_sweep

# Curves without points carry the colours of what is drawn otherwise into the dark scheme.
_NOTHING = np.zeros(0, dtype=np.int64)
_ROW = 0.19
_NAMES = 2.3
_COLORS: dict[str, Color] = {"rule": run_style(0)[0], "exact": run_style(1)[0], "original": FAINT, "products": MUTED}
_KINDS = {
    "rule": "rules of localexit",
    "exact": "exact heads",
    "original": "original heads",
    "products": "bare products",
}
_WORDS = {
    "N": "tokens N",
    "D": "width D",
    "V": "vocabulary V",
    "R": "rank R",
    "M": "anchors M",
}


def write_plots(content: dict[str, Any], folder: Path, *, stem: str) -> Iterator[Path]:
    """Write every picture of a file of results, and yield where to."""
    folder.mkdir(parents=True, exist_ok=True)
    for chart in charts(content):
        path = folder / f"{stem}-{chart.name}.svg"
        path.write_bytes(chart.standalone_svg())
        yield path


def charts(content: dict[str, Any]) -> Iterator[Chart]:
    """Every picture of a file of results."""
    for name, measured in content.get("shapes", {}).items():
        yield times_chart(name, measured, device=content["device"])
    for letter, points in content.get("sweeps", {}).items():
        if len(points) > 1:
            yield sweep_chart(letter, points, device=content["device"])


@figure_style()
def times_chart(name: str, measured: dict[str, Any], *, device: str) -> Chart:
    """Time of every contender in units of the forward product, the fastest above."""
    results = sorted(measured["results"], key=lambda result: -result["products"])
    shape = Shape(**measured["shape"])
    # Bars so much longer that the others would not be seen are cut, and say how long they are.
    limit = 2.5 * float(np.median([result["products"] for result in results]))
    figure = Figure(figsize=(WIDE[0], _ROW * len(results) + 1.0))
    width, height = figure.get_size_inches()
    axes = figure.add_axes((_NAMES / width, 0.5 / height, (width - _NAMES - 0.7) / width, (height - 0.95) / height))
    kinds = [kind for kind in _COLORS if any(result["kind"] == kind for result in results)]
    for column, kind in enumerate(kinds):
        across = (_NAMES + 1.45 * column) / width
        figure.text(across, 1 - 0.36 / height, f"■ {_KINDS[kind]}", fontsize=8, color=_COLORS[kind].light)
    for row, result in enumerate(results):
        color = _COLORS[result["kind"]].light
        axes.barh(row, min(result["products"], limit), height=0.7, color=color)
        told = f" {result['products']:.2f}" + (" (cut)" if result["products"] > limit else "")
        axes.text(min(result["products"], limit), row, told, va="center", fontsize=7, color=MUTED.light)
    axes.set_yticks(range(len(results)), [drawable(result["name"], 40) for result in results], fontsize=8)
    axes.tick_params(length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.06 * limit)
    axes.set_ylim(-0.6, len(results) - 0.4)
    axes.set_xlabel("times the forward product h @ W.T of the same run")
    return rendered(
        figure,
        [Curve(x=_NOTHING, y=_NOTHING.astype(np.float64), color=_COLORS[kind]) for kind in kinds],
        name=name,
        title=f"{drawable(device, 60)}, {shape}, {measured['dtype']}",
        caption="Time in units of one forward product; the fastest above.",
        alt=f"Bar chart of the time of {len(results)} heads at {shape}, in units of one forward product.",
    )


@figure_style()
def sweep_chart(letter: str, points: dict[str, dict[str, Any]], *, device: str) -> Chart:
    """Time of every contender against one size, both axes logarithmic; exact heads dashed."""
    values = sorted(points, key=int)
    x = np.array([int(value) for value in values], dtype=np.int64)
    curves = []
    for index, (name, kind) in enumerate(_names(points)):
        color, _ = run_style(index)
        by_value = [_median(points[value], name) for value in values]
        curves.append(
            Curve(
                x=x,
                y=np.array(by_value),
                color=MUTED if kind == "products" else color,
                dash="solid" if kind == "rule" else (0, (4, 2)),
                width=1.6 if kind == "rule" else 1.1,
                label=drawable(name, 30),
            )
        )
    figure, axes = canvas(*WIDE, right=2.3)
    draw(axes, curves)
    _scale_sizes(axes, x, _WORDS[letter])
    scale_log(axes, curves)
    label_ends(axes, curves)
    base = Shape(**points[values[0]]["shape"])
    fixed = " ".join(part for part in str(base).split() if not part.startswith(letter))
    return rendered(
        figure,
        curves,
        name=f"sweep-{letter}",
        title=f"Time in ms against {_WORDS[letter]}; {fixed}; {drawable(device, 40)}",
        caption="Solid: rules of this library. Dashed: exact heads and the bare products.",
        alt=f"Line chart of time against {_WORDS[letter]} from {values[0]} to {values[-1]}, {len(curves)} heads.",
    )


def _names(points: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Names and kinds in the order of the first point."""
    results = [result for measured in points.values() for result in measured["results"]]
    return list({name_in_sweep(result): result["kind"] for result in results}.items())


def _median(measured: dict[str, Any], name: str) -> float:
    found = (result["median_ms"] for result in measured["results"] if name_in_sweep(result) == name)
    return next(found, float("nan"))


def _scale_sizes(axes: Axes, values: Any, label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(values.min() / 1.1, values.max() * 1.1)
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel(label)
