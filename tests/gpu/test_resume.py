"""On a GPU, with PyTorch's deterministic switches: 40 steps are 20, a new process, and 20 more, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from localexit.train.config import FeedbackSpec
from train.small_runs import small_config, write_corpus
from train.test_loop import assert_same_run, train_in_new_process

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# cuBLAS sums in the same order only with a work space of its own; read when CUDA starts, in the children.
DETERMINISTIC = """
import os
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
import torch
torch.use_deterministic_algorithms(True)
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "rule", ["mirror", "mirror_sampled", "anchors", "anchors_shared", "dense", "hybrid", "transport"]
)
def test_two_processes_do_what_one_does(tmp_path: Path, rule: str, precision: str) -> None:
    text, cache = write_corpus(tmp_path / "text"), tmp_path / "cache"
    options: dict[str, Any] = {"steps": 40, "eval_every": 10, "checkpoint_every": 20, "sample_tokens": 2}
    config = small_config(text, **options, device="cuda", precision=precision, feedback=FeedbackSpec.parse(rule))

    def run(folder: str, *, die_at: int, resume: bool) -> int:
        return train_in_new_process(
            [config], tmp_path / folder, cache, die_at=die_at, resume=resume, prelude=DETERMINISTIC
        )

    assert run("whole", die_at=40, resume=False) == 0
    assert run("halves", die_at=25, resume=False) == 9
    assert run("halves", die_at=40, resume=True) == 0
    assert_same_run(tmp_path / "whole" / rule, tmp_path / "halves" / rule)
