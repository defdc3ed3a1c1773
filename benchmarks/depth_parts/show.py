"""Results as tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from depth_parts.largest import BUDGETS
from depth_parts.memory import MEMORY_KINDS
from localexit.bench.tables import aligned
from localexit.report.drawing import WIDE, Curve, draw, label_ends, rendered, scale_log
from localexit.report.theme import canvas, drawable, figure_style, run_style


def shown(content: dict[str, Any]) -> str:
    """The results as tables."""
    parts = [f"{content['device']}, torch {content['versions']['torch']}"]
    memory = content.get("memory", {})
    if memory:
        depths = list(next(iter(memory.values()))["peak_bytes"])
        reference = memory.get("backprop, loss at the top", {}).get("bytes_a_block")
        rows = [
            (
                kind,
                *(f"{cell['peak_bytes'][depth] / 2**20:.1f}" for depth in depths),
                f"{cell['bytes_a_block'] / 2**20:.3f}",
                f"{cell['bytes_a_block'] / reference:.1%}" if reference else "",
            )
            for kind, cell in memory.items()
        ]
        parts.append(aligned(("activations, MiB at blocks:", *depths, "a block", "of backprop's"), rows))
    for name, cell in content.get("time", {}).items():
        rows = [
            (
                row["name"],
                f"{row['median_ms']:.2f}",
                f"{row['min_ms']:.1f}-{row['max_ms']:.1f}",
                f"{row['of_top']:.2f}",
                f"{row['faster_than_every_exit']:.2f}",
                "",
            )
            for row in cell["results"]
        ]
        sizes = " ".join(f"{key}={value}" for key, value in cell["shape"].items())
        parts.append(f"{name}: {sizes}")
        head = ("", "ms a step", "min-max", "× backprop", "faster than every exit", "")
        parts.append(aligned(head, rows))
    largest = content.get("largest", {})
    if largest:
        rows = [
            (
                kind,
                *(
                    f"{cell['blocks'][str(b)]} ({cell['parameters'][str(b)] / 1e9:.2f}B)"
                    + {True: " ran", False: " did not run", None: ""}[cell["fits"].get(str(b))]
                    for b in BUDGETS
                ),
                f"{cell['bytes_a_block'] / 2**20:.0f} MiB a block",
            )
            for kind, cell in largest.items()
        ]
        parts.append(aligned(("most blocks in", *(f"{b} GiB" for b in BUDGETS), ""), rows))
    return "\n\n".join(parts)


def plot(content: dict[str, Any], path: Path) -> None:
    """Peak of the activations over depth."""
    curves = [
        Curve(
            x=np.array(list(map(int, cell["peak_bytes"]))),
            y=np.array(list(cell["peak_bytes"].values())) / 2**20,
            color=run_style(index)[0],
            label=kind,
        )
        for index, (kind, cell) in enumerate(content["memory"].items())
    ]
    shape = content["memory"][MEMORY_KINDS[0]]["shape"]
    sizes = f"D={shape['hidden_size']} {shape['batch_size']}×{shape['context']} tokens"
    with figure_style():
        figure, axes = canvas(*WIDE, right=1.9)
        draw(axes, curves)
        axes.set_xlabel("blocks")
        scale_log(axes, curves)
        label_ends(axes, curves)
        chart = rendered(
            figure,
            curves,
            name="depth",
            title=f"Peak of the activations in MiB over depth; {sizes}; {drawable(content['device'], 40)}",
            caption="",
            alt=f"Line chart of the activations' peak over the number of blocks, {len(curves)} ways to train.",
        )
    path.write_bytes(chart.standalone_svg())
