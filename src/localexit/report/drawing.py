"""What charts are made of: curves, axes that survive any number, labels at the ends of curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Literal
from xml.sax.saxutils import escape

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .curves import last_finite, spread
from .records import Floats, Ints
from .text import compact
from .theme import (
    FONT_SIZE,
    INK,
    MUTED,
    POINTS_PER_INCH,
    Color,
    Dash,
    canvas,
    figure_style,
    text_inches,
    to_png,
    to_svg,
)

WIDE = (9.2, 4.8)
SMALL = (4.5, 2.9)
_LINE_HEIGHT = 1.25 * FONT_SIZE
# Inches right of the axes of a wide figure, enough for labels of 28 characters; and where labels begin, in widths of
# the axes.
_LABEL_ROOM = 2.3
_LABEL_START = 1.045
_MAX_MARKERS = 15
_STEPS = (1, 2, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture, rendered.

    Attributes:
        name: file name without suffix.
        title: what it shows and in which unit; also written in the picture.
        caption: how to read it.
        alt: what it shows, in words.
        svg: follows the light or dark scheme of the page it is embedded in.
        is_wide: whether it wants the whole width of a page.
        figure: the drawing itself.
    """

    name: str
    title: str
    caption: str
    alt: str
    svg: bytes
    is_wide: bool
    figure: Figure

    def standalone_svg(self) -> bytes:
        """The picture with its description as a title, for a page that shows it as a file of its own."""
        return titled(self.svg, self.alt)

    def png(self) -> bytes:
        """Render the picture in the light scheme."""
        with figure_style():
            return to_png(self.figure)


def titled(svg: bytes, alt: str) -> bytes:
    """A picture with its description as a title."""
    start = svg.index(b">", svg.index(b"<svg")) + 1
    return svg[:start] + f"\n<title>{escape(alt)}</title>".encode() + svg[start:]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line over x [T], y [T]; NaN is a gap. An empty label draws no label."""

    x: Ints | Floats
    y: Floats
    color: Color
    label: str = ""
    width: float = 1.3
    opacity: float = 1.0
    dash: Dash = "solid"


def rendered(figure: Figure, curves: Sequence[Curve], *, name: str, title: str, caption: str, alt: str) -> Chart:
    """Write `title` on `figure`, on which `curves` were drawn, and render it."""
    figure.text(0.0, 1 - 0.06 / figure.get_figheight(), title, va="top", color=INK.light, weight="bold")
    return Chart(
        name=name,
        title=title,
        caption=caption,
        alt=alt,
        svg=to_svg(figure, [curve.color for curve in curves]),
        is_wide=bool(figure.get_figwidth() > SMALL[0]),
        figure=figure,
    )


def labelled_canvas(curves: Sequence[Curve]) -> tuple[Figure, Axes]:
    """A wide figure with room for the curves' labels right of the axes; what long ones need is added to its width."""
    longest = max(text_inches(curve.label) for curve in curves)
    axes_width = canvas(*WIDE, right=_LABEL_ROOM)[1].get_position().width * WIDE[0]
    # A tenth more: a browser takes the reader's own font.
    right = max(_LABEL_ROOM, (_LABEL_START - 1) * axes_width + 1.1 * longest)
    return canvas(WIDE[0] + right - _LABEL_ROOM, WIDE[1], right=right)


def draw(axes: Axes, curves: Sequence[Curve]) -> None:
    """Draw `curves`; points are marked where they are few, so that a single one is seen."""
    for curve in curves:
        has_markers = len(curve.x) <= _MAX_MARKERS
        axes.plot(
            curve.x,
            curve.y,
            color=curve.color.light,
            linewidth=curve.width,
            alpha=curve.opacity,
            linestyle=curve.dash,
            marker="o" if has_markers else "",
            markersize=1.2 + 1.4 * curve.width,
        )


def scale_steps(axes: Axes, curves: Sequence[Curve], label: str) -> None:
    """Set the x axis from 0 to the last record."""
    last = max([1, *(int(curve.x[-1]) for curve in curves if len(curve.x))])
    # Room for a marker at either end.
    axes.set_xlim(-0.01 * last, 1.01 * last)
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=_STEPS))
    axes.xaxis.set_major_formatter(_compact_ticks())


def scale_exits(axes: Axes, num_exits: int) -> None:
    """Set the x axis to the exits, first to last."""
    axes.set_xlim(-0.3, num_exits - 0.7)
    axes.set_xlabel("exit")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, steps=_STEPS))


