"""The tables of the page on performance are those of the committed results."""

from __future__ import annotations

import copy
import re
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any

import pytest

from docs.pages import ROOT, page, table
from localexit.bench.record import read_results

RESULTS = ROOT / "benchmarks" / "results"
TEXT = page("performance.md")


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    loader = SourceFileLoader("performance_page", str(ROOT / "benchmarks" / "performance_page.py"))
    module = ModuleType(loader.name)
    module.__file__ = loader.path
    loader.exec_module(module)
    return module


@pytest.fixture
def cpu() -> dict[str, Any]:
    return read_results(RESULTS / "exit_cpu.json")


@pytest.fixture
def gpu() -> dict[str, Any]:
    return read_results(RESULTS / "exit_gpu.json")


def find(content: dict[str, Any], shape: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(r for r in content["shapes"][shape]["results"] if r["name"] == name)
    return found


def test_the_page_is_what_the_results_say(writer: ModuleType, cpu: dict[str, Any], gpu: dict[str, Any]) -> None:
    assert writer.written(TEXT, cpu, gpu) == TEXT, "run `make tables`"


def test_every_table_has_its_place(writer: ModuleType) -> None:
    assert set(re.findall(r"<!-- ([a-z-]+) -->", TEXT)) - {"end"} == set(writer.BLOCKS)


def test_a_changed_result_changes_the_page(writer: ModuleType, cpu: dict[str, Any], gpu: dict[str, Any]) -> None:
    changed = copy.deepcopy(gpu)
    find(changed, "llama", "anchors step")["median_ms"] *= 1.01
    assert writer.written(TEXT, cpu, changed) != TEXT
    changed = copy.deepcopy(cpu)
    find(changed, "cpu", "dense autograd")["peak_mib"] += 1
    assert writer.written(TEXT, changed, gpu) != TEXT


def reached(text: str) -> dict[str, str]:
    return {row["aim"]: row["reached"].strip("*") for row in table(text, "aim")}


def test_aims_on_a_cpu_are_judged(writer: ModuleType, cpu: dict[str, Any]) -> None:
    eager = find(cpu, "cpu", "F.cross_entropy")
    own = find(cpu, "cpu", "dense autograd")
    for factor, expected in ((0.5, "yes"), (0.9, "no")):
        own["times_ms"] = [factor * ms for ms in eager["times_ms"]]
        own["median_ms"], own["vs_eager"] = factor * eager["median_ms"], 1 / factor
        assert reached(writer.cpu_aims(cpu))["`dense` faster than eager"] == expected
    find(cpu, "cpu", "sketch autograd")["peak_mib"] = 1290.0
    assert reached(writer.cpu_aims(cpu))["largest peak (`sketch autograd`)"] == "no"


def test_aims_on_a_gpu_are_judged(writer: ModuleType, gpu: dict[str, Any]) -> None:
    only = {**gpu, "shapes": {"llama": gpu["shapes"]["llama"]}}
    aim = "llama: steps of cheap rules, in forward products"
    for products, expected in ((2.2, "yes"), (2.21, "no")):
        for name in writer.CHEAP:
            find(only, "llama", f"{name} step")["products"] = 2.0
        find(only, "llama", "hybrid step")["products"] = products
        assert reached(writer.gpu_aims(only))[aim] == expected
    # The slowest of the cheap rules is compared, and with the fastest head of each kind.
    slowest = find(only, "llama", "hybrid step")
    slowest["median_ms"], slowest["times_ms"] = 1e4, [1e4 for _ in slowest["times_ms"]]
    told = reached(writer.gpu_aims(only))
    assert [told[aim] for aim in told if aim.startswith(("… faster than", "… than"))] == ["no"] * 3


def test_exits_that_share_are_judged_by_the_worst_rule(writer: ModuleType, gpu: dict[str, Any]) -> None:
    results = [{"name": "anchors", "exit_to_alone": 0.9}, {"name": "dense", "exit_to_alone": 1.01}]
    told = reached(writer.gpu_aims({**gpu, "shapes": {}, "updates": {}, "shared_exits": {"12": {"results": results}}}))
    assert told == {"12 exits: each against one alone (`dense`)": "no"}


def test_updates_of_a_mirror_are_judged_where_they_are_stored_in_bf16(writer: ModuleType, gpu: dict[str, Any]) -> None:
    shape = {"num_tokens": 8, "hidden_size": 4, "vocab_size": 9}
    told = {}
    for share in (0.049, 0.051):
        results = [{"storage": storage, "num_exits": 1, "share": share} for storage in ("fp32", "bf16")]
        updates = {"here": {"shape": shape, "results": results}}
        told[share] = reached(writer.gpu_aims({**gpu, "shapes": {}, "shared_exits": {}, "updates": updates}))
    assert [list(of.values()) for of in told.values()] == [["yes"], ["no"]]


def test_a_head_that_was_not_available_is_not_beaten(writer: ModuleType, gpu: dict[str, Any]) -> None:
    measured = gpu["shapes"]["llama"]
    measured["results"] = [r for r in measured["results"] if r["kind"] != "exact"]
    measured["not_available"] = {"torch.compile": "no compiler"}
    told = reached(writer.gpu_aims({**gpu, "shapes": {"llama": measured}}))
    assert not [aim for aim in told if "exact" in aim or "cut-cross" in aim]
    assert "Not available: `torch.compile` (no compiler)." in writer.gpu_times({**gpu, "shapes": {"llama": measured}})
