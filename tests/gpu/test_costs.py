"""On a GPU, where kernels of our own make some products, a comparison counts as many FLOPs as on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from localexit.compare.methods import Method
from localexit.compare.plans import Job
from localexit.compare.training import run_cell
from train.small_runs import small_config, write_corpus

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_an_exit_is_three_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = small_config(write_corpus(tmp_path / "text"), device="cuda", precision="bf16")
    local, backprop = (
        run_cell(Job(method=name, config=Method.parse(name).config(base, {}))) for name in ("transport", "backprop")
    )
    exit_flops = 3 * 2 * 64 * 320
    assert local.exit_flops_per_token == pytest.approx(exit_flops)
    assert local.flops_per_token - backprop.flops_per_token == pytest.approx(exit_flops)
