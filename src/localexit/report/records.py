"""`metrics.jsonl`, read into arrays: one JSON object a line, sorted by its `kind`.

Curves have one row per record: T records, L exits, G gradient norms (one per unit, then the shared
parameters). Records that a resume made again count once, as made last.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localexit._files import parse_json, read_lines

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainRecords:
    """What was logged while training.

    Attributes:
        step: [T] optimiser steps, strictly increasing.
        tokens: [T] training tokens seen so far.
        seconds: [T] time spent in training so far.
        lr: [T] learning rate.
        tokens_per_second: [T] throughput.
        loss: [T, L] training loss of each exit, nats/token.
        grad_norm: [T, G] gradient norm of each unit, then of the shared parameters, before clipping.
    """

    step: Ints
    tokens: Ints
    seconds: Floats
    lr: Floats
    tokens_per_second: Floats
    loss: Floats
    grad_norm: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class ValidRecords:
    """What was measured on the validation text.

    Attributes:
        step: [T] optimiser steps, strictly increasing.
        tokens: [T] training tokens seen so far.
        loss: [T, L] nats/token.
        bits_per_byte: [T, L] the same loss in a unit that does not depend on the vocabulary.
        accuracy: [T, L] fraction of tokens predicted right.
    """

    step: Ints
    tokens: Ints
    loss: Floats
    bits_per_byte: Floats
    accuracy: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class DiagnosisRecords:
    """How close the feedback was to the exact gradient.

    Attributes:
        step: [T] optimiser steps, strictly increasing.
        gradient_cosine: [T, L] of the blocks' gradients with the exact ones, averaged over batches before.
        batch_gradient_cosine: [T, L] the same of single batches.
        feedback_cosine: [T, L] of feedback and exact gradient, mean over tokens.
        norm_ratio: [T, L] of their sizes.
        bias_ratio: [T, L] size of their mean difference over that of the mean exact gradient.
        rows_cosine: [T] of W and the matrix that stands in for it; NaN where there is none.
        rows_error: [T] distance of a mirror from W, relative to W; NaN where there is none.
    """

    step: Ints
    gradient_cosine: Floats
    batch_gradient_cosine: Floats
    feedback_cosine: Floats
    norm_ratio: Floats
    bias_ratio: Floats
    rows_cosine: Floats
    rows_error: Floats


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Text that exit `exit` wrote after `prompt` at `step`."""

    step: int
    prompt: str
    text: str
    exit: int


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to the run: started, resumed, skipped, interrupted, non_finite, finished."""

    step: int
    event: str
    detail: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Records:
    """The records of one run.

    Attributes:
        train, valid, diagnoses, samples, events: the records, by kind.
        num_replaced: training and validation records left out because a resume went back before them.
        unknown_kinds: how many records of kinds unknown to this version there are, by kind.
        is_truncated: whether the last line was cut off in the middle of a write, and left out.
    """

    train: TrainRecords
    valid: ValidRecords
    diagnoses: DiagnosisRecords
    samples: tuple[Sample, ...]
    events: tuple[Event, ...]
    num_replaced: int
    unknown_kinds: Mapping[str, int]
    is_truncated: bool


def read_records(path: Path) -> Records:
    """Read the file `path`; `NaN`, `Infinity` and `null` among the numbers are kept, as NaN or infinity.

    Raises:
        ValueError: a line that is not a record, or records that disagree on the number of exits. The message
            names the line and the field.
    """
    train = _Columns(whole=("step", "tokens"), real=("seconds", "lr", "tokens_per_second"), rows=("loss", "grad_norm"))
    valid = _Columns(whole=("step", "tokens"), real=(), rows=("loss", "bits_per_byte", "accuracy"))
    diagnoses = _Columns(
        whole=("step",),
        real=("rows_cosine", "rows_error"),
        rows=("gradient_cosine", "batch_gradient_cosine", "feedback_cosine", "norm_ratio", "bias_ratio"),
    )
    samples: list[Sample] = []
    events: list[Event] = []
    unknown_kinds: Counter[str] = Counter()
    is_truncated = False
    for number, line in read_lines(path):
        try:
            record = _parse(line)
            match _text(record, "kind"):
                case "train":
                    train.append(record)
                case "valid":
                    valid.append(record)
                case "diagnosis":
                    diagnoses.append(record)
                case "sample":
                    samples.append(_sample(record))
                case "event":
                    events.append(_event(record))
                case kind:
                    unknown_kinds[kind] += 1
        except ValueError as error:
            # Only a write that was cut off leaves a line without its end.
            if line.endswith(b"\n"):
                raise ValueError(f"{path} line {number}: {error}; delete the line") from None
            is_truncated = True
    train_arrays, valid_arrays = train.arrays(), valid.arrays()
    _check_same_exits(path, train_arrays["loss"], valid_arrays["loss"])
    return Records(
        train=TrainRecords(**train_arrays),
        valid=ValidRecords(**valid_arrays),
        diagnoses=DiagnosisRecords(**diagnoses.arrays()),
        samples=_latest_samples(samples),
        events=tuple(events),
        num_replaced=len(train) + len(valid) - len(train_arrays["step"]) - len(valid_arrays["step"]),
        unknown_kinds=dict(unknown_kinds),
        is_truncated=is_truncated,
    )


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Numbers of many records, column by column, so that a million records stay small."""

    whole: tuple[str, ...]
    real: tuple[str, ...]
    rows: tuple[str, ...]
    values: dict[str, array[float]] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._column("step"))

    def append(self, record: Mapping[str, Any]) -> None:
        for name in self.whole:
            self._column(name).append(_whole(record, name))
        for name in self.real:
            self._column(name).append(_number(_get(record, name), name))
        for name in self.rows:
            row = _row(record, name)
            if len(row) != self.widths.setdefault(name, len(row)):
                raise ValueError(f"expected {self.widths[name]} values in {name!r}, got {len(row)}")
            self._column(name).extend(row)

    def arrays(self) -> dict[str, Any]:
        """Arrays [T], and [T, width] for rows, without the records that a resume made again."""
        columns: dict[str, Any] = {name: np.array(self._column(name)) for name in self.real}
        columns |= {name: np.array(self._column(name), dtype=np.int64) for name in self.whole}
        for name in self.rows:
            columns[name] = np.array(self._column(name)).reshape(len(self), self.widths.get(name, 0))
        kept = _is_latest(columns["step"])
        return {name: column[kept] for name, column in columns.items()}

    def _column(self, name: str) -> array[float]:
        return self.values.setdefault(name, array("d"))


