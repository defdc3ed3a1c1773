from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.machines import gpu_like, quiet
from localexit.bench import command
from localexit.bench.config import BenchConfig
from localexit.bench.gate import GateError
from localexit.bench.inputs import make_inputs
from localexit.bench.plans import Case, RulePlan
from localexit.bench.record import Results
from localexit.bench.shapes import Shape
from localexit.bench.tables import shown
from localexit.bench.timing import Times
from localexit.bench.updates import NUM_EXITS, make_mirror, make_pairs, measure_updates
from localexit.feedback import WeightMirror
from localexit.train.config import FeedbackSpec

SHAPE = Shape(num_tokens=64, hidden_size=32, vocab_size=200)
CPU = torch.device("cpu")


def plan(rule: str) -> RulePlan:
    return RulePlan(rule=FeedbackSpec.parse(rule), mode="step")


def case(*rules: str) -> Case:
    return Case(shape=SHAPE, plans=tuple(map(plan, rules)), peers=())


MIRRORS = case("mirror:num_pairs=4", "mirror_sampled:storage=bf16,num_pairs=4")


def timed(runs: Any, *, rounds: int, say: Any) -> dict[str, Times]:
    for run in runs.values():
        run()
    lengths = {"exit": 40.0, "1": 2.0, "12": 12.0}
    return {name: Times(ms=(lengths[name.split()[-1]],) * rounds) for name in runs}


def test_an_update_is_told_against_its_exits_and_its_bytes() -> None:
    measured = measure_updates(MIRRORS, replace(gpu_like(), timer=timed), rounds=5, say=quiet)
    one, twelve, rounded, _ = measured["results"]
    assert NUM_EXITS == (1, 12)
    assert [r["storage"] for r in measured["results"]] == ["fp32", "fp32", "bf16", "bf16"]
    assert (one["num_pairs"], one["update_ms"], one["exit_ms"], one["share"]) == (4, 2.0, 40.0, pytest.approx(0.05))
    # Twelve exits take 480 ms.
    assert (twelve["num_pairs"], twelve["share"]) == (48, pytest.approx(0.025))
    assert one["least_mib"] == 2 * 4 * 200 * 32 / 2**20 == 2 * rounded["least_mib"]
    assert one["least_gb_per_s"] == pytest.approx(2 * 4 * 200 * 32 / 2e-3 / 1e9)


def test_exits_have_pairs_of_other_tokens() -> None:
    inputs = make_inputs(SHAPE, dtype=torch.float32, device=CPU)
    pairs = make_pairs(inputs, 4, 3)
    hidden = torch.cat([of_exit.hidden for of_exit in pairs])
    assert torch.equal(hidden, inputs.hidden[:12].detach())
    logits = torch.cat([of_exit.logits for of_exit in pairs])
    assert torch.allclose(logits, hidden @ inputs.weight.detach().T, atol=1e-6)


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("factor", [0.0, 0.9])
def test_an_update_that_is_wrong_is_not_timed(factor: float, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = WeightMirror._learn

    def weaker(mirror: WeightMirror, pairs: Any) -> None:
        before = mirror.rows.clone()
        right(mirror, pairs)
        if mirror.rows.dtype != torch.float64:
            mirror.rows.copy_(before.lerp(mirror.rows, factor))

    monkeypatch.setattr(WeightMirror, "_learn", weaker)
    rule = f"mirror:storage={storage},num_pairs=16"
    with pytest.raises(GateError, match="the update is off by"):
        measure_updates(case(rule), gpu_like(), rounds=5, say=quiet)


def test_only_mirrors_have_updates() -> None:
    with pytest.raises(ValueError, match="mirror_updates are of mirrors, and dense is none"):
        make_mirror(plan("dense"), make_inputs(SHAPE, dtype=torch.float32, device=CPU))


def test_updates_are_measured_once_and_shown(tmp_path: Path) -> None:
    options = BenchConfig(shapes=("64x32x200",), mirror_updates=True)
    circumstances = {"device": "a machine", "threads": 1, "versions": {"torch": torch.__version__}}
    results = Results(tmp_path / "exit.json", circumstances)
    lines: list[str] = []
    for _ in range(2):
        command.run_parts(options, replace(gpu_like(), timer=timed), results, say=lines.append)
    assert lines.count("updates, N=64 D=32 V=200: gate") == 1
    assert set(results.content) == {*circumstances, "updates"}
    rows = [line for line in shown(results.content).splitlines() if line.startswith("mirror_sampled:storage")]
    assert [row.split()[1:3] for row in rows] == [["1", "2.00"], ["12", "12.00"]] * 2
    assert all("5.0 %" in row for row in rows[::2])
