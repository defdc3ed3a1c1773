"""Charts as files beside the pages, and as images on them."""

from __future__ import annotations

from collections.abc import Callable

from localexit.compare.charts import budget_chart, group_charts, ladder_chart
from localexit.compare.results import budgets, groups, ladder
from localexit.report.drawing import Chart
from results_parts.found import NOT_RUN, ROOT, cells_of, plain_group

IMAGES = ROOT / "docs" / "images"


def of_group(setting: str, model: str, steps: str) -> tuple[Chart, ...]:
    group = plain_group(setting, model, int(steps))
    return group_charts(group) if group else ()


def of_budgets(setting: str, model: str) -> tuple[Chart, ...]:
    charts = (budget_chart(found) for found in budgets(groups(cells_of(setting))) if found[0].model == model)
    return tuple(chart for chart in charts if chart is not None)


def of_ladder(setting: str) -> tuple[Chart, ...]:
    found = ladder(cells_of(setting))
    return () if found is None else (ladder_chart(found),)


CHARTS: dict[str, Callable[..., tuple[Chart, ...]]] = {
    "pictures": of_group,
    "budget-picture": of_budgets,
    "ladder-picture": of_ladder,
}


def shown(kind: str, setting: str, *arguments: str) -> str:
    """A setting's charts as images; `write` makes the files."""
    charts = CHARTS[kind](setting, *arguments)
    return "\n\n".join(f"![{chart.alt}](images/{_file(setting, chart)})" for chart in charts) or NOT_RUN


def write(kind: str, setting: str, *arguments: str) -> None:
    """Write the files that `shown` names."""
    for chart in CHARTS[kind](setting, *arguments):
        (IMAGES / _file(setting, chart)).write_bytes(chart.standalone_svg())


def _file(setting: str, chart: Chart) -> str:
    return f"{setting}-{chart.name}.svg"
