"""Results as tables of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .shapes import Shape

Row = Sequence[str]
HEAD = ("", "median ms", "min-max ms", "vs eager", "products", "peak MiB", "error", "")


def shown(content: dict[str, Any]) -> str:
    """Everything in a file of results."""
    parts = [f"{content['device']}, {content['threads']} threads, torch {content['versions']['torch']}"]
    for title, measured in content.get("shapes", {}).items():
        shape = Shape(**measured["shape"])
        parts.append(f"{title}: {shape} {measured['dtype']}, median of {measured['rounds']}")
        parts.append(times_table(measured))
    for letter, points in content.get("sweeps", {}).items():
        parts.append(sweep_table(letter, points))
    for measured in content.get("shared_exits", {}).values():
        shape = Shape(**measured["shape"])
        parts.append(f"{measured['num_exits']} exits that share W: {shape}, median of {measured['rounds']}")
        parts.append(shared_table(measured))
    for measured in content.get("updates", {}).values():
        parts.append(f"a mirror's update: {Shape(**measured['shape'])}, median of {measured['rounds']}")
        parts.append(updates_table(measured))
    for measured in content.get("numerics", {}).values():
        parts.append(f"errors against fp64: {Shape(**measured['shape'])} and V=262144, backend {measured['backend']}")
        parts.append(numerics_table(measured))
    return "\n\n".join(parts)


def numerics_table(measured: dict[str, Any]) -> str:
    """Relative errors next to plain PyTorch's in the same dtype."""
    head = ("", "", "loss", "plain", "dW", "plain", "feedback", "plain dh", "within budget")
    keys = ("loss", "plain_loss", "weight_grad", "plain_weight_grad", "feedback", "plain_hidden_grad")
    rows = [
        (r["trial"], r["name"], *(f"{r[key]:.1e}" for key in keys), "yes" if r["is_within"] else "NO")
        for r in measured["results"]
    ]
    return aligned(head, rows)


def sweep_table(letter: str, points: dict[str, dict[str, Any]]) -> str:
    """Median ms of every contender by the size that varies."""
    values = sorted(points, key=int)
    medians = {value: {name_in_sweep(r): r["median_ms"] for r in points[value]["results"]} for value in values}
    names = dict.fromkeys(name for value in values for name in medians[value])
    rows = [(name, *(_given(medians[value].get(name), "{:.2f}") for value in values), "") for name in names]
    reasons = {name: reason for value in values for name, reason in points[value]["not_available"].items()}
    notes = [f"not available: {name}: {reason}" for name, reason in reasons.items()]
    return "\n".join([aligned((f"ms at {letter} =", *values, ""), rows), *notes])


def name_in_sweep(result: dict[str, Any]) -> str:
    """A contender's name without options: they are what varies."""
    rule, _, rest = result["name"].partition(":")
    return f"{rule} {rest.split()[-1]}" if rest else result["name"]


def measurements(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every interleaved run of a file of results, with its title."""
    yield from content.get("shapes", {}).items()
    for letter, points in content.get("sweeps", {}).items():
        for value, measured in points.items():
            yield f"sweep {letter}={value}", measured


def losses_table(content: dict[str, Any]) -> str:
    """Where a contender of ours is slower than the fastest exact head of its run; and who needs least memory."""
    runs = list(measurements(content))
    slow = [row for title, measured in runs for row in slower(title, measured)]
    large = [row for title, measured in runs for row in larger(title, measured)]
    tables = []
    if slow:
        tables.append(aligned(("slower than an exact head", "", "ms", "times", "of"), slow))
    if large:
        tables.append(aligned(("larger than an exact head", "leanest of ours", "MiB", "times", "of"), large))
    return "\n\n".join(tables) or "No exact head that was available is faster or leaner than ours in these runs."


def slower(title: str, measured: dict[str, Any]) -> Iterator[Row]:
    """Our contenders that are slower than the fastest exact head of the run: run, name, ms, factor, that head."""
    best = least(measured, "exact", "median_ms")
    for result in measured["results"]:
        if best and result["kind"] == "rule" and result["median_ms"] > best["median_ms"]:
            factor = result["median_ms"] / best["median_ms"]
            yield (title, result["name"], f"{result['median_ms']:.2f}", f"{factor:.2f}", best["name"])


def larger(title: str, measured: dict[str, Any]) -> Iterator[Row]:
    """The leanest of ours, if an exact head needs less memory: run, name, MiB, factor, that head."""
    best, ours = least(measured, "exact", "peak_mib"), least(measured, "rule", "peak_mib")
    if best and ours and ours["peak_mib"] > best["peak_mib"]:
        factor = f"{ours['peak_mib'] / best['peak_mib']:.2f}" if best["peak_mib"] > 0 else ""
        yield (title, ours["name"], f"{ours['peak_mib']:.0f}", factor, best["name"])


def least(measured: dict[str, Any], kind: str, key: str) -> dict[str, Any] | None:
    """The contender of a kind with the least of something, if any was measured."""
    candidates = [r for r in measured["results"] if r["kind"] == kind and r[key] is not None]
    return min(candidates, key=lambda result: result[key], default=None)


def shared_table(measured: dict[str, Any]) -> str:
    """What each of several exits costs against one alone."""
    head = ("", "alone ms", "an exit ms", "ratio", "alone MiB", "all MiB", "")
    rows = [
        (
            result["name"],
            f"{result['alone_ms']:.2f}",
            f"{result['exit_ms']:.2f}",
            f"{result['exit_to_alone']:.2f}",
            _given(result["alone_peak_mib"], "{:.0f}"),
            _given(result["shared_peak_mib"], "{:.0f}"),
            "",
        )
        for result in measured["results"]
    ]
    return aligned(head, rows)


def updates_table(measured: dict[str, Any]) -> str:
    """A mirror's update against its exits, and against reading and writing the mirror once."""
    head = ("", "exits", "ms", "min-max ms", "an exit ms", "of the exits", "B twice MiB", "GB/s", "extra MiB", "")
    rows = [
        (
            result["name"],
            str(result["num_exits"]),
            f"{result['update_ms']:.2f}",
            f"{result['min_ms']:.2f}-{result['max_ms']:.2f}",
            f"{result['exit_ms']:.2f}",
            f"{100 * result['share']:.1f} %",
            f"{result['least_mib']:.0f}",
            f"{result['least_gb_per_s']:.0f}",
            _given(result["peak_mib"], "{:.0f}"),
            "",
        )
        for result in measured["results"]
    ]
    return aligned(head, rows)


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

    return "\n".join([line(head), "  ".join("-" * w for w in widths).rstrip(), *map(line, rows)])
