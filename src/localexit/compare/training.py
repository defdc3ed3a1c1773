"""One job to one cell: a run without a folder, through the same trainer as `localexit train`."""

from __future__ import annotations

import math
import os
import statistics
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from localexit.bench.record import current_commit
from localexit.compare.cells import Cell, Validation
from localexit.compare.costs import counted_flops, exit_flops, feedback_bytes
from localexit.compare.plans import Job
from localexit.train.checkpoint import load_newest, save_checkpoint
from localexit.train.config import TrainConfig
from localexit.train.data import RunData, load_data
from localexit.train.devices import device_name, resolve_device, resolve_precision
from localexit.train.errors import NonFiniteError
from localexit.train.evaluate import diagnose_feedback, validate
from localexit.train.folder import versions
from localexit.train.loop import make_trainer
from localexit.train.trainer import Trainer

# The first steps of a call allocate and compile; their times are not counted.
NUM_WARM_UP_STEPS = 5


class OutOfTimeError(Exception):
    """The time allowed is over before the cell is finished; its state is kept, if there is a folder for that."""


@dataclass(kw_only=True)
class _Measured:
    """What a run has shown so far, in this call and in those that it goes on from.

    Attributes:
        origin: what a call must have in common with the ones before to go on from them.
        first_step: steps made before this call.
        wall_seconds, peak_bytes: of the calls before this one.
        load_before: load average before the first of them.
        valid, diagnostics, step_seconds, flops_per_token, exit_flops_per_token: of the cell.
    """

    origin: Mapping[str, Any]
    exit_flops_per_token: float
    load_before: float
    first_step: int = 0
    wall_seconds: float = 0.0
    peak_bytes: int = 0
    valid: list[Validation] = field(default_factory=list)
    diagnostics: list[Mapping[str, Any]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    flops_per_token: float = 0.0

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> _Measured:
        """Inverse of `asdict`, after JSON."""
        valid = [Validation(**{**one, "loss": tuple(one["loss"])}) for one in content["valid"]]
        return cls(**{**content, "valid": valid})


def run_cell(job: Job, *, deadline: float = math.inf, unfinished: Path | None = None) -> Cell:
    """Train one cell, or what is left of it.

    On a CPU a cell that is made by several calls is the one that a single call makes, but for its times.

    Args:
        job: what to train.
        deadline: `time.time()` after which the run stops.
        unfinished: folder where a run that stops leaves its state, and finds that of the call before.

    Raises:
        OutOfTimeError: the deadline came first.
        ValueError: text, model or rule do not fit the configuration, or the text is not the one wanted.
    """
    start = time.time()
    if job.config.threads is not None:
        torch.set_num_threads(job.config.threads)
    device, data = resolve_device(job.config.device), _data_of(job)
    with warnings.catch_warnings():
        # A comparison shows what comes of it.
        warnings.filterwarnings("ignore", message="feedback 'parallel", category=UserWarning)
        warnings.filterwarnings("ignore", message="the nucleus of some tokens", category=UserWarning)
        trainer, measured = _begun(job, data, device, unfinished)
        detail = ""
        try:
            _train(job, trainer, data, measured, deadline)
        except NonFiniteError as error:
            detail = str(error)
        except OutOfTimeError:
            if unfinished is not None and trainer.step > measured.first_step:
                _save(trainer, _with_call(measured, start, device), unfinished)
            raise
    return _cell(job, trainer, data, _with_call(measured, start, device), detail)


def _data_of(job: Job) -> RunData:
    """The text of a job, if it is the one wanted."""
    config = job.config
    data = _data(
        TrainConfig(data=config.data, model=config.model, vocab_size=config.vocab_size, context=config.context)
    )
    if job.text is not None and job.text != data.record["sha256"]:
        raise ValueError(
            f"data: expected the text that the other cells were trained on, sha256 {job.text[:12]}, got "
            f"{data.record['name']} with {data.record['sha256'][:12]}; pass another --output, or that text as --data "
            f"(Python's standard library is another text in every version)"
        )
    return data


def _begun(job: Job, data: RunData, device: torch.device, unfinished: Path | None) -> tuple[Trainer, _Measured]:
    """The trainer of a cell and what it has measured: nothing, or what an earlier call left."""
    # The commit now, not at the end: sources may change meanwhile.
    origin, load_before = _origin(job, data, device), _load_average()
    if job.config.compile:
        # What was compiled for the cells before would make later ones compile for sizes that vary.
        torch.compiler.reset()
    trainer = make_trainer(job.config, data, device=device, precision=resolve_precision(job.config.precision, device))
    exit_flops_per_token = _exit_flops_per_token(trainer)
    measured = _Measured(origin=origin, exit_flops_per_token=exit_flops_per_token, load_before=load_before)
    if unfinished is not None:
        measured = _continued(trainer, measured, unfinished)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return trainer, measured


def _cell(job: Job, trainer: Trainer, data: RunData, measured: _Measured, detail: str) -> Cell:
    local = trainer.local
    return Cell(
        method=job.method,
        config=job.config.to_json(),
        status="diverged" if detail else "finished",
        detail=detail,
        valid=tuple(measured.valid),
        diagnostics=tuple(measured.diagnostics),
        step_seconds=statistics.median(measured.step_seconds) if measured.step_seconds else math.nan,
        wall_seconds=measured.wall_seconds,
        flops_per_token=measured.flops_per_token,
        exit_flops_per_token=measured.exit_flops_per_token,
        peak_bytes=measured.peak_bytes if trainer.device.type == "cuda" else None,
        feedback_bytes=feedback_bytes(local),
        num_parameters=sum(parameter.numel() for parameter in local.parameters()),
        corpus=data.record,
        versions=measured.origin["versions"],
        device=measured.origin["device"],
        commit=measured.origin["commit"],
        load_average=(measured.load_before, _load_average()),
    )


def _origin(job: Job, data: RunData, device: torch.device) -> dict[str, Any]:
    """What all calls that make one cell must have in common, as JSON."""
    return {
        "method": job.method,
        "config": job.config.to_json(),
        "diagnostics": [list(job.diagnose_steps), job.diagnose_tokens],
        "text": data.record["sha256"],
        "device": device_name(device),
        "versions": versions(),
        "commit": job.commit or current_commit(),
    }


def _continued(trainer: Trainer, new: _Measured, unfinished: Path) -> _Measured:
    """Go on from the state that an earlier call left, if it is one of the same cell; else begin, and say why."""
    snapshot = load_newest(unfinished, warnings.warn)
    if snapshot is None:
        return new
    measured = _Measured.from_json(snapshot.state["cell"])
    odd = [name for name, value in new.origin.items() if measured.origin.get(name) != value]
    if odd:
        warnings.warn(
            f"cells: {new.origin['method']!r} was left at step {snapshot.step} with another {', '.join(odd)}, and is "
            f"trained from its beginning",
            stacklevel=2,
        )
        return new
    trainer.restore(snapshot)
    return replace(measured, first_step=snapshot.step)


def _save(trainer: Trainer, measured: _Measured, unfinished: Path) -> None:
    snapshot = trainer.snapshot()
    save_checkpoint(unfinished, replace(snapshot, state={**snapshot.state, "cell": asdict(measured)}))


def _with_call(measured: _Measured, start: float, device: torch.device) -> _Measured:
    """With the time and the memory of this call, which began at `start`."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return replace(
        measured,
        wall_seconds=measured.wall_seconds + time.time() - start,
        peak_bytes=max(measured.peak_bytes, peak),
    )


@lru_cache(maxsize=1)
def _data(config: TrainConfig) -> RunData:
    """The text of a cell, kept for the next: most often it has the same, and a large text takes long to read."""
    return load_data(config)


def _train(job: Job, trainer: Trainer, data: RunData, measured: _Measured, deadline: float) -> None:
    steps, every = job.config.steps, job.config.eval_every
    while trainer.step < steps:
        if time.time() > deadline:
            raise OutOfTimeError(
                f"{job.method} seed {job.config.seed} stopped after step {trainer.step} of {steps}; the same command "
                f"goes on with it"
            )
        _step(trainer, measured)
        if trainer.step % every == 0 or trainer.step == steps:
            measured.valid.append(_validate(trainer, data))
        if trainer.step in job.diagnose_steps:
            diagnosis = diagnose_feedback(
                trainer.local,
                data.valid,
                batch_size=job.config.batch_size,
                context=job.config.context,
                max_tokens=job.diagnose_tokens,
                precision=trainer.precision,
            )
            measured.diagnostics.append({"step": trainer.step, **diagnosis.to_json()})


def _step(trainer: Trainer, measured: _Measured) -> None:
    if trainer.step == 1:
        tokens = trainer.tokens
        with counted_flops() as count:
            trainer.train_step()
        measured.flops_per_token = count() / (trainer.tokens - tokens) + _uncounted_flops_per_token(trainer)
        return
    before = trainer.seconds
    trainer.train_step()
    if trainer.step > measured.first_step + NUM_WARM_UP_STEPS:
        measured.step_seconds.append(trainer.seconds - before)


def _validate(trainer: Trainer, data: RunData) -> Validation:
    config = trainer.config
    loss = validate(
        trainer.local,
        data.valid,
        batch_size=config.batch_size,
        context=config.context,
        max_tokens=config.eval_tokens,
        precision=trainer.precision,
    ).loss
    if not all(map(math.isfinite, loss)):
        raise NonFiniteError(f"step {trainer.step}: expected finite validation losses, got {list(loss)}")
    return Validation(step=trainer.step, tokens=trainer.tokens, loss=loss)


def _exit_flops_per_token(trainer: Trainer) -> float:
    num_tokens = trainer.config.batch_size * trainer.config.context
    return exit_flops(trainer.local, num_tokens, trainer.precision, num_exits=_exits_a_step(trainer)) / num_tokens


def _exits_a_step(trainer: Trainer) -> int:
    return trainer.config.exits_per_step or trainer.local.num_exits


def _uncounted_flops_per_token(trainer: Trainer) -> float:
    """What a step multiplies in kernels of our own, where nobody counts."""
    config = trainer.config
    num_exits = config.token_share * _exits_a_step(trainer)
    num_tokens = config.batch_size * config.context
    whole, seen = (
        exit_flops(trainer.local, num_tokens, trainer.precision, backend=backend) for backend in ("torch", "auto")
    )
    return num_exits * (whole - seen) / num_tokens


def _load_average() -> float:
    """How many processes wanted to run, on average over the last minute; NaN where nobody counts."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else math.nan
