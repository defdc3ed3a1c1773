"""What of recorded steps does not need a GPU; the others are in `tests/gpu/test_captured.py`."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils

from localexit import make_feedback
from localexit._rules import feedback_names
from localexit.train.captured import check_machine, check_rule, first_cause
from localexit.train.errors import RunFailedError
from localexit.train.masks import masks_left_to_attention, one_sequence_a_row
from train.test_trainer import make_trainer


@pytest.mark.parametrize("name", feedback_names())
def test_only_updates_that_the_host_counts_are_refused(name: str) -> None:
    check_rule(make_feedback(name, 8, 50))
    if name.startswith("mirror"):
        for options in ({"storage": "bf16"}, {"update_every": 2}):
            with pytest.raises(ValueError, match="cuda_graph: expected a rule whose update is the same"):
                check_rule(make_feedback(name, 8, 50, **options))


@pytest.mark.parametrize(
    ("device", "num_processes", "message"),
    [("cpu", 1, "expected a CUDA device, got 'cpu'"), ("cuda", 2, "expected one process, got 2")],
)
def test_machines_are_refused(device: str, num_processes: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"cuda_graph: {message}.*pass --no-cuda-graph"):
        check_machine(torch.device(device), num_processes=num_processes)


def test_a_trainer_on_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="cuda_graph: expected a CUDA device"):
        make_trainer(cuda_graph=True)


@pytest.mark.parametrize("is_recording", [False, True])
def test_attention_gets_no_mask_where_nothing_looks_at_numbers(
    is_recording: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, masks = make_trainer(), []
    before = masking_utils.find_packed_sequence_indices
    if is_recording:
        # What transformers does where it may not look.
        monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)
    trainer.local.blocks[0].register_forward_pre_hook(
        lambda _block, _inputs, named: masks.append(named["attention_mask"]), with_kwargs=True
    )
    with masks_left_to_attention():
        trainer.train_step()
    assert masks == [None]
    assert masking_utils.find_packed_sequence_indices is before
    trainer.train_step()
    assert (masks[1] is None) is not is_recording


def test_several_sequences_in_a_row_are_refused() -> None:
    trainer = make_trainer()
    ids = trainer.sampler.next_batch()
    positions = torch.arange(ids.shape[1]).expand_as(ids).clone()
    with one_sequence_a_row():
        trainer.local(ids, ids, position_ids=positions)
        positions[:, 5:] -= 5
        with pytest.raises(RunFailedError, match="cuda_graph: expected one sequence in each row"):
            trainer.local(ids, ids, position_ids=positions)
    trainer.local(ids, ids, position_ids=positions)


def test_names_that_another_version_of_transformers_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(masking_utils, "find_packed_sequence_indices")
    with masks_left_to_attention():
        assert not hasattr(masking_utils, "find_packed_sequence_indices")
    assert not hasattr(masking_utils, "find_packed_sequence_indices")


def test_the_first_cause_is_told() -> None:
    """A recording that breaks raises once more when it ends."""
    with pytest.raises(RuntimeError) as raised:
        try:
            try:
                {}["missing"]
            except KeyError:
                raise torch.OutOfMemoryError("no memory") from None
        finally:
            raise RuntimeError("failed due to a previous error")
    assert isinstance(first_cause(raised.value), torch.OutOfMemoryError)
    alone = RuntimeError("alone")
    assert first_cause(alone) is alone
