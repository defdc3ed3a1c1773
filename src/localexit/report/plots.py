"""Charts of one run and of several, drawn through matplotlib's objects: no pyplot, no global figure.

Each function returns `None` where the records do not allow its chart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .curves import binned, binned_columns, gapped, thinned
from .drawing import (
    SMALL,
    WIDE,
    Chart,
    Curve,
    draw,
    has_numbers,
    label_ends,
    rendered,
    scale_blocks,
    scale_exits,
    scale_from_zero,
    scale_log,
    scale_losses,
    scale_steps,
    uniform_loss,
)
from .records import Floats, TrainRecords, ValidRecords
from .runs import Run
from .summary import are_losses_comparable, totals
from .text import compact, count, number
from .theme import FAINT, INK, MUTED, canvas, drawable, exit_colors, figure_style, run_style

_SMALL_POINTS = 100


def run_charts(run: Run) -> tuple[Chart, ...]:
    """Every chart of one run."""
    charts = (
        learning_curves(run),
        loss_by_depth(run),
        early_exit_loss(run),
        early_exit_accuracy(run),
        gradient_cosines(run),
        gradient_norms(run),
        throughput(run),
        learning_rate(run),
    )
    return tuple(chart for chart in charts if chart is not None)


def comparison_charts(runs: Sequence[Run], labels: Sequence[str]) -> tuple[Chart, ...]:
    """Every chart of several runs, called by `labels`."""
    charts = (last_exit_curves(runs, labels), losses_by_depth(runs, labels))
    return tuple(chart for chart in charts if chart is not None)


@figure_style()
def learning_curves(run: Run) -> Chart | None:
    """Training (faint) and validation (strong) loss of every exit over the steps."""
    colors = exit_colors(run.num_exits)
    last = run.num_exits - 1
    valid_x, valid_y = thinned(run.records.valid.step, run.records.valid.loss)
    has_valid = bool(np.isfinite(valid_y).any())
    train = [
        Curve(x=x, y=y, color=color, width=0.8, opacity=0.3, label="" if has_valid else f"exit {index}")
        for index, ((x, y), color) in enumerate(
            zip(binned_columns(run.records.train.step, run.records.train.loss, reduce="mean"), colors, strict=False)
        )
    ]
    valid = [
        Curve(x=valid_x, y=y, color=color, width=2.4 if index == last else 1.3, label=f"exit {index}")
        for index, (y, color) in enumerate(zip(valid_y.T, colors, strict=False))
    ]
    curves = [*train, *valid]
    if not has_numbers(curves):
        return None
    figure, axes = canvas(*WIDE, right=0.95)
    draw(axes, curves)
    scale_steps(axes, curves, "step")
    scale_losses(axes, curves, uniform=uniform_loss(run.corpus.get("vocab_size")))
    label_ends(axes, curves, strong="last")
    return rendered(
        figure,
        curves,
        name="learning_curves",
        title="Loss of every exit, nats/token",
        caption="Faint: training, averaged where records are many. Strong: validation. "
        "The deeper the exit, the further its colour is from the background.",
        alt=f"Line chart of loss in nats/token over {count(totals(run).steps)} steps for {run.num_exits} "
        f"exits. {_last_values(run.records.valid)}",
    )


@figure_style()
def loss_by_depth(run: Run) -> Chart | None:
    """Last validation loss of each exit against its depth, with two earlier validations behind it."""
    valid = run.records.valid
    if run.num_exits < 2 or not len(valid.step):
        return None
    depth = np.arange(run.num_exits)
    final = len(valid.step) - 1
    earlier = {int(np.searchsorted(valid.step, valid.step[-1] * part)) for part in (1 / 4, 1 / 2)}
    curves = [
        Curve(
            x=depth,
            y=gapped(valid.loss[index]),
            color=INK if index == final else FAINT,
            width=2.0 if index == final else 1.0,
            label=f"step {compact(float(valid.step[index]))}",
        )
        for index in [*sorted(earlier - {final}), final]
    ]
    if not has_numbers(curves):
        return None
    figure, axes = canvas(*SMALL, right=0.95)
    draw(axes, curves)
    scale_exits(axes, run.num_exits)
    scale_losses(axes, curves, uniform=None)
    label_ends(axes, curves, strong="last")
    return rendered(
        figure,
        curves,
        name="loss_by_depth",
        title="Validation loss by depth, nats/token",
        caption="What each exit adds to the one below it; grey: earlier in training.",
        alt=f"Line chart of validation loss against exit, 0 to {run.num_exits - 1}. {_last_values(valid)}",
    )


def early_exit_loss(run: Run) -> Chart | None:
    """Loss against the average number of blocks: early exits by threshold, and every exit by itself."""
    return _early_exits(run, "loss", name="early_exit_loss", title="Early exits: loss, nats/token")


def early_exit_accuracy(run: Run) -> Chart | None:
    """Accuracy against the average number of blocks: early exits by threshold, and every exit by itself."""
    return _early_exits(run, "accuracy", name="early_exit_accuracy", title="Early exits: accuracy")


@figure_style()
def _early_exits(run: Run, quantity: str, *, name: str, title: str) -> Chart | None:
    """One measure of quality against the average number of blocks that a token takes."""
    evaluation = run.evaluation
    if evaluation is None or len(evaluation.exits["loss"]) < 2:
        return None
    exits, early = evaluation.exits, evaluation.early
    curves = [
        Curve(x=exits["num_blocks"], y=gapped(exits[quantity]), color=FAINT, width=1.2, label="one exit"),
        Curve(x=early["average_blocks"], y=gapped(early[quantity]), color=INK, width=2.0, label="first sure"),
    ]
    if not has_numbers(curves):
        return None
    figure, axes = canvas(*SMALL, right=0.95)
    draw(axes, curves)
    # Exits with blocks of their own may take more than the model has.
    scale_blocks(axes, max(evaluation.num_blocks, exits["num_blocks"].max(), early["average_blocks"].max(initial=0)))
    scale_losses(axes, curves, uniform=None)
    label_ends(axes, curves, strong="last")
    return rendered(
        figure,
        curves,
        name=name,
        title=title,
        caption="Grey: one exit for all tokens. Black: each token by the first exit that is sure enough, one point a "
        "threshold of confidence. Blocks are counted up to the exit that writes; those after it catch up later.",
        alt=f"Line chart of {quantity} against the average number of blocks of {evaluation.num_blocks}, at "
        f"{len(early['threshold'])} thresholds.",
    )


@figure_style()
def gradient_cosines(run: Run) -> Chart | None:
    """Cosine of the blocks' gradients with the exact ones over the steps, where feedback was compared with it."""
    found = run.records.diagnoses
    colors = exit_colors(run.num_exits)
    x, cosines = thinned(found.step, found.gradient_cosine)
    curves = [
        Curve(x=x, y=y, color=color, width=1.3, label=f"exit {index}")
        for index, (y, color) in enumerate(zip(cosines.T, colors, strict=False))
    ]
    if not has_numbers(curves):
        return None
    figure, axes = canvas(*SMALL, right=0.95)
    draw(axes, curves)
    scale_steps(axes, curves, "step")
    axes.set_ylim(min(0.0, 1.05 * float(np.nanmin(cosines))), 1.05)
    label_ends(axes, curves, strong="last")
    return rendered(
        figure,
        curves,
        name="gradient_cosines",
        title="Blocks' gradients: cosine with the exact ones",
        caption="1: the feedback makes of the blocks what the exact gradient would.",
        alt=f"Line chart of the cosine of the blocks' gradients with the exact ones for {run.num_exits} exits.",
    )


