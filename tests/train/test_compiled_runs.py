"""Runs with compiled blocks: trained, continued, and read as any other run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from localexit.local import compile_units
from localexit.train.config import FeedbackSpec, TrainConfig
from localexit.train.export import load_run
from train.small_runs import small_config, train_quietly
from train.test_loop import records
from train.test_trainer import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def losses(run: Path) -> list[float]:
    """Of all exits, over all steps and validations."""
    return [loss for line in records(run, "train", "valid") for loss in line["loss"]]


@pytest.mark.parametrize("backend", [pytest.param("inductor", marks=needs_compiler), "aot_eager"])
def test_compiled_and_eager_runs_go_on_as_each_other(
    backend: str, text: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []

    def compiled(local: object) -> None:
        used.append(backend)
        partial(compile_units, backend=backend)(local)  # type: ignore[arg-type]

    monkeypatch.setattr("localexit.train.loop.compile_units", compiled)
    eager, fast = small_config(text), small_config(text, compile=True)
    expected = losses(train_quietly(eager, tmp_path / "eager", cache_dir).run.path)
    assert used == []
    for first, then in ((fast, eager), (eager, fast)):
        run = tmp_path / f"from-{first.compile}"
        train_quietly(first, run, cache_dir)
        shutil.rmtree(run / "checkpoints" / "step-6")
        assert train_quietly(then, run, cache_dir, resume=True).status == "finished"
        assert losses(run) == pytest.approx(expected, rel=1e-4)
    assert used == [backend] * 2
    local, _ = load_run(tmp_path / "from-True", device=torch.device("cpu"))
    assert not any("forward" in block.__dict__ for block in local.blocks)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "in_backward"},
        {"accumulate": 2, "exits_per_step": 1},
        {"token_share": 0.5, "exit_warmup": 2},
        {"train_blocks": False},
    ],
    ids=str,
)
def test_steps_are_those_of_eager_blocks(changes: dict[str, Any]) -> None:
    eager, compiled = (make_trainer(feedback=FeedbackSpec.parse("mirror_sampled"), **changes) for _ in range(2))
    compile_units(compiled.local, backend="aot_eager")
    for _ in range(4):
        expected, got = eager.train_step(), compiled.train_step()
        # An exit that sat the step out has no loss.
        assert [loss is None for loss in got.losses] == [loss is None for loss in expected.losses]
        assert [loss or 0 for loss in got.losses] == pytest.approx([loss or 0 for loss in expected.losses], rel=1e-5)
        assert got.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)


def test_a_platform_without_a_compiler_is_refused_before_the_folder_is_made(
    text: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr("localexit.train.loop.compile_units", partial(compile_units, backend=broken))
    with pytest.raises(ValueError, match="compile: .* got: .* no compiler found; install .*, or leave compile out"):
        train_quietly(small_config(text, compile=True), tmp_path / "run", cache_dir)
    assert not (tmp_path / "run").exists()


def test_runs_of_earlier_versions_were_not_compiled() -> None:
    content = TrainConfig(compile=True).to_json()
    assert TrainConfig.from_json(content).compile
    del content["compile"]
    assert not TrainConfig.from_json(content).compile
