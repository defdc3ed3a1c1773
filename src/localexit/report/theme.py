"""How figures look, and how one figure becomes a PNG and an SVG that follows the reader's colour scheme.

Figures are drawn in the light colours. In the SVG each of them becomes a CSS variable with two values, light
and dark, so that a picture embedded as `data:` needs nothing from the page around it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.transforms import Bbox

from localexit._text import visible

FONT_SIZE = 9.0
POINTS_PER_INCH = 72.0
_FONT = "DejaVu Sans"
_SVG_FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
_PNG_DPI = 160
# inches around a picture that stands alone
_PNG_PADDING = 0.15


@dataclass(frozen=True, kw_only=True)
class Color:
    """A colour in both schemes, as `#rrggbb`."""

    light: str
    dark: str


SURFACE = Color(light="#ffffff", dark="#16191d")
INK = Color(light="#1d2126", dark="#e4e7ea")
MUTED = Color(light="#5f6770", dark="#9ba4ae")
GRID = Color(light="#e3e6ea", dark="#2c3137")
FAINT = Color(light="#aab1b9", dark="#565e67")

_RUN_COLORS = (
    Color(light="#2f6db5", dark="#6ba6ea"),
    Color(light="#c8522c", dark="#f0835c"),
    Color(light="#2a8a63", dark="#58c598"),
    Color(light="#8258b0", dark="#b592e0"),
    Color(light="#a9791a", dark="#dcae4e"),
    Color(light="#278da3", dark="#5cc3d8"),
    Color(light="#b34c87", dark="#e585b9"),
    Color(light="#6b5d52", dark="#b8a695"),
)
_DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))
Dash = str | tuple[int, tuple[float, ...]]


def exit_colors(num_exits: int) -> tuple[Color, ...]:
    """One colour per exit, by depth: the deeper, the further from the background."""
    # A single exit is the last one.
    depths = [1.0] if num_exits == 1 else [index / (num_exits - 1) for index in range(num_exits)]
    viridis = matplotlib.colormaps["viridis"]
    return tuple(
        Color(light=_hex(viridis(0.76 * (1 - depth))), dark=_hex(viridis(0.32 + 0.63 * depth))) for depth in depths
    )


def run_style(index: int) -> tuple[Color, Dash]:
    """Colour and dash pattern of a run; no two of the first 32 are the same."""
    return _RUN_COLORS[index % len(_RUN_COLORS)], _DASHES[index // len(_RUN_COLORS) % len(_DASHES)]


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw and render figures inside: fonts, colours and a fixed salt, so that equal input is equal bytes."""
    with matplotlib.rc_context(
        {
            "font.family": _FONT,
            "font.size": FONT_SIZE,
            "text.color": INK.light,
            "text.parse_math": False,
            "axes.edgecolor": FAINT.light,
            "axes.facecolor": SURFACE.light,
            "axes.labelcolor": MUTED.light,
            "axes.labelsize": FONT_SIZE,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": GRID.light,
            "grid.linewidth": 0.7,
            "xtick.color": FAINT.light,
            "ytick.color": FAINT.light,
            "xtick.labelcolor": MUTED.light,
            "ytick.labelcolor": MUTED.light,
            "xtick.labelsize": FONT_SIZE,
            "ytick.labelsize": FONT_SIZE,
            "lines.solid_capstyle": "round",
            "figure.facecolor": SURFACE.light,
            "savefig.facecolor": SURFACE.light,
            "svg.fonttype": "none",
            "svg.hashsalt": "localexit",
        }
    ):
        yield


def canvas(width: float, height: float, *, left: float = 0.56, right: float = 0.2) -> tuple[Figure, Axes]:
    """Make a figure of `width` x `height` inches with one pair of axes, `left` and `right` inches beside them."""
    bottom, top = 0.52, 0.42
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    )
    plain_axes(axes)
    return figure, axes


def plain_axes(axes: Axes) -> None:
    """Take the marks and the line of the y axis away: the grid is enough."""
    axes.tick_params(length=3)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def drawable(text: str, limit: int = 28) -> str:
    """One line of `text` for a figure: at most `limit` characters, each of which the font has."""
    glyphs = get_font(findfont(FontProperties(family=_FONT))).get_charmap()
    line = " ".join(visible(text).split())
    line = line if len(line) <= limit else f"{line[: limit - 1]}…"
    return "".join(character if ord(character) in glyphs else "□" for character in line)


def text_inches(text: str) -> float:
    """How wide a line of text is in a figure."""
    font = get_font(findfont(FontProperties(family=_FONT)))
    font.set_size(FONT_SIZE, POINTS_PER_INCH)
    font.set_text(text)
    # In 64ths of a point.
    return float(font.get_width_height()[0] / 64 / POINTS_PER_INCH)


def to_png(figure: Figure) -> bytes:
    """Render `figure` in the light scheme."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    width, height = figure.get_size_inches()
    around = Bbox.from_extents(-_PNG_PADDING, -_PNG_PADDING, width + _PNG_PADDING, height + _PNG_PADDING)
    figure.savefig(buffer, format="png", dpi=_PNG_DPI, bbox_inches=around, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure, colors: Sequence[Color]) -> bytes:
    """Render `figure` for both schemes; `colors` are those drawn besides the theme's own."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure)
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    dark = {color.light: color.dark for color in (SURFACE, INK, MUTED, GRID, FAINT, *colors)}
    svg = re.sub("#[0-9a-f]{6}", lambda found: _variable(found[0], dark), buffer.getvalue())
    return svg.replace("<defs>", f"<defs><style>{_stylesheet(dark)}</style>", 1).encode()


def _variable(light: str, dark: dict[str, str]) -> str:
    return f"var(--{light[1:]})" if light in dark else light


def _stylesheet(dark: dict[str, str]) -> str:
    light_values = "".join(f"--{light[1:]}:{light};" for light in dark)
    dark_values = "".join(f"--{light[1:]}:{value};" for light, value in dark.items())
    return (
        f"svg{{{light_values}}}text{{font-family:{_SVG_FONT}!important}}"
        f"@media screen and (prefers-color-scheme:dark){{svg{{{dark_values}}}}}"
    )


def _hex(rgba: tuple[float, float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgba[:3])
