"""Run directories to one HTML page that needs nothing but itself.

Everything that comes from a run is data. Each expression of the template passes through `visible`, which
spells out what would hide or reorder text, and is then escaped; pictures are images, which cannot run scripts;
and the page's own policy forbids scripts and network.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from localexit._files import check_output
from localexit._text import visible

from . import text
from .plots import comparison_charts
from .runs import Run, read_run
from .summary import NUM_LAST_TRAIN_RECORDS, are_losses_comparable, comparability_warnings
from .views import run_views


def write_report(run_dirs: Sequence[Path], *, output: Path | None = None) -> Path:
    """Write one self-contained HTML page about one or several run directories, and its charts as PNG files.

    Equal files give an equal page. The charts go to `plots/` beside the page: of a single run all of them, of
    several runs those that lay them over each other.

    Args:
        run_dirs: folders that `localexit train` wrote.
        output: the page to write, replaced if it exists; `report.html` in the folder of a single run if None.

    Returns:
        The page's path.

    Raises:
        ValueError: no folder, one given twice, one that cannot be read, or several without `output`.
        TypeError: a single path in place of a sequence.
    """
    runs = [read_run(path) for path in _checked(run_dirs)]
    page = _page_path(runs, output)
    views = run_views(runs)
    overlay = comparison_charts(runs, [f"{view.key}  {view.label}" for view in views]) if len(runs) > 1 else ()
    html = (
        environment()
        .get_template("report.html.jinja")
        .render(
            views=views,
            overlay=overlay,
            warnings=comparability_warnings(runs, [view.key for view in views]),
            are_losses_comparable=are_losses_comparable(runs),
            num_last_train_records=NUM_LAST_TRAIN_RECORDS,
        )
    )
    plots = page.parent / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for chart in overlay or views[0].charts:
        replace_file(plots / f"{chart.name}.png", chart.png())
    replace_file(page, html.encode())
    return page


def environment(*packages: str) -> Environment:
    """The template engine: unknown names are errors, every expression is made visible and escaped.

    Args:
        packages: with templates of their own, looked at before the report's.
    """
    engine = Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in (*packages, "localexit.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_neutralised,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters |= {
        "number": text.number,
        "signed": text.signed,
        "percent": text.percent,
        "count": text.count,
        "duration": text.duration,
        "data_uri": _data_uri,
    }
    return engine


def _checked(run_dirs: Sequence[Path]) -> Sequence[Path]:
    if isinstance(run_dirs, str | os.PathLike):
        raise TypeError(f"run_dirs: expected a sequence of folders, got {run_dirs!r}; put it into a list")
    paths = [Path(path).resolve() for path in run_dirs]
    if not paths:
        raise ValueError("run_dirs: expected at least one run directory, got none; pass one")
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise ValueError(f"run_dirs: expected different folders, got {str(path)!r} twice; pass it once")
    return paths


def _page_path(runs: Sequence[Run], output: Path | None) -> Path:
    if output is None and len(runs) > 1:
        raise ValueError(f"output: expected a file to write for {len(runs)} runs, got None; name one")
    page = runs[0].path / "report.html" if output is None else Path(output)
    check_output("output", page)
    return page


def replace_file(path: Path, content: bytes) -> None:
    """Write whole or not at all: a browser may be reading the old one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _neutralised(value: object) -> object:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
