"""Cells to tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Container

from localexit.compare.cells import Cell
from localexit.compare.methods import BACKPROP, EXACT, Method
from localexit.compare.results import Group, Row, budgets, groups, ladder
from localexit.compare.statistics import Estimate
from localexit.compare.table import seeds
from localexit.train.presets import PRESETS
from pages import markdown_table
from results_parts.found import NOT_RUN, cells_of, group_of, has_structure, plain_group, row_of

_CODES = "dense:rank=512@unembedding_init=codes"
# Setting, model, steps, method, and what the last exit may end above exact local exits, nats/token.
TARGETS = (
    *(("b0", "mini", 400, "mirror_sampled", 0.01), ("b1", "small", 400, "mirror_sampled", 0.01)),
    *(("b1-packages", "small", steps, "mirror_sampled", 0.01) for steps in (400, 1600)),
    *((setting, "small", 400, "anchors:num_anchors=128", 0.05) for setting in ("b1", "b1-packages")),
    ("b1", "small", 400, "anchors_shared", 0.05),
    *(("b1-packages", "small", steps, "anchors_shared", 0.05) for steps in (400, 1600)),
    ("b1", "small", 400, _CODES, 0.3),
    ("b1-packages", "small", 400, _CODES, 0.3),
)


def results(setting: str, model: str, steps: str) -> str:
    group = plain_group(setting, model, int(steps))
    if group is None:
        return NOT_RUN
    head = ("method", "first exit", "last exit", "to exact local", "to backprop", "seeds", "state KiB", "MFLOP an exit")
    return markdown_table(head, [_result(row) for row in group.rows])


def _result(row: Row) -> tuple[str, ...]:
    first, last = (f"{row.losses[i]:.3f}" if row.losses else "diverged" for i in (0, -1))
    costs = (f"{row.feedback_bytes / 1024:,.0f}", f"{row.exit_flops / 1e6:.2f}")
    return (f"`{row.method}`", first, last, told(row.to_exact), told(row.to_backprop), seeds(row), *costs)


def structures(setting: str, model: str, steps: str) -> str:
    """Exits of other kinds and in other places, beside end-to-end backprop and exact exits on every block."""
    group = group_of(setting, model, int(steps))
    rows = () if group is None else group.rows
    if not any(map(has_structure, rows)):
        return NOT_RUN
    head = ("method", "exits", "last exit", "to exact local", "to backprop", "seeds", "MFLOP a token", "M parameters")
    shown = [row for row in rows if has_structure(row) or row.method in (EXACT, BACKPROP, "backprop_all")]
    return markdown_table(head, [_structure(row) for row in shown])


def _structure(row: Row) -> tuple[str, ...]:
    cell = row.cells[0]
    last = f"{row.losses[-1]:.3f}" if row.losses else "diverged"
    costs = (f"{cell.flops_per_token / 1e6:.0f}", f"{cell.num_parameters / 1e6:.1f}")
    what = (f"`{row.method}`", str(len(row.losses)), last)
    return (*what, told(row.to_exact), told(row.to_backprop), seeds(row), *costs)


def budget_table(setting: str, model: str) -> str:
    """Differences to exact local exits by budget, of methods that have more than one."""
    found = next((gs for gs in budgets(groups(cells_of(setting))) if gs[0].model == model), ())
    if not found:
        return NOT_RUN
    head = ("method", *(f"{group.steps} steps" for group in found))
    methods = dict.fromkeys(row.method for group in reversed(found) for row in group.rows)
    lines = [(f"`{method}`", *(_at_budget(group, method) for group in found)) for method in methods]
    return markdown_table(head, [line for line in lines if line.count("") < len(found) - 1])


def _at_budget(group: Group, method: str) -> str:
    row = next((row for row in group.rows if row.method == method), None)
    if row is None or row.loss is None:
        return ""
    return f"{row.loss.mean:.3f} nats/token" if method == EXACT else told(row.to_exact)


def diagnosis(setting: str, model: str, steps: str) -> str:
    group = plain_group(setting, model, int(steps))
    rows = [] if group is None else [line for row in group.rows for line in _diagnoses(row)]
    head = ("method", "step", "blocks' gradient", "of a batch", "token cosine", "norm ratio", "bias", "cosine with W")
    return markdown_table(head, rows) if rows else NOT_RUN


def _diagnoses(row: Row) -> list[tuple[str, ...]]:
    cell = next((cell for cell in row.cells if cell.diagnostics), None)
    lines = []
    for one in () if cell is None else cell.diagnostics:
        worst = min(one["exits"], key=lambda exit_: exit_["gradient_cosine"])
        names = ("gradient_cosine", "batch_gradient_cosine", "feedback_cosine", "norm_ratio", "bias_ratio")
        cosine = "" if one["rows_cosine"] is None else f"{one['rows_cosine']:.3f}"
        lines.append((f"`{row.method}`", str(one["step"]), *(f"{worst[name]:.3f}" for name in names), cosine))
    return lines


def targets() -> str:
    rows = []
    for setting, model, steps, method, limit in TARGETS:
        row = row_of(setting, model, steps, method)
        estimate = None if row is None else row.to_exact
        what = (f"`{method}`", f"{setting.split('+')[0]}, {steps} steps", f"≤ {limit}")
        rows.append((*what, told(estimate) or "not run", verdict(estimate, limit)))
    return markdown_table(("method", "setting", "target", "measured", "verdict"), rows)


def verdict(estimate: Estimate | None, limit: float) -> str:
    """Whether a difference keeps a limit, with the whole interval."""
    if estimate is None:
        return ""
    return {"below": "reached", "above": "missed", "unresolved": "unresolved"}[estimate.against(limit)]


def ladder_table(setting: str) -> str:
    """Every width and method, with what its training cost."""
    found = groups(cells_of(setting))
    if len({group.model for group in found}) < 2:
        return NOT_RUN
    head = ("D", "steps", "method", "last exit", "to exact local", "to backprop", "seeds", "PFLOP")
    found = tuple(sorted(found, key=lambda group: PRESETS[group.model].hidden_size))
    return markdown_table(head, [_rung(group, row) for group in found for row in group.rows])


def _rung(group: Group, row: Row) -> tuple[str, ...]:
    last = f"{row.losses[-1]:.3f}" if row.losses else "diverged"
    what = (str(PRESETS[group.model].hidden_size), str(group.steps), f"`{row.method}`", last)
    return (*what, told(row.to_exact), told(row.to_backprop), seeds(row), f"{row.training_flops / 1e15:.2f}")


def slopes(setting: str) -> str:
    found = ladder(cells_of(setting))
    if found is None:
        return NOT_RUN
    rows = [(f"`{method}`", str(len(found.points[method])), told(slope)) for method, slope in found.slopes.items()]
    return markdown_table(("method", "widths", "slope"), rows)


def sweep(setting: str, base: str, model: str, steps: str) -> str:
    """Losses over learning rate and size of W at the start, and below how far the best is from exact local exits.

    Args:
        setting: of the sweep.
        base: where exact local exits are, of the same text.
        model, steps: whose.
    """
    if not cells_of(setting):
        return NOT_RUN
    group = group_of(f"{setting}+{base}", model, int(steps))
    apart = (Method.parse(cell.method).apart() for cell in cells_of(setting))
    points = {} if group is None else _points(group, {str(method) for method, numbers in apart if numbers})
    stds = sorted({std for _, _, std in points})
    head = ("method", "learning rate", *(f"sd {std:g}" for std in stds))
    lines = dict.fromkeys((method, lr) for method, lr, _ in sorted(points))
    return markdown_table(
        head,
        [(f"`{method}`", f"{lr:g}", *(_tried(points.get((method, lr, std))) for std in stds)) for method, lr in lines],
    )


def _points(group: Group, swept: Container[str]) -> dict[tuple[str, float, float], Row]:
    """By method, learning rate and size of W, of methods that were swept: a cell of the sweep, else a tuned one."""
    rows = [(*Method.parse(row.method).apart(), row) for row in group.rows]
    # What comes later stays: the sweep's own.
    rows.sort(key=lambda found: bool(found[1]))
    return {
        (str(method), row.cells[0].config["lr"], row.cells[0].config["unembedding_std"]): row
        for method, _, row in rows
        if str(method) in swept
    }


def _tried(row: Row | None) -> str:
    if row is None:
        return ""
    if row.loss is None:
        return "diverged"
    return f"{row.loss.mean:.3f}" + ("" if row.to_exact is None else f", {row.to_exact.mean:+.3f}")


def provenance(setting: str) -> str:
    cells = cells_of(setting)
    if not cells:
        return NOT_RUN
    loads = [load for cell in cells for load in cell.load_average]
    kinds = {
        "device": {cell.device for cell in cells},
        "torch": {cell.versions["torch"] for cell in cells},
        "commit": {cell.commit for cell in cells},
        "text": {_text(cell) for cell in cells},
    }
    told_kinds = "; ".join(f"{name}: {', '.join(sorted(values))}" for name, values in kinds.items())
    return f"{len(cells)} cells; {told_kinds}; load average {min(loads):.1f} to {max(loads):.1f}."


def _text(cell: Cell) -> str:
    text = cell.corpus
    size = f"{text['num_files']:,} files, {text['num_bytes'] / 1e6:.1f} MB"
    tokens = f"{text['train_tokens'] / 1e6:.1f} M training tokens at V={text['vocab_size']}"
    return f"{text['name']} ({size}, {tokens}, sha256 {text['sha256'][:12]})"


def told(estimate: Estimate | None) -> str:
    """A difference with half its 95 % interval; in brackets where its sign is not resolved."""
    if estimate is None:
        return ""
    margin = f" ± {estimate.half_width:.3f}" if math.isfinite(estimate.half_width) else ""
    text = f"{estimate.mean:+.3f}{margin}"
    return f"({text})" if estimate.against() == "unresolved" else text
