"""The benchmark of depth runs at a tiny size, resumes, and stops where gradients are wrong."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "depth.py"


@pytest.fixture(scope="module")
def depth() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_depth", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_memory_is_measured_once_and_flat(
    depth: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "depth.json"
    arguments = ["--size", "tiny", "--parts", "memory", "--output", str(output), "--commit", "a"]
    depth.main(arguments)
    cells = json.loads(output.read_text())["memory"]
    assert set(cells) == set(depth.MEMORY_KINDS)
    local, backprop = (cells[kind]["bytes_a_block"] for kind in depth.MEMORY_KINDS[:2])
    assert abs(local) <= 0.03 * backprop
    assert "of backprop's" in capsys.readouterr().out
    monkeypatch.setattr(depth, "activation_bytes", lambda *_: pytest.fail("measured again"))
    depth.main(arguments)
    depth.main(["--plot", str(tmp_path / "depth.svg"), "--output", str(output)])
    assert (tmp_path / "depth.svg").read_text().count("<svg") == 1


def test_every_contender_is_timed(depth: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    depth.main(["--size", "tiny", "--parts", "time"])
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in depth.TIME_KINDS)


def test_a_wrong_gradient_ends_it(depth: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = depth.top_loss
    monkeypatch.setattr(depth, "top_loss", lambda *arguments: 1.01 * whole(*arguments))
    with pytest.raises(SystemExit, match="nothing is measured"):
        depth.main(["--size", "tiny"])


def test_steps_in_hooks_are_the_ordinary_steps(depth: ModuleType) -> None:
    machine = depth.Machine(device=torch.device("cpu"), is_fast=False)
    shape = depth.SIZES["tiny"].memory
    ordinary, hooked = machine.model(shape), machine.model(shape)
    for model, kind in ((ordinary, "backprop, checkpoints"), (hooked, "backprop, checkpoints, in backward")):
        with depth.contender(machine, model, kind, optimizer=depth.adamw(model.parameters())) as made:
            for seed in range(3):
                made.step(machine.ids(shape, seed))
    for got, expected in zip(hooked.parameters(), ordinary.parameters(), strict=True):
        assert got.grad is None
        torch.testing.assert_close(got, expected)
