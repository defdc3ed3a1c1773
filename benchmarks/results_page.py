"""Write the tables of docs/results.md, docs/rules.md and the README from the cells in benchmarks/results.

    python benchmarks/results_page.py

Every table stands between `<!-- cells: … -->` and `<!-- end -->`; what is outside is left alone. With
`--tune SETTING CELLS` the best settings of a sweep go into the package's tuned.json instead.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from localexit._rules import feedback_names
from localexit.compare.cells import Cell, read_cells
from localexit.compare.charts import group_charts
from localexit.compare.methods import BACKPROP, EXACT, Method
from localexit.compare.results import Group, Row, best_settings, groups, ladder
from localexit.compare.statistics import Estimate
from localexit.compare.table import seeds
from localexit.report.drawing import Chart

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
TUNED = ROOT / "src" / "localexit" / "compare" / "tuned.json"
# Setting, model and steps behind the columns A and B of the README and of docs/rules.md.
COLUMNS = {"A": ("b0", "mini", 400), "B": ("b1", "small", 400)}
# Setting, model, steps, method, and what the last exit may end above exact local exits, nats/token.
TARGETS = (
    *(("b0", "mini", 400, "mirror_sampled", 0.01), ("b1", "small", 400, "mirror_sampled", 0.01)),
    *(("b1", "small", 1600, "mirror_sampled", 0.01), ("b1", "small", 400, "anchors:num_anchors=128", 0.05)),
)
NOT_MEASURED = "Not measured yet."
_BLOCK = re.compile(r"(<!-- cells: ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def cells_of(setting: str) -> list[Cell]:
    """The committed cells of a setting; none when there is no file."""
    path = RESULTS / f"{setting}.jsonl"
    return read_cells(path) if path.is_file() else []


def group_of(setting: str, model: str, steps: int) -> Group | None:
    return next((g for g in groups(cells_of(setting)) if (g.model, g.steps) == (model, steps)), None)


def results_table(setting: str, model: str, steps: str) -> str:
    group = group_of(setting, model, int(steps))
    if group is None:
        return NOT_MEASURED
    head = ("method", "first exit", "last exit", "to exact local", "to backprop", "seeds", "state KiB", "MFLOP an exit")
    return markdown(head, [_result(row) for row in group.rows])


def _result(row: Row) -> tuple[str, ...]:
    first, last = (f"{row.losses[i]:.3f}" if row.losses else "diverged" for i in (0, -1))
    costs = (f"{row.feedback_bytes / 1024:,.0f}", f"{row.exit_flops / 1e6:.2f}")
    return (f"`{row.method}`", first, last, told(row.to_exact), told(row.to_backprop), seeds(row), *costs)


def diagnosis_table(setting: str, model: str, steps: str) -> str:
    group = group_of(setting, model, int(steps))
    rows = [] if group is None else [line for row in group.rows for line in _diagnoses(row)]
    head = ("method", "step", "blocks' gradient", "of a batch", "token cosine", "norm ratio", "bias", "cosine with W")
    return markdown(head, rows) if rows else NOT_MEASURED


def _diagnoses(row: Row) -> list[tuple[str, ...]]:
    cell = next((cell for cell in row.cells if cell.diagnostics), None)
    lines = []
    for one in () if cell is None else cell.diagnostics:
        worst = min(one["exits"], key=lambda exit_: exit_["gradient_cosine"])
        names = ("gradient_cosine", "batch_gradient_cosine", "feedback_cosine", "norm_ratio", "bias_ratio")
        cosine = "" if one["rows_cosine"] is None else f"{one['rows_cosine']:.3f}"
        lines.append((f"`{row.method}`", str(one["step"]), *(f"{worst[name]:.3f}" for name in names), cosine))
    return lines


def pictures(setting: str, model: str, steps: str) -> str:
    """The setting's charts as images; `main` writes the files."""
    charts = charts_of(setting, model, int(steps))
    return "\n\n".join(f"![{chart.alt}](images/{path.name})" for path, chart in charts.items()) or NOT_MEASURED


def charts_of(setting: str, model: str, steps: int) -> dict[Path, Chart]:
    group = group_of(setting, model, steps)
    charts = group_charts(group) if group else ()
    return {IMAGES / f"{setting}-{chart.name}.svg": chart for chart in charts}


def targets_table() -> str:
    rows = []
    for setting, model, steps, method, limit in TARGETS:
        group = group_of(setting, model, steps)
        row = next((row for row in group.rows if row.method == method), None) if group else None
        estimate = None if row is None else row.to_exact
        what = (f"`{method}`", f"{setting}, {steps} steps", f"≤ {limit}")
        rows.append((*what, told(estimate) or "not measured", verdict(estimate, limit)))
    return markdown(("method", "setting", "target", "measured", "verdict"), rows)


def verdict(estimate: Estimate | None, limit: float) -> str:
    """Whether a difference keeps a limit, with the whole interval."""
    if estimate is None:
        return ""
    return {"below": "reached", "above": "missed", "unresolved": "unresolved"}[estimate.against(limit)]


