"""Write the tables of docs/costs.md from formulas and the files in benchmarks/results, as performance_page.py does.

python benchmarks/costs_page.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.ticker import NullLocator

import costs_formulas
from localexit.report.drawing import titled
from localexit.report.theme import FAINT, canvas, figure_style, run_style, to_svg
from pages import markdown_table, measured_on, rewritten

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "costs.md"
FIGURE = ROOT / "docs" / "images" / "steps-gpu.svg"
RESULTS = ROOT / "benchmarks" / "results"
Content = dict[str, Any]

RULE = "transport_sampled"
WAYS = ("plain", "compiled", "graph", "compiled, graph")


def results(name: str) -> Content:
    content: Content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def memory(content: Content, digits: int, slope_digits: int) -> str:
    """Peaks over the number of blocks, MiB."""
    cells = content["memory"]
    depths = list(next(iter(cells.values()))["peak_bytes"])
    rows = [
        (
            kind,
            *(f"{cell['peak_bytes'][depth] / 2**20:.{digits}f}" for depth in depths),
            # Not -0.0, which a fit gives.
            f"{abs(cell['bytes_a_block']) / 2**20:.{slope_digits}f}",
        )
        for kind, cell in cells.items()
    ]
    head = ("peak of the activations, MiB, at", *depths[:-1], f"{depths[-1]} blocks", "a block more")
    return f"{markdown_table(head, rows)}\n\n{measured_on(content, 'memory')}"


def largest(content: Content) -> str:
    """Most blocks that train in some memory, in brackets their parameters; the most first."""
    cells = content["largest"]
    budgets = list(next(iter(cells.values()))["blocks"])
    rows = [
        (
            kind,
            *(f"{cell['blocks'][b]} ({cell['parameters'][b] / 1e9:.2f} B)" for b in budgets),
            f"{cell['bytes_a_block'] / 2**20:.0f}",
        )
        for kind, cell in sorted(cells.items(), key=lambda item: item[1]["bytes_a_block"])
    ]
    head = ("", *(f"{b} GiB" for b in budgets), "MiB a block")
    return f"{markdown_table(head, rows)}\n\n{measured_on(content, 'largest')}"


def times(content: Content) -> str:
    """ms a step of the usual rule, against backprop with the same losses or with the one at the top."""
    cells = [cell for name, cell in content["time"].items() if name.endswith(f", {RULE}")]
    rows = [
        (found[0]["name"], *map(time_of, found)) for found in zip(*(cell["results"] for cell in cells), strict=True)
    ]
    return f"{markdown_table(('ms a step', *map(sizes, cells)), rows)}\n\n{measured_on(content, 'time')}"


def time_of(row: Content) -> str:
    """With what it is compared with."""
    ms, of_top = f"{row['median_ms']:.1f}", f"{row['of_top']:.2f}× backprop"
    if row["name"] == "local, every block":
        return f"{ms} ({row['faster_than_every_exit']:.2f}× faster than the line above)"
    return f"{ms} ({of_top})" if row["name"].startswith("local") else ms


def sizes(cell: Content) -> str:
    shape = cell["shape"]
    tokens = f"{shape['batch_size']}×{shape['context']} tokens"
    return f"D={shape['hidden_size']} V={shape['vocab_size']}, {tokens}"


def other_rules(content: Content) -> str:
    """The same of an exit on every block with other rules."""
    cells: dict[str, list[Content]] = {}
    for name, cell in content["time"].items():
        rule = name.rpartition(", ")[2]
        if rule != RULE:
            cells.setdefault(rule, []).append(cell)
    rows = []
    for rule, of_shapes in cells.items():
        found = [next(row for row in cell["results"] if row["name"] == "local, every block") for cell in of_shapes]
        rows.append((f"`{rule}`", *(f"{row['median_ms']:.1f} ({row['faster_than_every_exit']:.2f}×)" for row in found)))
    return markdown_table(("an exit on every block", *map(sizes, next(iter(cells.values())))), rows)


def steps(content: Content) -> str:
    """ms and tokens/s of each way to train."""
    rows = [
        (
            name,
            *(f"{ways[way]['median_ms']:.1f} · {ways[way]['tokens_per_second']:,.0f}" for way in WAYS),
            f"{ways['plain']['median_ms'] / ways['compiled, graph']['median_ms']:.1f}×",
        )
        for name, ways in content["settings"].items()
    ]
    head = ("ms a step · tokens/s", "plain", "`--compile`", "`--cuda-graph`", "both", "both over plain")
    return f"{markdown_table(head, rows)}\n\n{measured_on(content)}"


@figure_style()
def figure(content: Content) -> bytes:
    """Time of a step, a line a setting, each way a point on it."""
    settings = content["settings"]
    drawn, axes = canvas(8.4, 0.9 + 0.28 * len(settings), left=2.6)
    colors = [run_style(index)[0] for index in range(len(WAYS))]
    places = range(len(settings), 0, -1)
    times = {way: [ways[way]["median_ms"] for ways in settings.values()] for way in WAYS}
    ends = [(min(of_setting), max(of_setting)) for of_setting in zip(*times.values(), strict=True)]
    axes.hlines(places, *zip(*ends, strict=True), color=FAINT.light, linewidth=1)
    for (way, of_way), color in zip(times.items(), colors, strict=True):
        axes.plot(of_way, places, color=color.light, marker="o", markersize=5, linestyle="none", label=way)
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    axes.set_yticks(list(places), list(settings))
    axes.set_xlabel("ms a step")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(WAYS), frameon=False)
    shown = ", ".join(f"{name} {ways['plain']['median_ms']:.1f}" for name, ways in settings.items())
    title = f"Points for the ms of a step: plain, compiled, from a graph, and both, which takes least; plain: {shown}"
    return titled(to_svg(drawn, colors), f"{title}.")


BLOCKS: dict[str, Callable[[], str]] = {
    "costs": costs_formulas.tables,
    "depth-cpu-memory": lambda: memory(results("depth_cpu"), 1, 3),
    "depth-gpu-memory": lambda: memory(results("depth_gpu"), 0, 1),
    "depth-gpu-largest": lambda: largest(results("depth_gpu")),
    "depth-gpu-times": lambda: times(results("depth_gpu")),
    "depth-gpu-rules": lambda: other_rules(results("depth_gpu")),
    "steps": lambda: steps(results("steps_gpu")),
}


def written(text: str) -> str:
    """The page with its tables made anew."""
    return rewritten(text, lambda name: BLOCKS[name]())


def main() -> None:
    FIGURE.write_bytes(figure(results("steps_gpu")))
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
