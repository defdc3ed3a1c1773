"""Results as tables of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = Sequence[str]
HEAD = ("", "median ms", "min-max ms", "vs eager", "products", "peak MiB", "error", "")


def times_table(measured: dict[str, Any]) -> str:
    """Every contender of one shape, and who was not available."""
    notes = [f"not available: {name}: {reason}" for name, reason in measured["not_available"].items()]
    return "\n".join([aligned(HEAD, [_times_row(result) for result in measured["results"]]), *notes])


def _times_row(result: dict[str, Any]) -> Row:
    backend = f"{result['backend']}" if result["backend"] else ""
    return (
        result["name"],
        f"{result['median_ms']:.2f}",
        f"{result['min_ms']:.1f}-{result['max_ms']:.1f}",
        _given(result["vs_eager"], "{:.2f}x"),
        f"{result['products']:.2f}",
        _given(result["peak_mib"], "{:.0f}"),
        _given(result["error"], "{:.1e}"),
        "; ".join(filter(None, (backend, result["note"]))),
    )


def _given(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def aligned(head: Row, rows: Sequence[Row]) -> str:
    """Columns padded to their widest cell: the first and the last to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Row) -> str:
        last = len(cells) - 1
        padded = (
            c.ljust(w) if i in (0, last) else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *map(line, rows)])
