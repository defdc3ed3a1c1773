"""The benchmark on a GPU, small: events, the allocator's peaks, the peers that are installed.

    python -m pytest tests/gpu

Skipped where there is no CUDA device.
"""

from __future__ import annotations

import pytest
import torch

from localexit.bench import platforms
from localexit.bench.measure import measure
from localexit.bench.numerics import check_numerics, measure_numerics
from localexit.bench.plans import PEERS, Case, default_plans
from localexit.bench.shapes import Shape
from localexit.bench.shared import measure_shared

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPE = Shape(num_tokens=512, hidden_size=256, vocab_size=4096)


def quiet(line: str) -> None:
    """Progress that nobody reads."""


def test_every_contender_is_measured() -> None:
    case = Case(shape=SHAPE, plans=default_plans("cuda"), peers=PEERS)
    measured = measure(case, platforms.cuda(), rounds=5, say=quiet)
    results = {result["name"]: result for result in measured["results"]}
    assert {*map(str, case.plans)} <= set(results)
    assert {*PEERS} == {name for name in results if name in PEERS} | set(measured["not_available"])
    whole = 2 * SHAPE.num_tokens * SHAPE.vocab_size / 2**20
    assert results["F.cross_entropy"]["peak_mib"] > whole
    assert results["anchors step"]["backend"] == "triton"
    assert all(result["median_ms"] > 0 for result in results.values())


def test_exits_that_share_take_no_more_memory_than_one() -> None:
    plans = tuple(plan for plan in default_plans("cuda") if str(plan) in ("anchors step", "dense step"))
    measured = measure_shared(
        Case(shape=SHAPE, plans=plans, peers=()), platforms.cuda(), num_exits=4, rounds=5, say=quiet
    )
    for result in measured["results"]:
        # The feedback of an exit is all that is added.
        feedback = 2 * SHAPE.num_tokens * SHAPE.hidden_size / 2**20
        assert result["shared_peak_mib"] <= result["alone_peak_mib"] + 2 * feedback


def test_errors_are_within_the_budget() -> None:
    check_numerics(measure_numerics(SHAPE, platforms.cuda(), backend="auto", say=quiet))