def _parse(line: bytes) -> Mapping[str, Any]:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ValueError(f"expected a JSON object, got {line[:40]!r} ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {record!r:.40}")
    return record


def _sample(record: Mapping[str, Any]) -> Sample:
    exit_index = _get(record, "exit")
    if isinstance(exit_index, bool) or not isinstance(exit_index, int):
        raise ValueError(f"expected an integer in 'exit', got {exit_index!r:.40}")
    return Sample(
        step=_whole(record, "step"),
        prompt=_text(record, "prompt"),
        text=_text(record, "text"),
        exit=exit_index,
    )


def _event(record: Mapping[str, Any]) -> Event:
    return Event(step=_whole(record, "step"), event=_text(record, "event"), detail=_text(record, "detail"))


def _get(record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        raise ValueError(f"expected a field {name!r}, got only {', '.join(map(repr, record))}")
    return record[name]


def _number(value: Any, name: str) -> float:
    """A float. JSON has no NaN, so some writers put null."""
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number in {name!r}, got {value!r:.40}")
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _row(record: Mapping[str, Any], name: str) -> list[float]:
    values = _get(record, name)
    if not isinstance(values, list) or not values:
        raise ValueError(f"expected a list of numbers in {name!r}, got {values!r:.40}")
    return [_number(value, name) for value in values]


def _whole(record: Mapping[str, Any], name: str) -> int:
    value = _get(record, name)
    # Columns are float64, exact up to 2^53.
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 2**53:
        raise ValueError(f"expected a whole number in {name!r}, got {value!r:.40}")
    return value


def _text(record: Mapping[str, Any], name: str) -> str:
    value = _get(record, name)
    if not isinstance(value, str):
        raise ValueError(f"expected text in {name!r}, got {value!r:.40}")
    return value


def _check_same_exits(path: Path, train_loss: Floats, valid_loss: Floats) -> None:
    if len(train_loss) and len(valid_loss) and train_loss.shape[1] != valid_loss.shape[1]:
        raise ValueError(
            f"{path}: expected as many exits in training as in validation records, got "
            f"{train_loss.shape[1]} and {valid_loss.shape[1]}; the file mixes two runs"
        )


def _is_latest(step: Ints) -> NDArray[np.bool_]:
    """[T] whether no later record has the same or an earlier step: a resume replaces what it makes again."""
    earliest_from_here = np.minimum.accumulate(step[::-1])[::-1]
    earliest_after = np.append(earliest_from_here[1:], np.iinfo(np.int64).max)[: len(step)]
    return np.asarray(step < earliest_after)


def _latest_samples(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """The same for samples, of which one step may have several."""
    kept: list[Sample] = []
    for sample in reversed(samples):
        if not kept or sample.step <= kept[-1].step:
            kept.append(sample)
    return tuple(reversed(kept))
