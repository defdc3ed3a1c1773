"""Write what docs/results.md, docs/rules.md and the README tell of the cells in benchmarks/results.

    python benchmarks/results_page.py

Every table, picture and number stands between `<!-- cells: … -->` and `<!-- end -->`; what is outside is left alone.
With `--tune SETTING CELLS` the best settings of a sweep go into the package's tuned.json instead.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from localexit._rules import feedback_names
from localexit.compare.cells import read_cells
from localexit.compare.methods import BACKPROP, EXACT, Method
from localexit.compare.results import Row, best_settings
from results_parts import pictures, tables, values
from results_parts.found import ROOT, plain_group

TUNED = ROOT / "src" / "localexit" / "compare" / "tuned.json"
# Setting, model and steps behind the columns A and B of the README and of docs/rules.md.
COLUMNS = {"A": ("b0", "mini", 400), "B": ("b1-packages", "small", 400)}
# What may stand between the marks: a block of its own lines, or a number in the middle of one.
PARTS: dict[str, Callable[..., str]] = {
    "results": tables.results,
    "structures": tables.structures,
    "budgets": tables.budget_table,
    "diagnosis": tables.diagnosis,
    "targets": tables.targets,
    "ladder": tables.ladder_table,
    "slopes": tables.slopes,
    "sweep": tables.sweep,
    "provenance": tables.provenance,
    **{kind: partial(pictures.shown, kind) for kind in pictures.CHARTS},
    "difference": values.difference,
    "to-backprop": values.to_backprop,
    "cosine": values.cosine,
}
_PART = re.compile(r"(<!-- cells: ([^>]*?) -->)(\n?)(.*?)(<!-- end -->)", re.DOTALL)


def with_parts(text: str) -> str:
    """A page with all its blocks and numbers written anew."""

    def written(found: re.Match[str]) -> str:
        kind, *arguments = found[2].split()
        return f"{found[1]}{found[3]}{PARTS[kind](*arguments)}{found[3]}{found[5]}"

    return _PART.sub(written, text)


def without_parts(text: str) -> str:
    """What of a page is written by hand."""
    return _PART.sub("", text)


def pictures_of(text: str) -> Iterator[list[str]]:
    """The kind and the arguments of every block of pictures on a page."""
    places = (found[2].split() for found in _PART.finditer(text))
    return (place for place in places if place[0] in pictures.CHARTS)


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
        group = plain_group(*place)
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
    return "0" if row.to_exact is None else f"{round(row.to_exact.mean, 3) + 0.0:+.3f}"


def pages() -> dict[Path, str]:
    """Every page with numbers from cells, as it should be."""
    results, rules, readme = ROOT / "docs/results.md", ROOT / "docs/rules.md", ROOT / "README.md"
    texts = {path: path.read_text(encoding="utf-8") for path in (results, rules, readme)}
    return {
        results: with_parts(texts[results]),
        rules: with_columns(texts[rules], rule_columns(with_options=True)),
        readme: with_parts(with_columns(texts[readme], rule_columns(with_options=False))),
    }


def tune(setting: str, paths: Sequence[Path]) -> None:
    """Put the best settings of sweeps into tuned.json."""
    values = json.loads(TUNED.read_text(encoding="utf-8"))
    values[setting] |= best_settings([cell for path in paths for cell in read_cells(path)])
    TUNED.write_text(tuned_text(values), encoding="utf-8")


def tuned_text(values: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """JSON with a line for each method, which differences of versions show best."""
    settings = [
        f"  {json.dumps(setting)}: {{\n"
        + ",\n".join(f"    {json.dumps(name)}: {json.dumps(of[name], sort_keys=True)}" for name in sorted(of))
        + "\n  }"
        for setting, of in values.items()
    ]
    return "{\n" + ",\n".join(settings) + "\n}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tune", nargs="+", metavar=("SETTING", "CELLS"), help="write tuned.json from sweeps' cells")
    options = parser.parse_args(arguments)
    if options.tune:
        tune(options.tune[0], [Path(path) for path in options.tune[1:]])
        return
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        for place in pictures_of(text):
            pictures.write(*place)


if __name__ == "__main__":
    main()
