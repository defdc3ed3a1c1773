"""`transformers.Trainer` moves the model to the GPU after `attach`: the rule and the exits' norms follow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from integrations.test_trainer import local_model, trainer_of

# With several GPUs Trainer wraps the model in nn.DataParallel.
pytestmark = pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs one CUDA device")


def test_trainer_trains_and_resumes_on_a_gpu(tmp_path: Path) -> None:
    first = local_model()
    trainer_of(first, tmp_path, use_cpu=False, max_steps=2).train()
    assert {tensor.device.type for tensor in (*first.parameters(), *first.buffers())} == {"cuda"}
    assert first.feedback.rows.any()
    resumed = local_model()
    trainer_of(resumed, tmp_path, use_cpu=False).train(resume_from_checkpoint=True)
    assert int(resumed.feedback.step) == 4
    assert not torch.equal(resumed.feedback.rows, first.feedback.rows)
