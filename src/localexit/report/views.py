"""What the page says about each run, as plain values for the template; every string is still unescaped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .drawing import Chart
from .plots import run_charts
from .records import Event, Floats, Records, Sample
from .runs import Run
from .summary import ExitRow, Totals, exit_rows, totals
from .text import count, shortened
from .theme import Color, exit_colors, run_style

_MAX_SAMPLE = 4000
_MAX_VALUE = 400
_MAX_FLATTENED = 40
_NUM_RECENT_SAMPLES = 4
_MAX_OLDER_SAMPLES = 40
_MAX_EVENTS = 200
_STATES = {
    "finished": "finished",
    "interrupted": "interrupted",
    "non_finite": "stopped: loss not finite",
    "failed": "stopped by an error",
}


@dataclass(frozen=True, kw_only=True)
class SampleView:
    """A generated text, apart from the prompt it continues."""

    step: int
    exit: int
    prompt: str
    continuation: str


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run on the page.

    Attributes:
        key: A, B, …: what charts, warnings and links call the run.
        label: the shortest end of its path that no other run has.
        color: its colour among several.
        feedback: name of the rule, or empty.
        facts: what a reader asks first, as (name, value).
        state: finished, interrupted, …
        notes: what to know before believing the numbers.
        totals, rows: the results.
        exit_colors: one per row.
        charts: pictures.
        samples, older_samples: the last few, and some before them.
        events, num_events_left_out: the last events, and how many came before them.
        tables: (heading, (name, value) pairs) of configuration, corpus and versions.
    """

    key: str
    label: str
    color: Color
    feedback: str
    facts: Sequence[tuple[str, str]]
    state: str
    notes: Sequence[str]
    totals: Totals
    rows: Sequence[ExitRow]
    exit_colors: Sequence[Color]
    charts: Sequence[Chart]
    samples: Sequence[SampleView]
    older_samples: Sequence[SampleView]
    events: Sequence[Event]
    num_events_left_out: int
    tables: Sequence[tuple[str, Sequence[tuple[str, str]]]]


def run_views(runs: Sequence[Run]) -> tuple[RunView, ...]:
    """One view per run, in order."""
    labels = _labels([run.path for run in runs])
    return tuple(_run_view(run, index, label) for index, (run, label) in enumerate(zip(runs, labels, strict=True)))


def _run_view(run: Run, index: int, label: str) -> RunView:
    samples = [_sample_view(sample, run.num_exits) for sample in run.records.samples]
    events = run.records.events
    return RunView(
        key=_key(index),
        label=label,
        color=run_style(index)[0],
        feedback=shortened(_named(run.train_config, "feedback"), 40),
        facts=_facts(run),
        state=_STATES.get(events[-1].event if events else "", "not finished"),
        notes=_notes(run.records),
        totals=totals(run),
        rows=exit_rows(run),
        exit_colors=exit_colors(run.num_exits),
        charts=run_charts(run),
        samples=samples[-_NUM_RECENT_SAMPLES:],
        older_samples=samples[:-_NUM_RECENT_SAMPLES][-_MAX_OLDER_SAMPLES:],
        events=events[-_MAX_EVENTS:],
        num_events_left_out=max(len(events) - _MAX_EVENTS, 0),
        tables=(
            ("Training", _pairs(run.train_config)),
            ("Model", _pairs(run.model_config)),
            ("Corpus", _pairs(run.corpus)),
            ("Versions", [("device", run.device), *_pairs(run.versions)]),
        ),
    )


def _key(index: int) -> str:
    """Count in letters: A, B, … Z, AA, AB, …."""
    letter = chr(ord("A") + index % 26)
    return letter if index < 26 else _key(index // 26 - 1) + letter


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of `paths` that tell them apart."""
    labels = [path.name for path in paths]
    for depth in range(2, max(len(path.parts) for path in paths) + 1):
        if len(set(labels)) == len(labels):
            break
        labels = ["/".join(path.parts[-depth:]) for path in paths]
    return labels


def _facts(run: Run) -> list[tuple[str, str]]:
    facts = [
        ("feedback", _named(run.train_config, "feedback")),
        ("model", _named(run.train_config, "model")),
        ("corpus", _named(run.corpus, "name")),
        ("exits", count(run.num_exits) if run.num_exits else ""),
        ("device", run.device),
    ]
    return [(name, shortened(value, 60)) for name, value in facts if value]


def _named(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    return value if isinstance(value, str) else ""


def _notes(records: Records) -> list[str]:
    notes = []
    if not len(records.valid.step):
        notes.append("Nothing was validated yet.")
    if records.is_truncated:
        notes.append("The last line of metrics.jsonl was cut off in the middle of a write; it is left out.")
    if records.num_replaced:
        notes.append(f"{count(records.num_replaced)} records were made again after a resume; the later ones count.")
    num_broken = _num_broken(records.train.loss) + _num_not_finite(records.valid.loss)
    if num_broken:
        notes.append(f"{count(num_broken)} records have losses that are not finite; the curves have gaps there.")
    for kind, num_records in records.unknown_kinds.items():
        notes.append(f"{count(num_records)} records of kind {shortened(kind, 40)!r} are unknown to this version.")
    return notes


def _num_broken(curve: Floats) -> int:
    """Training records [T, L] with an infinity or without any number; an exit without one may have sat the step out."""
    return int((np.isinf(curve).any(axis=1) | np.isnan(curve).all(axis=1)).sum())


def _num_not_finite(curve: Floats) -> int:
    return int((~np.isfinite(curve)).any(axis=1).sum())


def _sample_view(sample: Sample, num_exits: int) -> SampleView:
    return SampleView(
        step=sample.step,
        exit=sample.exit + num_exits if sample.exit < 0 else sample.exit,
        prompt=shortened(sample.prompt, _MAX_SAMPLE),
        continuation=shortened(sample.text.removeprefix(sample.prompt), _MAX_SAMPLE),
    )


def _pairs(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten small nested objects into dotted names; values as text."""
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict) and 0 < len(value) <= _MAX_FLATTENED:
            pairs += _pairs(value, f"{prefix}{name}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            pairs.append((shortened(prefix + name, 80), shortened(shown, _MAX_VALUE)))
    return pairs