@figure_style()
def gradient_norms(run: Run) -> Chart | None:
    """Gradient norm of every unit and of the shared parameters, before clipping."""
    norms = _norms_of_trained(run.records.train)
    columns = binned_columns(run.records.train.step, norms, reduce="max", limit=_SMALL_POINTS)
    num_units = len(columns) - 1
    colors = exit_colors(max(num_units, 0))
    curves = [
        Curve(x=x, y=y, color=color, width=1.0, label=f"unit {index}")
        for index, ((x, y), color) in enumerate(zip(columns, colors, strict=False))
    ]
    curves += [Curve(x=x, y=y, color=MUTED, width=1.0, label="shared", dash=(0, (3, 1.5))) for x, y in columns[-1:]]
    if not has_numbers(curves):
        return None
    figure, axes = canvas(*SMALL, right=0.85)
    draw(axes, curves)
    scale_steps(axes, curves, "step")
    scale_log(axes, curves)
    label_ends(axes, curves)
    return rendered(
        figure,
        curves,
        name="gradient_norms",
        title="Gradient norm before clipping",
        caption="Of each unit and of the shared parameters; the largest where records are many.",
        alt=f"Line chart of the gradient norms of {num_units} units and of the shared parameters.",
    )


def throughput(run: Run) -> Chart | None:
    """Training tokens per second over the steps."""
    return _single(run, run.records.train.tokens_per_second, name="throughput", title="Throughput, tokens/s")


