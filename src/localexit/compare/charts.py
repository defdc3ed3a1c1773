"""Charts of a comparison, drawn like those of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from localexit.compare.cells import Cell
from localexit.compare.results import Group, Ladder, Row
from localexit.compare.statistics import Estimate
from localexit.report.drawing import (
    WIDE,
    Chart,
    Curve,
    draw,
    label_ends,
    labelled_canvas,
    rendered,
    scale_losses,
    scale_steps,
)
from localexit.report.text import count, number, signed
from localexit.report.theme import (
    FAINT,
    INK,
    MUTED,
    Color,
    Dash,
    canvas,
    drawable,
    figure_style,
    run_style,
    text_inches,
)

Style = tuple[Color, Dash]
_LABEL_INCHES = 2.0
_ROW_INCHES = 0.27
# Of a method's name in a picture: enough for three settings.
_MAX_LABEL = 100


def group_charts(group: Group) -> tuple[Chart, ...]:
    """Every chart of one model and budget that its cells allow."""
    styles = styles_of(group)
    charts = (
        differences(group, styles),
        loss_curves(group, styles),
        cost_scatter(group, styles),
        gradient_cosines(group, styles),
    )
    return tuple(chart for chart in charts if chart is not None)


def styles_of(group: Group) -> dict[str, Style]:
    """One colour and dash pattern a method, the same in every chart."""
    return {row.method: run_style(index) for index, row in enumerate(group.rows)}


@figure_style()
def differences(group: Group, styles: Mapping[str, Style]) -> Chart | None:
    """Bars of the last exit's loss minus that of exact local exits, with intervals."""
    rows = [row for row in group.rows if row.to_exact is not None]
    if not rows:
        return None
    curves = [
        Curve(x=np.array([0]), y=np.array([_mean(row.to_exact)]), color=styles[row.method][0], label=row.method)
        for row in rows
    ]
    labels = [_label(row.method) for row in rows]
    # A tenth more: a browser takes the reader's own font.
    left = max(_LABEL_INCHES, 0.15 + 1.1 * max(map(text_inches, labels)))
    figure, axes = canvas(WIDE[0] + left - _LABEL_INCHES, 0.95 + _ROW_INCHES * len(rows), left=left, right=1.2)
    for position, row in enumerate(rows):
        assert row.to_exact is not None
        color = styles[row.method][0].light
        axes.barh(position, row.to_exact.mean, height=0.62, color=color, alpha=0.85)
        axes.errorbar(
            row.to_exact.mean, position, xerr=_margin(row.to_exact), color=INK.light, linewidth=1.1, capsize=2
        )
        axes.text(
            1.01, position, _told(row.to_exact), transform=axes.get_yaxis_transform(), va="center", color=MUTED.light
        )
    axes.axvline(0, color=INK.light, linewidth=0.9)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("nats/token")
    return rendered(
        figure,
        curves,
        name=_name("differences", group),
        title="Last exit against exact local exits",
        caption="Validation loss minus that of exact local exits, paired by seed, with 95 % intervals where there are "
        "several seeds. Right of the line is worse.",
        alt="Bar chart of differences in nats/token: "
        + ", ".join(f"{row.method} {signed(_mean(row.to_exact))}" for row in rows)
        + ".",
    )


@figure_style()
def loss_curves(group: Group, styles: Mapping[str, Style]) -> Chart | None:
    """Validation loss of the last exit over training, mean over seeds."""
    curves = []
    for row in group.rows:
        tokens, losses = _mean_curve(row)
        if len(tokens):
            curves.append(_line(tokens, losses, styles[row.method], row.method))
    if not curves:
        return None
    figure, axes = labelled_canvas(curves)
    draw(axes, curves)
    scale_steps(axes, curves, "training tokens")
    scale_losses(axes, curves, uniform=None)
    label_ends(axes, curves)
    return rendered(
        figure,
        curves,
        name=_name("curves", group),
        title="Validation loss of the last exit, nats/token",
        caption="Mean over the seeds that finished. A dotted line only leads to a label.",
        alt=f"Line chart of the last exit's validation loss of {len(curves)} methods over training tokens.",
    )


@figure_style()
def cost_scatter(group: Group, styles: Mapping[str, Style]) -> Chart | None:
    """Loss of the last exit against what an exit costs."""
    rows = [row for row in group.rows if row.loss is not None]
    if not rows:
        return None
    # Per token and in millions: numbers of three digits.
    points = [
        Curve(
            x=np.array([row.exit_flops / 1e6]),
            y=np.array([row.loss.mean if row.loss else math.nan]),
            color=styles[row.method][0],
            width=3.0,
            label=_label(row.method),
        )
        for row in rows
    ]
    figure, axes = labelled_canvas(points)
    draw(axes, points)
    axes.set_xlim(0, 1.05 * max(float(point.x[0]) for point in points))
    scale_losses(axes, points, uniform=None)
    axes.set_xlabel("MFLOP a token and exit, in matrix products")
    label_ends(axes, points)
    return rendered(
        figure,
        points,
        name=_name("cost", group),
        title="Validation loss of the last exit against the cost of an exit, nats/token",
        caption="Logits, dW, feedback and the rule's own learning, counted while they are made; top-k, draws and "
        "gathered rows are no matrix products. The last exit alone is an exit of end-to-end backprop.",
        alt=f"Scatter chart of {len(points)} methods: validation loss against FLOPs of an exit.",
    )


