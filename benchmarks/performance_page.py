"""Write the tables of docs/performance.md from the files in benchmarks/results, so that they cannot drift apart.

    python benchmarks/performance_page.py

A table stands between `<!-- NAME -->` and `<!-- end -->`; what is not measured says with which command it would be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from localexit.bench.record import read_results
from localexit.bench.roofline import rooflines
from localexit.bench.shapes import Shape
from localexit.bench.tables import larger, least, measurements, name_in_sweep, slower
from pages import markdown_table, measured_on, rewritten

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
Content = dict[str, Any]
Row = Sequence[str]

CHEAP = ("anchors", "dense", "sketch", "hybrid", "mirror_sampled", "transport_sampled")
MOST_PRODUCTS = {"llama": 2.2, "gemma": 2.3, "gpt2": 2.8}


def written(text: str, cpu: Content, gpu: Content) -> str:
    """The page with its tables made anew."""
    return rewritten(text, lambda name: BLOCKS[name](cpu if name.startswith("cpu") else gpu))


def machine(content: Content, section: str = "", shapes: Mapping[str, Content] | None = None) -> str:
    """What was measured on; a section or shape of another commit than the rest has its own in `commits`, by name."""
    commits = content.get("commits", {})
    others = [
        f" {Shape(**measured['shape'])}: commit {commits[name][:7]}."
        for name, measured in (shapes or {}).items()
        if name in commits
    ]
    return f"{measured_on(content, section)}{''.join(others)}"


def cpu_times(content: Content) -> str:
    measured = content["shapes"]["cpu"]
    rows = [
        (
            f"`{r['name']}`",
            f"{r['median_ms'] / 1e3:.2f}",
            f"{r['min_ms'] / 1e3:.2f}-{r['max_ms'] / 1e3:.2f}",
            f"{r['vs_eager']:.2f}×",
            f"{r['products']:.2f}",
            "" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}",
            r["note"],
        )
        for r in measured["results"]
    ]
    head = ("", "median s", "min-max s", "vs eager", "products", "peak MiB", "")
    return "\n".join([markdown_table(head, rows), "", machine(content), *not_available(measured)])


def not_available(measured: Content) -> list[str]:
    return [f"Not available: `{name}` ({reason})." for name, reason in measured["not_available"].items()]


def gpu_times(content: Content) -> str:
    shapes = content["shapes"]
    cells = {name: {r["name"]: cell(r) for r in measured["results"]} for name, measured in shapes.items()}
    names = dict.fromkeys(name for of_shape in cells.values() for name in of_shape)
    head = ("", *(str(Shape(**measured["shape"])) for measured in shapes.values()))
    rows = [(f"`{name}`", *(cells[shape].get(name, "") for shape in shapes)) for name in names]
    reasons = {reason: None for measured in shapes.values() for reason in not_available(measured)}
    return "\n".join([markdown_table(head, rows), "", machine(content, shapes=shapes), *reasons])


def cell(result: Content) -> str:
    peak = "" if result["peak_mib"] is None else f" · {result['peak_mib']:.0f} MiB"
    return f"{result['median_ms']:.1f} ms · {result['products']:.2f}{peak}"


def gpu_roofline(content: Content) -> str:
    head = ("", "shape", "TFLOP", "GB", "promised ms", "attainable ms", "measured ms", "gap ms")
    rows = [
        (
            f"`{r.name}`",
            str(r.shape),
            f"{r.flops / 1e12:.1f}",
            f"{r.num_bytes / 1e9:.1f}",
            f"{r.promised_ms:.1f}",
            f"{r.attainable_ms:.1f}",
            f"{r.measured_ms:.1f}",
            f"{r.gap_ms:.1f}",
        )
        for r in rooflines(content)
    ]
    return markdown_table(head, rows)


def losses(content: Content) -> str:
    slow = [
        (t, f"`{n}`", ms, factor, f"`{of}`") for t, m in measurements(content) for t, n, ms, factor, of in slower(t, m)
    ]
    large = [
        (t, f"`{n}`", mib, factor, f"`{of}`")
        for t, m in measurements(content)
        for t, n, mib, factor, of in larger(t, m)
    ]
    parts = []
    if slow:
        parts.append(markdown_table(("slower at", "", "ms", "times", "of"), slow))
    if large:
        parts.append(markdown_table(("larger at", "leanest of ours", "MiB", "times", "of"), large))
    return "\n\n".join(parts) or "Nowhere in these runs."


Aim = tuple[str, str, str, bool]


def aims(rows: Iterator[Aim]) -> str:
    return markdown_table(
        ("aim", "wanted", "measured", "reached"), [(*row[:3], "yes" if row[3] else "**no**") for row in rows]
    )


def at_least(aim: str, ratio: float, wanted: float) -> Aim:
    return aim, f"≥ {wanted}×", f"{ratio:.2f}×", ratio >= wanted


def at_most(aim: str, value: float, wanted: float, unit: str = "") -> Aim:
    return aim, f"≤ {wanted}{unit}", f"{value:.2f}{unit}", value <= wanted


def faster(own: Content, other: Content) -> float:
    """How many times as fast as the other: median of the ratios within a round, where rounds are kept."""
    rounds = list(zip(own["times_ms"], other["times_ms"], strict=True))
    return median(b / a for a, b in rounds) if rounds else other["median_ms"] / own["median_ms"]


def cpu_aims(content: Content) -> str:
    return aims(_cpu_aims(content["shapes"]["cpu"]))


def _cpu_aims(measured: Content) -> Iterator[Aim]:
    of = {r["name"]: r for r in measured["results"]}
    rules = [r for r in measured["results"] if r["kind"] == "rule"]
    chunked, original = of.get("F.linear_cross_entropy"), least(measured, "original", "median_ms")
    for name in ("dense", "sketch", "anchors"):
        own = of[f"{name} autograd"]
        yield at_least(f"`{name}` faster than eager", own["vs_eager"], 1.5)
        if original:
            yield at_least("… than the fastest original head", faster(own, original), 1.5)
        if chunked:
            yield at_least("… than `F.linear_cross_entropy`", faster(own, chunked), 3)
    slowest = min(rules, key=lambda r: r["vs_eager"])
    yield at_least(f"slowest rule (`{slowest['name']}`) against eager", slowest["vs_eager"], 1)
    largest = max(rules, key=lambda r: r["peak_mib"])
    yield at_most(f"largest peak (`{largest['name']}`)", largest["peak_mib"], 128, " MiB")


def gpu_aims(content: Content) -> str:
    return aims(_gpu_aims(content))


def _gpu_aims(content: Content) -> Iterator[Aim]:
    for name, measured in content["shapes"].items():
        if name in MOST_PRODUCTS:
            yield from _shape_aims(name, measured)
    for measured in content.get("updates", {}).values():
        for r in measured["results"]:
            if r["storage"] == "bf16":
                shape = Shape(**measured["shape"])
                exits = "one exit" if r["num_exits"] == 1 else f"{r['num_exits']} exits"
                aim = f"bf16 mirror, {shape}: an update with the pairs of {exits}, of their time"
                yield at_most(aim, 100 * r["share"], 5, " %")
    for count, measured in content.get("shared_exits", {}).items():
        worst = max(measured["results"], key=lambda r: r["exit_to_alone"])
        yield at_most(f"{count} exits: each against one alone (`{worst['name']}`)", worst["exit_to_alone"], 1)


def _shape_aims(name: str, measured: Content) -> Iterator[Aim]:
    of = {r["name"]: r for r in measured["results"]}
    steps = [of[f"{rule} step"] for rule in CHEAP if f"{rule} step" in of]
    most = max(r["products"] for r in steps)
    yield at_most(f"{name}: steps of cheap rules, in forward products", most, MOST_PRODUCTS[name])
    slowest = max(steps, key=lambda r: r["median_ms"])
    peer, original = least(measured, "exact", "median_ms"), least(measured, "original", "median_ms")
    if peer:
        yield at_least(f"… faster than `{peer['name']}`, the fastest exact head", faster(slowest, peer), 1.35)
    if name != "gpt2":
        floor = faster(slowest, of["three products"]) if "three products" in of else 3 * faster(slowest, of["h @ W.T"])
        yield at_least("… than three bare products", floor, 1)
    if original:
        yield at_least("… than the fastest original head", faster(slowest, original), 7)
    yield from _memory_aims(measured, of)
    if "torch.compile" in of and "transport autograd" in of:
        ratio = faster(of["transport autograd"], of["torch.compile"])
        yield at_least("… `transport` (exact) against `torch.compile`", ratio, 1)
    filtered = [r["products"] for r in measured["results"] if r["name"].endswith(" filtered")]
    if filtered:
        yield at_most("… filtered steps, in forward products (a stretch)", max(filtered), 1.6)


def _memory_aims(measured: Content, of: Content) -> Iterator[Aim]:
    small = [r for r in measured["results"] if r["name"].endswith(" memory")]
    if not small:
        return
    shape = Shape(**measured["shape"])
    gradients = 2 * (shape.vocab_size + shape.num_tokens) * shape.hidden_size / 2**20
    above = max(r["peak_mib"] for r in small) - gradients
    yield at_most("… memory preset: peak above the gradients", above, 256, " MiB")
    slowest = max(small, key=lambda r: r["median_ms"])
    for peer in ("cut-cross-entropy", "liger"):
        if peer in of:
            yield at_least(f"… memory preset faster than `{peer}`", faster(slowest, of[peer]), 1)


def shared(content: Content) -> str:
    if "shared_exits" not in content:
        return "Not measured yet: `localexit bench --shared-exits 12 --output benchmarks/results/exit_gpu.json`."
    head = ("", "exits", "one alone, ms", "each of them, ms", "ratio", "alone MiB", "all MiB")
    rows = [
        (
            f"`{r['name']}`",
            count,
            f"{r['alone_ms']:.2f}",
            f"{r['exit_ms']:.2f}",
            f"{r['exit_to_alone']:.2f}",
            f"{r['alone_peak_mib']:.0f}",
            f"{r['shared_peak_mib']:.0f}",
        )
        for count, measured in content["shared_exits"].items()
        for r in measured["results"]
    ]
    return "\n".join([markdown_table(head, rows), "", machine(content, "shared_exits")])


def updates(content: Content) -> str:
    if "updates" not in content:
        return "Not measured yet: `localexit bench --mirror-updates --output benchmarks/results/exit_gpu.json`."
    head = ("", "shape", "exits", "ms", "of their time", "B read and written, MiB", "GB/s of that", "extra MiB")
    rows = [
        (
            f"`{r['name']}`",
            str(Shape(**measured["shape"])),
            str(r["num_exits"]),
            f"{r['update_ms']:.2f}",
            f"{100 * r['share']:.1f} %",
            f"{r['least_mib']:.0f}",
            f"{r['least_gb_per_s']:.0f}",
            "" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}",
        )
        for measured in content["updates"].values()
        for r in measured["results"]
    ]
    return "\n".join([markdown_table(head, rows), "", machine(content, "updates")])


def sweeps(content: Content) -> str:
    if "sweeps" not in content:
        return "Not measured yet: `localexit bench --sweep D --output benchmarks/results/exit_gpu.json`."
    return "\n\n".join(_sweep(letter, points) for letter, points in content["sweeps"].items())


def _sweep(letter: str, points: Content) -> str:
    values = sorted(points, key=int)
    medians = {value: {name_in_sweep(r): r["median_ms"] for r in points[value]["results"]} for value in values}
    names = dict.fromkeys(name for value in values for name in medians[value])
    rows = [
        (f"`{name}`", *(f"{medians[value][name]:.2f}" if name in medians[value] else "" for value in values))
        for name in names
    ]
    named = f"Line chart of time against {letter} from {values[0]} to {values[-1]}, {len(names)} heads."
    picture = f"![{named}](images/exit_gpu-sweep-{letter}.svg)"
    return "\n\n".join([markdown_table((f"ms at {letter} =", *values), rows), picture])


def numerics(content: Content) -> str:
    if "numerics" not in content:
        return "Not measured yet: `localexit bench --numerics --output benchmarks/results/exit_gpu.json`."
    head = ("", "loss", "plain", "dW", "plain", "`transport`: dh", "plain", "within budget")
    rows = [_trial(name, rows) for name, rows in _trials(content).items()]
    return "\n".join([markdown_table(head, rows), "", machine(content, "numerics")])


def _trials(content: Content) -> dict[str, list[Content]]:
    grouped: dict[str, list[Content]] = {}
    for measured in content["numerics"].values():
        for row in measured["results"]:
            grouped.setdefault(row["trial"], []).append(row)
    return grouped


def _trial(name: str, rows: list[Content]) -> Row:
    """The worst of the rules and presets."""
    exact = [row for row in rows if row["name"].startswith("transport")]
    worst = (max(r["loss"] for r in rows), rows[0]["plain_loss"], max(r["weight_grad"] for r in rows))
    rest = (rows[0]["plain_weight_grad"], max(r["feedback"] for r in exact), rows[0]["plain_hidden_grad"])
    outside = [row["name"] for row in rows if not row["is_within"]]
    return (name, *(f"{value:.1e}" for value in (*worst, *rest)), f"**no**: {', '.join(outside)}" if outside else "yes")


BLOCKS: dict[str, Callable[[Content], str]] = {
    "cpu-times": cpu_times,
    "cpu-aims": cpu_aims,
    "gpu-times": gpu_times,
    "gpu-aims": gpu_aims,
    "gpu-roofline": gpu_roofline,
    "gpu-losses": losses,
    "gpu-shared": shared,
    "gpu-updates": updates,
    "gpu-sweeps": sweeps,
    "gpu-numerics": numerics,
    "cpu-losses": losses,
    "cpu-numerics": numerics,
}


def main() -> None:
    cpu, gpu = (read_results(RESULTS / f"exit_{kind}.json") for kind in ("cpu", "gpu"))
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), cpu, gpu), encoding="utf-8")


if __name__ == "__main__":
    main()
