"""The benchmark of depth runs at a tiny size, resumes, and stops where gradients are wrong."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import depth
from depth_parts import contenders, largest, memory
from depth_parts.contenders import STEPPED_IN_HOOKS, adamw, contender
from depth_parts.largest import GIB
from depth_parts.models import Machine
from depth_parts.shapes import SIZES, Shape
from depth_parts.show import shown
from depth_parts.times import TIME_KINDS
from docs.pages import ROOT


def test_memory_is_measured_once_and_flat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "depth.json"
    arguments = ["--size", "tiny", "--parts", "memory", "--output", str(output), "--commit", "a"]
    depth.main(arguments)
    cells = json.loads(output.read_text())["memory"]
    assert set(cells) == set(memory.MEMORY_KINDS)
    local, backprop = (cells[kind]["bytes_a_block"] for kind in memory.MEMORY_KINDS[:2])
    assert abs(local) <= 0.03 * backprop
    assert "of backprop's" in capsys.readouterr().out
    monkeypatch.setattr(memory, "activation_bytes", lambda *_: pytest.fail("measured again"))
    depth.main(arguments)
    depth.main(["--plot", str(tmp_path / "depth.svg"), "--output", str(output)])
    assert (tmp_path / "depth.svg").read_text().count("<svg") == 1


def test_every_contender_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    depth.main(["--size", "tiny", "--parts", "time"])
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in TIME_KINDS)


def test_a_wrong_gradient_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contenders.top_loss
    monkeypatch.setattr(contenders, "top_loss", lambda *arguments: 1.01 * whole(*arguments))
    with pytest.raises(SystemExit, match="nothing is measured"):
        depth.main(["--size", "tiny"])


def test_steps_in_hooks_are_the_ordinary_steps() -> None:
    machine = Machine(device=torch.device("cpu"), is_fast=False)
    shape = SIZES["tiny"].memory
    ordinary, hooked = machine.model(shape), machine.model(shape)
    with_grads: list[int] = []

    def look(_: Tensor) -> None:
        with_grads.append(sum(any(p.grad is not None for p in block.parameters()) for block in hooked.blocks))

    for model, kind in ((ordinary, "backprop, checkpoints"), (hooked, STEPPED_IN_HOOKS)):
        with contender(machine, model, kind, optimizer=adamw(model.parameters())) as made:
            if model is hooked:
                for parameter in hooked.parameters():
                    parameter.register_post_accumulate_grad_hook(look)
            for seed in range(3):
                made.step(machine.ids(shape, seed))
    # The gradients of one block live at a time.
    assert max(with_grads) == 1
    for got, expected in zip(hooked.parameters(), ordinary.parameters(), strict=True):
        assert got.grad is None
        torch.testing.assert_close(got, expected)


def test_no_contender_keeps_a_model_that_is_done_with() -> None:
    machine = Machine(device=torch.device("cpu"), is_fast=False)
    for kind in largest.LARGEST_KINDS:
        model = machine.model(SIZES["tiny"].memory)
        weights = [weakref.ref(parameter) for parameter in model.parameters()]
        with contender(machine, model, kind, optimizer=adamw(model.parameters())) as made:
            made.step(machine.ids(SIZES["tiny"].memory, 0))
        del model, made
        gc.collect()
        assert all(weight() is None for weight in weights), kind


def test_a_state_that_is_there_from_the_start_changes_nothing() -> None:
    machine = Machine(device=torch.device("cpu"), is_fast=False)
    models = [machine.model(SIZES["tiny"].memory) for _ in range(2)]
    for model, has_state in zip(models, (False, True), strict=True):
        optimizer = adamw(model.parameters(), has_state=has_state)
        assert bool(optimizer.state) == has_state
        with contender(machine, model, "local, every block", optimizer=optimizer) as made:
            for seed in range(2):
                made.step(machine.ids(SIZES["tiny"].memory, seed))
    for got, expected in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(got, expected)


def test_the_largest_number_of_blocks_is_read_off_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: peaks are made up, and what was tried is looked at."""
    machine, tried = Machine(device=torch.device("cpu"), is_fast=False), []

    def peak(_machine: Machine, shape: Shape, kind: str) -> int:
        assert kind == STEPPED_IN_HOOKS
        return GIB * (2 + shape.num_blocks)

    monkeypatch.setattr(largest, "training_peak", peak)
    monkeypatch.setattr(largest, "_fits", lambda _m, shape, _k, gib: tried.append((shape.num_blocks, gib)) or True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))
    cell = largest.measure_largest(machine, SIZES["tiny"], STEPPED_IN_HOOKS)
    assert cell["blocks"] == {"12": 9, "24": 21, "80": 77}
    assert tried == [(9, 11.5), (21, 23.5)]
    assert cell["fits"] == {"12": True, "24": True}
    described = {"device": "made up", "versions": {"torch": "2"}, "largest": {STEPPED_IN_HOOKS: cell}}
    assert "21 (0.00B) ran" in shown(described)


def test_committed_results_are_read() -> None:
    for name in ("depth_cpu", "depth_gpu"):
        content = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
        assert all(kind in shown(content) for kind in content["memory"])