@figure_style()
def gradient_cosines(group: Group, styles: Mapping[str, Style]) -> Chart | None:
    """Cosine of the blocks' gradients with the exact ones over training: the exit where it is lowest."""
    curves = []
    for row in group.rows:
        found = next((cell for cell in row.cells if cell.diagnostics), None)
        if found is not None:
            steps, cosines = _lowest_cosines(found)
            curves.append(_line(steps, cosines, styles[row.method], row.method))
    if not curves:
        return None
    figure, axes = labelled_canvas(curves)
    draw(axes, curves)
    scale_steps(axes, curves, "step")
    low = min(0.0, *(float(np.min(curve.y)) for curve in curves))
    axes.set_ylim(1.05 * low, 1.05)
    axes.axhline(1.0, color=FAINT.light, linewidth=0.8)
    label_ends(axes, curves)
    return rendered(
        figure,
        curves,
        name=_name("cosines", group),
        title="Cosine of the blocks' gradients with the exact ones",
        caption="Averaged over the batches of a diagnosis, at the exit where it is lowest; one seed.",
        alt="Line chart of the cosine of block-parameter gradients over steps, last values: "
        + ", ".join(f"{curve.label} {number(float(curve.y[-1]))}" for curve in curves)
        + ".",
    )


@figure_style()
def budget_chart(found: Sequence[Group]) -> Chart | None:
    """Differences to exact local exits over the budget: whether what is closed stays closed.

    Args:
        found: groups of one model, the smallest budget first.
    """
    methods = dict.fromkeys(row.method for group in found for row in group.rows)
    by_method = {
        method: [(g.steps, row.to_exact) for g in found for row in g.rows if row.method == method and row.to_exact]
        for method in methods
    }
    drawn = {method: points for method, points in by_method.items() if len(points) > 1}
    if not drawn:
        return None
    curves = [
        _line(
            np.array([steps for steps, _ in points]),
            np.array([estimate.mean for _, estimate in points]),
            run_style(index),
            method,
        )
        for index, (method, points) in enumerate(drawn.items())
    ]
    figure, axes = labelled_canvas(curves)
    draw(axes, curves)
    for curve, points in zip(curves, drawn.values(), strict=True):
        margins = [_margin(estimate) for _, estimate in points]
        axes.errorbar(curve.x, curve.y, yerr=margins, fmt="none", ecolor=curve.color.light, elinewidth=1.1, capsize=2)
    axes.axhline(0, color=INK.light, linewidth=0.9)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks([group.steps for group in found], [count(group.steps) for group in found])
    axes.set_xlabel("optimiser steps")
    label_ends(axes, curves)
    return rendered(
        figure,
        curves,
        name=f"budgets-{found[0].model}",
        title="Last exit against exact local exits over the budget, nats/token",
        caption="Validation loss minus that of exact local exits with as many steps, paired by seed, with 95 % "
        "intervals where there are several seeds. Above the line is worse.",
        alt="Line chart of differences in nats/token over optimiser steps: "
        + "; ".join(
            f"{method} " + ", ".join(f"{steps}: {signed(estimate.mean)}" for steps, estimate in points)
            for method, points in drawn.items()
        )
        + ".",
    )


@figure_style()
def ladder_chart(ladder: Ladder) -> Chart:
    """Loss against compute over the sizes of a model, on logarithmic axes."""
    curves = [
        _line(
            np.array([point.flops for point in points]),
            np.array([point.loss for point in points]),
            run_style(index),
            method,
        )
        for index, (method, points) in enumerate(ladder.points.items())
    ]
    figure, axes = labelled_canvas(curves)
    draw(axes, curves)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("e+", "e")))
    losses = np.concatenate([curve.y for curve in curves])
    # A logarithmic locator has powers of ten and hardly anything between 2 and 6.
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(losses.min(), losses.max())
    low, high = axes.get_ylim()
    shown = [float(tick) for tick in ticks if low <= tick <= high]
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes.set_xlabel("FLOP of the training, in matrix products")
    label_ends(axes, curves)
    return rendered(
        figure,
        curves,
        name="ladder",
        title="Validation loss of the last exit against compute, nats/token",
        caption="One point a width, mean over seeds; both axes logarithmic. "
        + " ".join(f"{method}: slope {_told(slope)}." for method, slope in ladder.slopes.items()),
        alt=f"Line chart of validation loss against training FLOPs of {len(curves)} methods.",
    )


def _line(x: np.ndarray, y: np.ndarray, style: Style, method: str) -> Curve:
    color, dash = style
    return Curve(x=x, y=y, color=color, dash=dash, width=1.6, label=_label(method))


def _label(method: str) -> str:
    """A method's name in a picture, whole."""
    return drawable(method, _MAX_LABEL)


def _name(what: str, group: Group) -> str:
    return f"{what}-{group.model}-{group.steps}"


def _mean(estimate: Estimate | None) -> float:
    return math.nan if estimate is None else estimate.mean


def _margin(estimate: Estimate | None) -> float:
    """Half the interval; nothing to draw where one seed gives none."""
    return math.nan if estimate is None or estimate.num_values < 2 else estimate.half_width


def _told(estimate: Estimate) -> str:
    margin = f" ± {number(estimate.half_width)}" if estimate.num_values > 1 and math.isfinite(estimate.high) else ""
    return f"{signed(estimate.mean)}{margin}"


def _mean_curve(row: Row) -> tuple[np.ndarray, np.ndarray]:
    finished = [cell for cell in row.cells if cell.status == "finished"]
    if not finished:
        return np.zeros(0), np.zeros(0)
    tokens = np.array([point.tokens for point in finished[0].valid])
    return tokens, np.mean([[point.loss[-1] for point in cell.valid] for cell in finished], axis=0)


def _lowest_cosines(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    steps = np.array([one["step"] for one in cell.diagnostics])
    return steps, np.array([min(e["gradient_cosine"] for e in one["exits"]) for one in cell.diagnostics])
