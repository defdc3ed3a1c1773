"""Cells to rows: one method on one model with one budget, against exact local exits and against backprop."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from localexit.compare.cells import Cell, check_one_setting, check_one_text
from localexit.compare.methods import BACKPROP, EXACT, Method
from localexit.compare.statistics import Estimate, log_slope, mean_estimate, paired_difference


@dataclass(frozen=True, kw_only=True)
class Row:
    """All seeds of one method.

    Attributes:
        method: as written.
        seeds: of its finished cells.
        num_diverged: cells that did not finish.
        losses: last validation of every exit, mean over seeds, nats/token; empty when none finished.
        loss: that of the last exit.
        to_exact, to_backprop: last exit's loss minus that of exact local exits and of end-to-end backprop, paired by
            seed; None without a seed in common.
        cells: all of them.
    """

    method: str
    seeds: tuple[int, ...]
    num_diverged: int
    losses: tuple[float, ...]
    loss: Estimate | None
    to_exact: Estimate | None
    to_backprop: Estimate | None
    cells: tuple[Cell, ...]

    @property
    def tokens(self) -> int:
        """Training tokens of a run."""
        config = self.cells[0].config
        return int(config["steps"] * config["batch_size"] * config["context"] * config["accumulate"])

    @property
    def step_seconds(self) -> float:
        """Median time of a step."""
        return statistics.median(cell.step_seconds for cell in self.cells)

    @property
    def peak_bytes(self) -> int | None:
        """Most GPU memory."""
        return max((cell.peak_bytes for cell in self.cells if cell.peak_bytes is not None), default=None)

    @property
    def feedback_bytes(self) -> int:
        """Codes and state of the rule."""
        return self.cells[0].feedback_bytes

    @property
    def exit_flops(self) -> float:
        """FLOPs a token and exit, in matrix products."""
        return self.cells[0].exit_flops_per_token

    @property
    def training_flops(self) -> float:
        """FLOPs of the whole training, in matrix products."""
        return self.cells[0].flops_per_token * self.tokens


@dataclass(frozen=True, kw_only=True)
class Group:
    """All methods on one model with one budget.

    Attributes:
        model: its name.
        steps: optimiser steps.
        rows: exact local exits first, then by loss; what diverged last.
    """

    model: str
    steps: int
    rows: tuple[Row, ...]

    @property
    def tokens(self) -> int:
        """Training tokens of a run."""
        return self.rows[0].tokens

    @property
    def is_compiled(self) -> bool:
        """Whether blocks were compiled, for all methods."""
        return bool(self.rows[0].cells[0].config.get("compile", False))


@dataclass(frozen=True, kw_only=True)
class LadderPoint:
    """One size of a ladder: FLOPs of the training, and the last exit's loss, mean over seeds."""

    flops: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Loss against compute over models of different sizes.

    Attributes:
        points: by method, for methods trained on several models, by rising compute.
        slopes: exponent of the power law through these points, by method. The interval is that of their scatter about
            it: seeds of one size share what the size is off by, and make no further points.
    """

    points: Mapping[str, tuple[LadderPoint, ...]]
    slopes: Mapping[str, Estimate]


def groups(cells: Sequence[Cell]) -> tuple[Group, ...]:
    """The cells' rows, by model and budget.

    Raises:
        ValueError: cells were trained on different texts, or those of one row with different settings.
    """
    check_one_text(cells)
    check_one_setting(cells)
    names = dict.fromkeys((cell.key.model, cell.key.steps) for cell in cells)
    return tuple(
        _group(model, steps, [cell for cell in cells if (cell.key.model, cell.key.steps) == (model, steps)])
        for model, steps in names
    )


def budgets(found: Sequence[Group]) -> tuple[tuple[Group, ...], ...]:
    """Of every model that was trained with several budgets its groups, the smallest budget first."""
    models = dict.fromkeys(group.model for group in found)
    by_model = (tuple(sorted((g for g in found if g.model == m), key=lambda g: g.steps)) for m in models)
    return tuple(mine for mine in by_model if len(mine) > 1)


def _group(model: str, steps: int, cells: Sequence[Cell]) -> Group:
    methods = dict.fromkeys(cell.method for cell in cells)
    exact, backprop = (_last_losses(cells, name) for name in (EXACT, BACKPROP))
    rows = [_row(method, cells, exact, backprop) for method in methods]
    rows.sort(key=lambda row: (row.method != EXACT, row.loss is None, row.loss.mean if row.loss else 0.0))
    return Group(model=model, steps=steps, rows=tuple(rows))


def _row(method: str, cells: Sequence[Cell], exact: dict[int, float], backprop: dict[int, float]) -> Row:
    mine = [cell for cell in cells if cell.method == method]
    finished = [cell for cell in mine if cell.status == "finished"]
    last = _last_losses(cells, method)
    return Row(
        method=method,
        seeds=tuple(sorted(last)),
        num_diverged=len(mine) - len(finished),
        losses=tuple(map(statistics.fmean, zip(*(cell.loss for cell in finished), strict=True))),
        loss=mean_estimate(list(last.values())) if last else None,
        to_exact=None if method == EXACT else paired_difference(last, exact),
        to_backprop=None if method == BACKPROP else paired_difference(last, backprop),
        cells=tuple(mine),
    )


def _last_losses(cells: Sequence[Cell], method: str) -> dict[int, float]:
    """Loss of the last exit by seed."""
    return {c.key.seed: c.loss[-1] for c in cells if c.method == method and c.status == "finished"}


def ladder(cells: Sequence[Cell]) -> Ladder | None:
    """The size ladder in some cells; None where no method was trained on several models.

    Raises:
        ValueError: cells were trained on different texts, or those of one method and model with different settings.
    """
    check_one_text(cells)
    points, slopes = {}, {}
    for method in dict.fromkeys(cell.method for cell in cells):
        mine = [cell for cell in cells if cell.method == method and cell.status == "finished"]
        rows = [row for group in groups(mine) for row in group.rows] if len({c.key.model for c in mine}) > 1 else []
        if rows:
            found = [LadderPoint(flops=row.training_flops, loss=row.losses[-1]) for row in rows]
            points[method] = tuple(sorted(found, key=lambda point: point.flops))
            slopes[method] = log_slope([point.flops for point in found], [point.loss for point in found])
    return Ladder(points=points, slopes=slopes) if points else None


def best_settings(cells: Sequence[Cell]) -> dict[str, dict[str, float]]:
    """From the cells of a sweep: per method the settings with the lowest loss at the last exit, averaged over seeds.

    Settings that are numbers are what was swept; with those that are names (`unembedding_init=codes`) it is another
    method.
    """
    losses: dict[str, list[float]] = {}
    for cell in cells:
        losses.setdefault(cell.method, []).append(cell.loss[-1] if cell.status == "finished" else float("inf"))
    best: dict[str, tuple[float, dict[str, float]]] = {}
    for text, values in losses.items():
        method, numbers = Method.parse(text).apart()
        loss = statistics.fmean(values)
        if numbers and loss < best.get(str(method), (float("inf"), {}))[0]:
            best[str(method)] = loss, numbers
    return {name: settings for name, (_, settings) in best.items()}
