"""What a run comes down to: its last validation, exit by exit. The page and the terminal show the same."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .records import Floats
from .runs import Run

NUM_LAST_TRAIN_RECORDS = 20


@dataclass(frozen=True, kw_only=True)
class ExitRow:
    """Last results of one exit. `None` where nothing was measured.

    Attributes:
        exit: index, counted from 0 as in `localexit generate --exit`.
        is_last: whether it is the exit above the last block.
        nats_per_token: validation loss.
        change: how much it adds to the loss of the exit below, nats/token; negative is better.
        bits_per_byte: validation loss.
        accuracy: fraction of validation tokens predicted right.
        train_nats_per_token: training loss, mean of the last 20 records.
    """

    exit: int
    is_last: bool
    nats_per_token: float | None
    change: float | None
    bits_per_byte: float | None
    accuracy: float | None
    train_nats_per_token: float | None


@dataclass(frozen=True, kw_only=True)
class Totals:
    """How far the run went. `None` where nothing was logged."""

    steps: int | None
    tokens: int | None
    seconds: float | None
    valid_step: int | None


def exit_rows(run: Run) -> tuple[ExitRow, ...]:
    """Last results of every exit of `run`, first exit first."""
    valid, train = run.records.valid, run.records.train
    loss, bits, accuracy = (
        _last_row(curve, run.num_exits) for curve in (valid.loss, valid.bits_per_byte, valid.accuracy)
    )
    train_loss: Sequence[float | None] = [None] * run.num_exits
    if len(train.loss):
        train_loss = _means(train.loss[-NUM_LAST_TRAIN_RECORDS:])
    return tuple(
        ExitRow(
            exit=index,
            is_last=index == run.num_exits - 1,
            nats_per_token=loss[index],
            change=_difference(loss[index], loss[index - 1]) if index else None,
            bits_per_byte=bits[index],
            accuracy=accuracy[index],
            train_nats_per_token=train_loss[index],
        )
        for index in range(run.num_exits)
    )


def totals(run: Run) -> Totals:
    """Steps, training tokens and time of `run`, whichever kind of record went furthest."""
    train, valid = run.records.train, run.records.valid
    return Totals(
        steps=_largest(train.step, valid.step),
        tokens=_largest(train.tokens, valid.tokens),
        seconds=float(train.seconds[-1]) if len(train.seconds) else None,
        valid_step=int(valid.step[-1]) if len(valid.step) else None,
    )


def _means(rows: Floats) -> list[float]:
    """The mean of each column [T, L] over the records that have a number: exits may sit steps out."""
    with np.errstate(invalid="ignore"):
        is_number = ~np.isnan(rows)
        means: list[float] = (np.where(is_number, rows, 0).sum(0) / is_number.sum(0)).tolist()
    return means


def are_losses_comparable(runs: Sequence[Run]) -> bool:
    """Whether nats/token and accuracy mean the same in all `runs`: same text, cut into the same tokens."""
    return len({(_text_id(run), *_vocabulary_id(run, is_one_text=True)) for run in runs}) <= 1


def comparability_warnings(runs: Sequence[Run], keys: Sequence[str]) -> tuple[str, ...]:
    """Say why losses of `runs`, called by `keys`, must not be compared; empty if they may be."""
    warnings = []
    texts = _groups([_text_id(run) for run in runs], keys)
    if len(texts) > 1:
        warnings.append(
            f"These runs read different text (corpus sha256: {_spoken(texts)}). Their losses are not "
            "comparable: a lower one may only mean easier text. Bits/byte is the same unit in all of them, "
            "but was measured on different text too."
        )
    vocabularies = _groups([_vocabulary_id(run, is_one_text=len(texts) == 1) for run in runs], keys)
    if len(vocabularies) > 1:
        warnings.append(
            f"These runs cut text into different tokens (vocabulary: {_spoken(vocabularies)}). "
            "Nats/token and accuracy are not comparable; bits/byte does not depend on the vocabulary."
        )
    return tuple(warnings)


def _text_id(run: Run) -> str:
    return repr(run.corpus.get("sha256"))


def _vocabulary_id(run: Run, *, is_one_text: bool) -> tuple[str, str]:
    """Size of the vocabulary and, where the text is the same, how it cuts it."""
    bytes_per_token = run.corpus.get("valid_bytes_per_token") if is_one_text else None
    return repr(run.corpus.get("vocab_size")), repr(bytes_per_token)


def _last_row(curve: Floats, width: int) -> Sequence[float | None]:
    return curve[-1].tolist() if len(curve) else [None] * width


def _difference(upper: float | None, lower: float | None) -> float | None:
    return None if upper is None or lower is None else upper - lower


def _largest(*columns: Any) -> int | None:
    return max((int(np.max(column)) for column in columns if len(column)), default=None)


def _groups(values: Sequence[Hashable], keys: Sequence[str]) -> Mapping[Hashable, list[str]]:
    """Keys of the runs that share a value."""
    groups: dict[Hashable, list[str]] = {}
    for value, key in zip(values, keys, strict=True):
        groups.setdefault(value, []).append(key)
    return groups


def _spoken(groups: Mapping[Hashable, Sequence[str]]) -> str:
    return " against ".join(", ".join(members) for members in groups.values())
