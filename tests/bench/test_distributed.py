"""benchmarks/distributed.py: it runs, records what it promises, and times nothing that is not right."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from docs.pages import ROOT
from helpers.ranks import rank_replies
from localexit.exits.ranks import VocabParallel
from localexit.local.average import GradientAverage
from localexit.local.pipeline import Pipeline


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_distributed", ROOT / "benchmarks/distributed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks for its module there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(output: Path) -> dict[str, Any]:
    return load().main(["--tiny", "--device", "cpu", "--output", str(output)])


def numbers(content: Any) -> list[float]:
    if isinstance(content, dict):
        return [number for value in content.values() for number in numbers(value)]
    return [content] if isinstance(content, (int, float)) else []


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_part_is_recorded(num_ranks: int, tmp_path: Path) -> None:
    replies = rank_replies(run, num_ranks, tmp_path / "out.json", timeout=240)
    assert [error for error, _ in replies if error] == []
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["ranks"] == num_ranks
    for part in load().PARTS:
        found = numbers(content[part])
        assert found
        assert all(math.isfinite(number) for number in found)
    assert content["pipeline"]["1f1b"]["tokens_per_second"][str(num_ranks)] > 0
    assert content["vocab_parallel"]["dense"]["sent_mib"] > 0


def run_broken(what: str, output: Path) -> None:
    if what == "data parallel":
        GradientAverage.start = lambda self, index: self._todo.pop(index)  # type: ignore[assignment, method-assign]
    elif what == "spread unembedding":
        VocabParallel.total = lambda _self, part: part  # type: ignore[method-assign]
    else:
        Pipeline._send = lambda self, hidden: send(self, 1.1 * hidden)  # type: ignore[method-assign]
    run(output)


send = Pipeline._send


@pytest.mark.slow
@pytest.mark.parametrize("what", ["data parallel", "spread unembedding", "losses of the pipeline"])
def test_what_is_not_right_is_not_timed(what: str, tmp_path: Path) -> None:
    for error, _ in rank_replies(run_broken, 2, what, tmp_path / "out.json"):
        assert "gate: " in str(error)
        assert what in str(error)
    assert not (tmp_path / "out.json").exists()
