"""How good exits are, against sums written out token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from inference.test_decoding import MODELS, local_model
from local.decoders import VOCAB
from localexit import LocalModel
from localexit.inference.quality import NUM_BINS, Quality, measure_quality
from localexit.local import predict

Row = tuple[float, bool, bool, float]


def batches(num: int = 3, *, length: int = 9, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (2, length), generator=generator) for _ in range(num)]


def rows_of(local: LocalModel, ids: Tensor) -> list[list[Row]]:
    """Per token and exit: loss, is right, agrees with the last, confidence; from whole logits."""
    probabilities = [
        local.exit_logits(index, ids)[:, :-1].softmax(-1).flatten(0, 1) for index in range(local.num_exits)
    ]
    rows = []
    for token, target in enumerate(ids[:, 1:].flatten().tolist()):
        last = int(probabilities[-1][token].argmax())
        at_exits = [p[token] for p in probabilities]
        rows.append(
            [
                (-float(p[target].log()), int(p.argmax()) == target, int(p.argmax()) == last, float(p.max()))
                for p in at_exits
            ]
        )
    return rows


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def calibration_error(rows: list[Row]) -> float:
    total = 0.0
    for number in range(NUM_BINS):
        inside = [row for row in rows if number <= row[3] * NUM_BINS < number + 1]
        if inside:
            total += len(inside) * abs(mean([row[1] for row in inside]) - mean([row[3] for row in inside]))
    return total / len(rows)


@pytest.mark.parametrize("exits", ["every", "every:2"])
@pytest.mark.parametrize("name", ["plain", "llama", "gemma2"])
def test_quality_of_every_exit(name: str, exits: str) -> None:
    local = local_model(name, exits=exits)
    rows = [row for ids in batches() for row in rows_of(local, ids)]
    found = measure_quality(local, batches())
    assert found.num_tokens == len(rows) == 48
    for index, got in enumerate(found.exits):
        mine = [row[index] for row in rows]
        assert got.num_blocks == local.exits[index].block_index + 1
        assert got.loss == pytest.approx(mean([row[0] for row in mine]), rel=1e-9)
        assert got.accuracy == pytest.approx(mean([row[1] for row in mine]))
        assert got.agreement == pytest.approx(mean([row[2] for row in mine]))
        assert got.confidence == pytest.approx(mean([row[3] for row in mine]), rel=1e-9)
        assert got.calibration_error == pytest.approx(calibration_error(mine), rel=1e-9)
    assert found.exits[-1].agreement == 1
    assert found.exits[0].agreement < 1


def test_early_exits_by_threshold() -> None:
    local = local_model("llama")
    rows = [row for ids in batches() for row in rows_of(local, ids)]
    early = sorted(max(at[3] for at in row[:-1]) for row in rows)
    # between two confidences, not at one
    thresholds = (*((early[i] + early[i + 1]) / 2 for i in (0, 10, 30)), 1.0)
    found = measure_quality(local, batches(), thresholds=thresholds)
    for threshold, got in zip(thresholds, found.early, strict=True):
        leaves = [next((i for i, at in enumerate(row) if at[3] >= threshold), len(row) - 1) for row in rows]
        chosen = [row[index] for row, index in zip(rows, leaves, strict=True)]
        assert got.threshold == threshold
        assert got.average_blocks == pytest.approx(mean([index + 1 for index in leaves]))
        assert got.loss == pytest.approx(mean([row[0] for row in chosen]), rel=1e-9)
        assert got.accuracy == pytest.approx(mean([row[1] for row in chosen]))
        assert got.agreement == pytest.approx(mean([row[2] for row in chosen]))
    depths = [point.average_blocks for point in found.early]
    assert 1 <= depths[0] < depths[1] < depths[2] < depths[3] == 4
    assert found.early[-1].loss == found.exits[-1].loss


@pytest.mark.parametrize("name", MODELS)
def test_chunks_of_logits_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    local = local_model(name)
    whole = measure_quality(local, batches())
    monkeypatch.setattr(predict, "_CHUNK_BYTES", 4 * VOCAB * 5)
    parts: Quality = measure_quality(local, batches())
    for ours, theirs in zip(parts.early, whole.early, strict=True):
        # Products of fewer rows may round otherwise.
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-12)
        assert replace(ours, loss=0.0) == replace(theirs, loss=0.0)
    for got, expected in zip(parts.exits, whole.exits, strict=True):
        assert got.loss == pytest.approx(expected.loss, rel=1e-12)
        assert got.calibration_error == pytest.approx(expected.calibration_error, rel=1e-9)


def test_labels_left_out_do_not_count() -> None:
    local = local_model("llama")
    ids = batches(1)[0]
    labels = ids.clone()
    labels[0, 3] = labels[1] = -100
    found = local.predictions(ids, labels)
    assert int(found.is_counted.sum()) == 7
    assert found.log_prob[:, ~found.is_counted].abs().max() == 0
    expected = local.evaluate(ids, labels)
    torch.testing.assert_close(-found.log_prob.sum((1, 2)) / 7, expected.loss)


def test_nothing_to_predict_and_thresholds_out_of_range_are_refused() -> None:
    local = local_model("llama")
    with pytest.raises(ValueError, match="expected tokens to predict, got none"):
        measure_quality(local, [])
    with pytest.raises(ValueError, match="thresholds must be in"):
        measure_quality(local, batches(), thresholds=(0.5, 0.0))