def scale_blocks(axes: Axes, num_blocks: float) -> None:
    """Set the x axis to a number of blocks, from none to all."""
    axes.set_xlim(0, 1.02 * num_blocks)
    axes.set_xlabel("blocks a token, on average")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=_STEPS))


def scale_losses(axes: Axes, curves: Sequence[Curve], *, uniform: float | None) -> None:
    """Set the y axis to the losses; what lies far above `uniform`, the loss of a blind guess, is cut off."""
    values = _finite(curves)
    low, high = values.min(), values.max()
    ceiling = 1.3 * uniform if uniform is not None else 5 * float(np.median(values))
    high = min(high, ceiling) if low < ceiling else high
    _set_range(axes, low, high)


def scale_from_zero(axes: Axes, curves: Sequence[Curve]) -> None:
    """Set the y axis from 0 to the largest value."""
    high = float(_finite(curves).max())
    axes.set_ylim(0, 1.08 * high if high > 0 else 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=_STEPS))
    axes.yaxis.set_major_formatter(_compact_ticks())


def scale_log(axes: Axes, curves: Sequence[Curve]) -> None:
    """Set a logarithmic y axis; from 0 where some value is not positive."""
    values = _finite(curves)
    if values.min() <= 0:
        scale_from_zero(axes, curves)
        return
    axes.set_yscale("log")
    axes.set_ylim(values.min() / 1.15, values.max() * 1.15)
    is_short = values.max() < 200 * values.min()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_short else (1,), numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(_compact_ticks())


def label_ends(axes: Axes, curves: Sequence[Curve], *, strong: Literal["last", "none"] = "none") -> None:
    """Write each curve's label to the right of the axes, at the height where the curve ends.

    Call it after the axes are scaled. Labels that do not fit are left out, evenly; the last one stays.
    """
    ends = [(curve, index) for curve in curves if curve.label and (index := last_finite(curve.y)) is not None]
    axes_height = axes.bbox.height * POINTS_PER_INCH / axes.figure.dpi
    room = int(axes_height / _LINE_HEIGHT) + 1
    if len(ends) > room:
        ends = [ends[index] for index in np.linspace(0, len(ends) - 1, room).round().astype(int)]
    starts = [_place(axes, float(curve.x[index]), float(curve.y[index])) for curve, index in ends]
    heights = spread([height for _, height in starts], _LINE_HEIGHT / axes_height, 0.0, 1.0)
    for (curve, _), label_height in zip(ends, heights, strict=True):
        is_strong = strong == "last" and curve is ends[-1][0]
        axes.text(
            _LABEL_START,
            label_height,
            curve.label,
            transform=axes.transAxes,
            va="center",
            color=INK.light if is_strong else MUTED.light,
            weight="bold" if is_strong else "normal",
        )
    leaders = LineCollection(
        [[start, (1.038, label_height)] for start, label_height in zip(starts, heights, strict=True)],
        colors=[curve.color.light for curve, _ in ends],
        linewidths=0.9,
        linestyles=(0, (1, 1.5)),
        transform=axes.transAxes,
        clip_on=False,
    )
    axes.add_collection(leaders, autolim=False)


def uniform_loss(vocab_size: object) -> float | None:
    """Loss of guessing every token alike, nats/token; None if `vocab_size` is not a size."""
    is_size = isinstance(vocab_size, int) and not isinstance(vocab_size, bool) and vocab_size > 1
    return log(vocab_size) if is_size and isinstance(vocab_size, int) else None


def has_numbers(curves: Sequence[Curve]) -> bool:
    """Whether there is anything to draw."""
    return len(_finite(curves)) > 0


def _compact_ticks() -> FuncFormatter:
    return FuncFormatter(lambda value, _: compact(value))


def _finite(curves: Sequence[Curve]) -> Floats:
    values = np.concatenate([curve.y for curve in curves] or [np.zeros(0)])
    return np.asarray(values[np.isfinite(values)])


def _set_range(axes: Axes, low: float, high: float) -> None:
    margin = 0.04 * (high - low) or max(0.05 * abs(high), 0.05)
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=_STEPS))
    axes.yaxis.set_major_formatter(_compact_ticks())


def _place(axes: Axes, x: float, y: float) -> tuple[float, float]:
    """Where the point (x, y) is in the axes, from (0, 0) to (1, 1)."""
    across, height = axes.transLimits.transform(axes.transScale.transform((x, y)))
    return float(across), float(min(max(height, 0.0), 1.0))