def learning_rate(run: Run) -> Chart | None:
    """Learning rate over the steps."""
    return _single(run, run.records.train.lr, name="learning_rate", title="Learning rate")


@figure_style()
def last_exit_curves(runs: Sequence[Run], labels: Sequence[str]) -> Chart | None:
    """Validation loss of each run's last exit over the tokens; bits/byte if text or vocabulary differ."""
    curves = []
    for index, (run, label) in enumerate(zip(runs, labels, strict=True)):
        valid, (color, dash) = run.records.valid, run_style(index)
        tokens, losses = thinned(valid.tokens, _comparable(runs, run))
        for loss in losses.T[-1:]:
            curves.append(Curve(x=tokens, y=loss, color=color, dash=dash, width=1.7, label=drawable(label)))
    if not has_numbers(curves):
        return None
    figure, axes = canvas(*WIDE, right=2.3)
    draw(axes, curves)
    scale_steps(axes, curves, "training tokens")
    scale_losses(axes, curves, uniform=None)
    label_ends(axes, curves)
    return rendered(
        figure,
        curves,
        name="last_exits",
        title=f"Validation loss of the last exit, {_comparable_unit(runs)}",
        caption="Over training tokens seen. A dotted line only leads to a label.",
        alt=f"Line chart of the last exit's validation loss of {len(runs)} runs over training tokens; the "
        "table of runs has the last values.",
    )


@figure_style()
def losses_by_depth(runs: Sequence[Run], labels: Sequence[str]) -> Chart | None:
    """Last validation loss of every exit of each run; bits/byte if text or vocabulary differ."""
    curves = []
    for index, (run, label) in enumerate(zip(runs, labels, strict=True)):
        color, dash = run_style(index)
        for losses in _comparable(runs, run)[-1:]:
            depth = np.arange(len(losses))
            curves.append(Curve(x=depth, y=gapped(losses), color=color, dash=dash, width=1.7, label=drawable(label)))
    if not has_numbers(curves) or max(len(curve.x) for curve in curves) < 2:
        return None
    figure, axes = canvas(*WIDE, right=2.3)
    draw(axes, curves)
    scale_exits(axes, max(len(curve.x) for curve in curves))
    scale_losses(axes, curves, uniform=None)
    label_ends(axes, curves)
    return rendered(
        figure,
        curves,
        name="exits",
        title=f"Last validation loss of every exit, {_comparable_unit(runs)}",
        caption="Exits are counted from 0, the lowest.",
        alt=f"Line chart of the last validation loss of every exit of {len(runs)} runs.",
    )


@figure_style()
def _single(run: Run, values: Floats, *, name: str, title: str) -> Chart | None:
    """One quantity over the steps."""
    x, means = binned(run.records.train.step, values[:, None], reduce="mean", limit=_SMALL_POINTS)
    curves = [Curve(x=x, y=means[:, 0], color=run_style(0)[0], width=1.2)]
    if not has_numbers(curves):
        return None
    figure, axes = canvas(*SMALL)
    draw(axes, curves)
    scale_steps(axes, curves, "step")
    scale_from_zero(axes, curves)
    return rendered(
        figure,
        curves,
        name=name,
        title=title,
        caption="Averaged where records are many.",
        alt=f"Line chart of {title.lower()} over the steps, at most {compact(float(np.nanmax(means)))}.",
    )


def _norms_of_trained(train: TrainRecords) -> Floats:
    """Gradient norms [T, L + 1] with NaN, not zero, for the units whose exits have sat a step out."""
    norms, has_loss = train.grad_norm.copy(), ~np.isnan(train.loss)
    sits_out = ~has_loss & has_loss.any(axis=1, keepdims=True)
    if norms.shape[1] == sits_out.shape[1] + 1:
        norms[:, :-1][sits_out] = np.nan
    return norms


def _comparable(runs: Sequence[Run], run: Run) -> Floats:
    """Validation losses [T, L] of `run` in a unit that all `runs` share."""
    valid = run.records.valid
    return valid.loss if are_losses_comparable(runs) else valid.bits_per_byte


def _comparable_unit(runs: Sequence[Run]) -> str:
    return "nats/token" if are_losses_comparable(runs) else "bits/byte"


def _last_values(valid: ValidRecords) -> str:
    """The ends of the curves, in words."""
    if not len(valid.step):
        return "No validation yet."
    values = [number(value) for value in valid.loss[-1].tolist()]
    step = count(float(valid.step[-1]))
    return f"Last validation, step {step}, exits 0 to {len(values) - 1}: {', '.join(values)}."