def ladder_table(setting: str) -> str:
    found = ladder(cells_of(setting))
    if found is None:
        return NOT_MEASURED
    rows = [
        (f"`{method}`", *(f"{point.loss:.3f} ({point.flops:.1e} FLOP)" for point in points), told(found.slopes[method]))
        for method, points in found.points.items()
    ]
    sizes = max(len(points) for points in found.points.values())
    return markdown(("method", *(f"size {index + 1}" for index in range(sizes)), "slope"), rows)


def provenance(setting: str) -> str:
    cells = cells_of(setting)
    if not cells:
        return NOT_MEASURED
    loads = [load for cell in cells for load in cell.load_average]
    kinds = {
        "device": {cell.device for cell in cells},
        "torch": {cell.versions["torch"] for cell in cells},
        "commit": {cell.commit for cell in cells},
        "text": {f"{cell.corpus['name']}, sha256 {cell.corpus['sha256'][:12]}" for cell in cells},
    }
    told_kinds = "; ".join(f"{name}: {', '.join(sorted(values))}" for name, values in kinds.items())
    return f"{len(cells)} cells; {told_kinds}; load average {min(loads):.1f} to {max(loads):.1f}."


def told(estimate: Estimate | None) -> str:
    """A difference with half its 95 % interval; in brackets where its sign is not resolved."""
    if estimate is None:
        return ""
    margin = f" ± {estimate.half_width:.3f}" if estimate.num_values > 1 else ""
    text = f"{estimate.mean:+.3f}{margin}"
    return f"({text})" if estimate.against() == "unresolved" else text


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


BLOCKS = {
    "results": results_table,
    "diagnosis": diagnosis_table,
    "pictures": pictures,
    "targets": targets_table,
    "ladder": ladder_table,
    "provenance": provenance,
}


def with_tables(text: str) -> str:
    """A page with all its blocks written anew."""

    def written(found: re.Match[str]) -> str:
        kind, *arguments = found[2].split()
        return f"{found[1]}{BLOCKS[kind](*arguments)}\n{found[3]}"

    return _BLOCK.sub(written, text)


def with_columns(text: str, columns: dict[str, dict[str, str]]) -> str:
    """A page whose table of rules has these values, by title of the column and rule; the rest stays."""
    lines = text.splitlines(keepends=True)
    titles: list[str] = []
    for number, line in enumerate(lines):
        if not line.startswith("|"):
            titles = []
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not titles:
            titles = cells
        rule = cells[0].strip("`")
        if titles[0] != "rule" or not any(rule in values for values in columns.values()):
            continue
        new = [columns.get(title, {}).get(rule, cell) for title, cell in zip(titles, cells, strict=True)]
        lines[number] = re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(new)} |\n")
    return "".join(lines)


def rule_columns(*, with_options: bool) -> dict[str, dict[str, str]]:
    """Columns A and B by rule, for settings that have cells.

    Of a rule's methods without settings of their own that with the most seeds is taken, and of those the best.
    """
    missing = "not measured" if with_options else ""
    columns: dict[str, dict[str, str]] = {}
    for letter, place in COLUMNS.items():
        group = group_of(*place)
        if group is None:
            continue
        values = dict.fromkeys((*feedback_names(), BACKPROP), missing)
        # Most seeds first, then best first; what comes first stays.
        for row in sorted(group.rows, key=lambda row: -len(row.seeds)):
            method = Method.parse(row.method)
            is_told = row.method == EXACT or row.to_exact is not None
            if is_told and not method.settings and values.get(method.name) == missing:
                options = ", ".join(f"{key}={value}" for key, value in method.options)
                values[method.name] = told_shortly(row) + (f" ({options})" if options and with_options else "")
        columns[f"{letter}: difference" if with_options else letter] = values
    return columns


def told_shortly(row: Row) -> str:
    """The difference to exact local exits as one number."""
    return "0" if row.to_exact is None else f"{row.to_exact.mean:+.3f}"


def pages() -> dict[Path, str]:
    """Every page with numbers from cells, as it should be."""
    results, rules, readme = ROOT / "docs/results.md", ROOT / "docs/rules.md", ROOT / "README.md"
    texts = {path: path.read_text(encoding="utf-8") for path in (results, rules, readme)}
    return {
        results: with_tables(texts[results]),
        rules: with_columns(texts[rules], rule_columns(with_options=True)),
        readme: with_columns(texts[readme], rule_columns(with_options=False)),
    }


def tune(setting: str, paths: Sequence[Path]) -> None:
    """Put the best settings of sweeps into tuned.json."""
    values = json.loads(TUNED.read_text(encoding="utf-8"))
    values[setting] |= best_settings([cell for path in paths for cell in read_cells(path)])
    TUNED.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tune", nargs="+", metavar=("SETTING", "CELLS"), help="write tuned.json from sweeps' cells")
    options = parser.parse_args(arguments)
    if options.tune:
        tune(options.tune[0], [Path(path) for path in options.tune[1:]])
        return
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        for place in re.findall(r"<!-- cells: pictures (\w+) (\S+) (\d+) -->", text):
            for image, chart in charts_of(place[0], place[1], int(place[2])).items():
                image.write_bytes(chart.standalone_svg())


if __name__ == "__main__":
    main()
