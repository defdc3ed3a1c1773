"""Write the table and the figure of docs/scaling.md: FLOPs and bytes of a step on 1 to 512 GPUs, by formula.

    python benchmarks/scaling_page.py

The table stands between `<!-- scaling -->` and `<!-- end -->`, the figure is docs/images/scaling.svg. Measured points
come from benchmarks/results/distributed.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from localexit.report.drawing import titled
from localexit.report.theme import Color, canvas, figure_style, plain_axes, run_style, to_svg
from pages import markdown_table, rewritten

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
FIGURE = ROOT / "docs" / "images" / "scaling.svg"
MEASURED = ROOT / "benchmarks" / "results" / "distributed.json"
GPUS = (1, 8, 64, 512)
# Bytes of a number: gradients are fp32, hidden states and what comes for the feedback bf16.
GRADIENT, HIDDEN = 4, 2


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model and a batch.

    Attributes:
        blocks, width, vocab: L, D, V.
        exits: U, how many exits there are; as many as units.
        rank: R, numbers a token that an exit reduces for the feedback.
        tokens: n, tokens a GPU and step: the batch grows with the number of GPUs.
        microbatches: m, parts of a batch in a pipeline.
        machine: GPUs that share an unembedding, those of one machine.
    """

    blocks: int = 32
    width: int = 4096
    vocab: int = 128256
    exits: int = 8
    rank: int = 128
    tokens: int = 16384
    microbatches: int = 32
    machine: int = 8

    @property
    def block_parameters(self) -> int:
        """12 L D²."""
        return 12 * self.blocks * self.width**2

    @property
    def head_parameters(self) -> int:
        """V D, of the unembedding."""
        return self.vocab * self.width

    def block_flops(self, tokens: float) -> float:
        """Forward and backward of all blocks, attention over the context left out."""
        return 6 * tokens * self.block_parameters

    def exit_flops(self, tokens: float) -> float:
        """Two products an exit."""
        return 4 * tokens * self.exits * self.head_parameters


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one GPU does and sends in a step.

    Attributes:
        flops: arithmetic.
        sent: bytes.
        idle: share of the step that it waits for others to begin or to end.
    """

    flops: float
    sent: float
    idle: float = 0.0


def all_reduced(numbers: float, gpus: float, size: int) -> float:
    """Bytes that a GPU sends for an all-reduce around a ring."""
    return 2 * (gpus - 1) / gpus * numbers * size


def data_parallel(setting: Setting, gpus: int) -> Step:
    """Every GPU has the whole model and n tokens; all gradients are averaged (embedding and unembedding untied)."""
    flops = setting.block_flops(setting.tokens) + setting.exit_flops(setting.tokens)
    numbers = setting.block_parameters + 2 * setting.head_parameters
    return Step(flops=flops, sent=all_reduced(numbers, gpus, GRADIENT))


def vocabulary_parallel(setting: Setting, gpus: int) -> Step:
    """The GPUs of a machine share the unembedding and their tokens; machines are data parallel.

    All of them compute the blocks for all these tokens: by itself this form is for the exits only.
    """
    shards = min(gpus, setting.machine)
    machines, tokens = gpus // shards, setting.tokens * shards
    flops = setting.block_flops(tokens) + setting.exit_flops(tokens) / shards
    # Loss: 4 numbers a token in fp32. Feedback: R.
    reduced = setting.exits * tokens * (4 + setting.rank)
    numbers = setting.block_parameters + setting.head_parameters * (1 + 1 / shards)
    return Step(flops=flops, sent=all_reduced(reduced, shards, GRADIENT) + all_reduced(numbers, machines, GRADIENT))


def pipeline(setting: Setting, gpus: int) -> Step:
    """Runs of units on as many stages as there are units; pipelines are data parallel. The unembedding is shared."""
    stages = min(gpus, setting.exits)
    pipelines = gpus // stages
    tokens = setting.tokens * stages
    flops = (setting.block_flops(tokens) + setting.exit_flops(tokens)) / stages
    forward = tokens * setting.width * HIDDEN * (stages > 1)
    shared = all_reduced(setting.head_parameters, gpus, GRADIENT)
    own = all_reduced(setting.block_parameters / stages, pipelines, GRADIENT)
    return Step(flops=flops, sent=forward + shared + own, idle=waiting(setting, stages))


def one_forward_one_backward(setting: Setting, gpus: int) -> Step:
    """The same stages with backprop and one loss at the top: gradients go back as hidden states come."""
    local = pipeline(setting, gpus)
    stages = min(gpus, setting.exits)
    tokens = setting.tokens * stages
    loss = 6 * tokens * setting.head_parameters
    backward = tokens * setting.width * HIDDEN * (stages > 1)
    # The last stage has the loss to itself, and the others wait for it.
    slowest = setting.block_flops(tokens) / stages + loss
    return Step(
        flops=(setting.block_flops(tokens) + loss) / stages,
        sent=local.sent + backward - all_reduced(setting.head_parameters, gpus, GRADIENT),
        idle=1 - (1 - local.idle) * (setting.block_flops(tokens) + loss) / stages / slowest,
    )


def waiting(setting: Setting, stages: int) -> float:
    """Share of a step by itself that passes before the last stage has something to do."""
    return (stages - 1) / (setting.microbatches + stages - 1)


FORMS: dict[str, Callable[[Setting, int], Step]] = {
    "data parallel": data_parallel,
    "vocabulary parallel": vocabulary_parallel,
    "pipeline of units": pipeline,
    "1F1B, one loss": one_forward_one_backward,
}


def table(setting: Setting) -> str:
    """Every form on every number of GPUs."""
    head = ("GPUs", *(f"{name}: {what}" for name in FORMS for what in ("TFLOP", "GB", "idle")))
    kept = [column for column in head if "parallel: idle" not in column]
    rows = []
    for gpus in GPUS:
        cells = [str(gpus)]
        for name, form in FORMS.items():
            step = form(setting, gpus)
            cells += [f"{step.flops / 1e12:,.0f}", f"{step.sent / 1e9:.1f}"]
            cells += [] if "parallel" in name else [f"{100 * step.idle:.0f} %"]
        rows.append(cells)
    return markdown_table(kept, rows)


@figure_style()
def figure(setting: Setting) -> bytes:
    """Bytes that a GPU sends in a step, and speed as measured beside speed without any sending, against GPUs."""
    width = 10.8
    drawn, sent = canvas(width, 3.0, right=width - 4.4)
    place = sent.get_position()
    # With room for its names on the right.
    speed = drawn.add_axes((5.6 / width, place.y0, 2.9 / width, place.height))
    plain_axes(speed)
    colors = [run_style(index)[0] for index in range(len(FORMS))]
    _draw_bytes(sent, setting, colors)
    _draw_speeds(speed, colors)
    title = (
        "Line charts over the number of GPUs: what a GPU sends in a step, three forms and 1F1B; and how many times as "
        "fast as one GPU they are without any sending, with the points that were measured"
    )
    return titled(to_svg(drawn, colors), f"{title}.")


def _draw_bytes(axes: Axes, setting: Setting, colors: Sequence[Color]) -> None:
    # Those of data parallel and vocabulary parallel meet at the end.
    for (name, form), color, lift in zip(FORMS.items(), colors, (1, -9, -3, -3), strict=True):
        heights = [form(setting, gpus).sent / 1e9 for gpus in GPUS[1:]]
        axes.plot(GPUS[1:], heights, color=color.light, marker="o", markersize=3)
        _name(axes, name, GPUS[-1], heights[-1], lift, color)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(GPUS[1:], [str(gpus) for gpus in GPUS[1:]])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
    axes.set_xlabel("GPUs")
    axes.set_title("GB that a GPU sends in a step", loc="left", fontsize=9)


def _draw_speeds(axes: Axes, colors: Sequence[Color]) -> None:
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    setting, few = measured_setting(found), (1, 2, 4)
    points = measured_speeds(found)
    for (name, form), color, lift in zip(FORMS.items(), colors, (1, -9, 3, -6), strict=True):
        heights = [gpus * (1 - form(setting, gpus).idle) for gpus in few]
        axes.plot(few, heights, color=color.light, linewidth=1, linestyle="dashed")
        axes.plot(found["ranks"], points[name], color=color.light, marker="x", markersize=6)
        _name(axes, f"{name}: {points[name]:.2f}× on {found['ranks']}", few[-1], heights[-1], lift, color)
    axes.set_xticks(few, [str(gpus) for gpus in few])
    axes.set_yticks(few, [f"{gpus}×" for gpus in few])
    axes.set_xlabel("GPUs")
    axes.set_title("Times as fast as one: without sending, and measured (×)", loc="left", fontsize=9)


def _name(axes: Axes, text: str, x: float, y: float, lift: int, color: Color) -> None:
    axes.annotate(text, (x, y), (6, lift), textcoords="offset points", fontsize=8, color=color.light)


def measured_setting(found: dict[str, Any]) -> Setting:
    """What was measured, as a setting of the formulas."""
    sizes = found["sizes"]
    return Setting(
        blocks=sizes["blocks"],
        width=sizes["width"],
        vocab=sizes["vocab"],
        exits=sizes["blocks"] // int(sizes["exits"].removeprefix("every:")),
        tokens=sizes["rows"] * sizes["context"],
        microbatches=sizes["micro"],
    )


def measured_speeds(found: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as one GPU the measured ranks were; for vocabulary parallel, an exit by itself."""
    ranks = str(found["ranks"])
    rates = {
        "data parallel": found["data_parallel"],
        "pipeline of units": found["pipeline"]["units"],
        "1F1B, one loss": found["pipeline"]["1f1b"],
    }
    exit_ = found["vocab_parallel"]["dense"]
    speeds = {name: rate["tokens_per_second"][ranks] / rate["tokens_per_second"]["1"] for name, rate in rates.items()}
    return {**speeds, "vocabulary parallel": exit_["whole_ms"] / exit_["spread_ms"]}


def measured() -> str:
    """A line on what was measured."""
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    ranks = str(found["ranks"])
    speed = found["data_parallel"]["tokens_per_second"]
    bubbles = {name: found["pipeline"][name]["bubble"] for name in ("units", "1f1b")}
    return (
        f"Measured on {ranks} × {found['device']} (torch {found['versions']['torch']}): data parallel "
        f"{speed['1']:,.0f} tokens/s on one and {speed[ranks]:,.0f} on {ranks}; idle in a pipeline of units "
        f"{100 * bubbles['units']:.0f} %, with 1F1B {100 * bubbles['1f1b']:.0f} %, each against one GPU's own speed."
    )


def written(text: str, setting: Setting) -> str:
    """The page with its table made anew."""
    return rewritten(text, lambda _: f"{table(setting)}\n\n{measured()}")


def main() -> None:
    setting = Setting()
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), setting), encoding="utf-8")
    FIGURE.write_bytes(figure(setting))


if __name__ == "__main__":
    main()
