"""A run from its configuration to its report."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from safetensors import SafetensorError

from localexit.exits import DataParallel
from localexit.feedback.draws import derive_seed
from localexit.inference.architecture import model_config
from localexit.inference.sampling import Sampling
from localexit.inference.text import sample_text
from localexit.local import compile_units
from localexit.local.schedule import checked_weights
from localexit.local.sharding import shard_of
from localexit.local.units import exit_blocks
from localexit.train.batches import BatchSampler
from localexit.train.captured import check_machine, check_rule
from localexit.train.checkpoint import load_newest, save_checkpoint
from localexit.train.config import TrainConfig, exit_indices
from localexit.train.data import RunData, load_data
from localexit.train.devices import device_name, resolve_device, resolve_precision
from localexit.train.errors import NonFiniteError, RunFailedError
from localexit.train.evaluate import diagnose_feedback, validate
from localexit.train.export import export_model
from localexit.train.folder import RunFolder, versions
from localexit.train.launch import world_rank
from localexit.train.logs import Display, MetricsLog, drop_after
from localexit.train.models import attach_exits, build_model, exit_schedule
from localexit.train.preflight import check_shared_batch, check_start
from localexit.train.presets import PRESETS
from localexit.train.ranks import Ranks, joined
from localexit.train.sharded import gathered_state, save_sharded
from localexit.train.stop import StopRequest
from localexit.train.trackers import Trackers
from localexit.train.trainer import Trainer

PROMPT_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        run: the run directory.
        status: whether all steps were made, or somebody stopped it.
        signal_number: what stopped it.
        is_main: whether this is the process that wrote the folder.
    """

    run: RunFolder
    status: Literal["finished", "interrupted"]
    signal_number: int | None = None
    is_main: bool = True


@dataclass(kw_only=True)
class _Run:
    """What the steps of a run need."""

    ranks: Ranks
    folder: RunFolder
    config: TrainConfig
    data: RunData
    trainer: Trainer
    log: MetricsLog
    trackers: Trackers
    display: Display
    prompt: str
    saved_step: int | None
    stop: StopRequest = field(default_factory=StopRequest)


def train(
    config: TrainConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    cache_dir: Path | None = None,
) -> Outcome:
    """Train a model as `config` says, in the folder `run_dir`.

    Everything that can be refused is refused before the folder is made.

    Args:
        config: of the run; for a resume that of the run itself, device and threads aside. Started by `torchrun`, the
            processes share each batch; one that fails ends the others.
        run_dir: a new folder, or one to continue.
        resume: continue from the newest whole checkpoint; from the beginning when there is none yet.
        console: where progress goes.
        cache_dir: where vocabularies and token streams are kept.

    Raises:
        ValueError: configuration, text, model or folder do not fit together.
        NonFiniteError: a loss or gradient was NaN or infinite; the last checkpoint is whole.
        RunFailedError: the folder could not be written any more, what was written reads back as something else, or a
            step cannot be recorded in a CUDA graph.
    """
    folder = RunFolder(path=run_dir)
    if world_rank() == 0:
        check_start(config, folder, resume=resume)
    check_shared_batch(config)
    _check_fits_preset(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with joined(resolve_device(config.device), needs_group=config.shard) as ranks:
        console = (console or Console()) if ranks.is_main else Console(quiet=True)
        # After a restart a slow process may find the folder that the main one has just made.
        resume = bool(ranks.largest(int(resume and ranks.is_main)))
        if config.cuda_graph:
            check_machine(ranks.device, num_processes=ranks.size)
        console.print(f"reading {config.data} …", markup=False, highlight=False)
        with ranks.main_first():
            data = load_data(config, cache_dir=cache_dir)
        return _train_on(ranks, config, folder, data, console, resume=resume)


def _train_on(
    ranks: Ranks, config: TrainConfig, folder: RunFolder, data: RunData, console: Console, *, resume: bool
) -> Outcome:
    if resume:
        folder.check_corpus(data.record)
    precision = resolve_precision(config.precision, ranks.device)
    trainer = make_trainer(config, data, device=ranks.device, precision=precision, data_parallel=ranks.data_parallel)
    if ranks.is_main and not resume:
        _write_folder(folder, trainer, data)
    lock = folder.locked() if ranks.is_main else nullcontext()
    try:
        with lock, _started(ranks, folder, config, data, trainer, console, resume=resume) as run:
            return _train(run)
    # safetensors raises its own error for a full disk.
    except (OSError, SafetensorError) as error:
        raise RunFailedError(
            f"run {folder.path}: {error}; the last checkpoint is whole, continue with --resume"
        ) from error
    except RuntimeError as error:
        if ranks.data_parallel is None or isinstance(error, RunFailedError):
            raise
        # Most often what a rank says whose neighbour has gone.
        raise RunFailedError(
            f"run {folder.path}: process {ranks.rank} of {ranks.size} stopped ({error}); if another one ended first, "
            f"it says why; the last checkpoint is whole, continue with --resume"
        ) from error


def _check_fits_preset(config: TrainConfig) -> None:
    """Refuse exits and options of a rule that the preset has no room for, before minutes go into reading the text."""
    if config.model in PRESETS:
        preset = PRESETS[config.model]
        num_exits = len(exit_blocks(exit_indices(config.exits), preset.num_blocks))
        if config.exit_weights is not None:
            checked_weights(config.exit_weights, num_exits)
        exit_schedule(config).check(num_exits)
        rule = config.feedback.build(hidden_size=preset.hidden_size, vocab_size=1, seed=config.seed)
        if config.cuda_graph:
            check_rule(rule)


def _write_folder(folder: RunFolder, trainer: Trainer, data: RunData) -> None:
    try:
        folder.write(
            trainer.config,
            data.record,
            model=model_config(trainer.local).to_dict(),
            device=device_name(trainer.device),
        )
    except OSError as error:
        raise ValueError(f"run: expected a folder that can be written, got {str(folder.path)!r}: {error}") from error


def make_trainer(
    config: TrainConfig,
    data: RunData,
    *,
    device: torch.device,
    precision: torch.dtype,
    data_parallel: DataParallel | None = None,
) -> Trainer:
    """Model, exits, rule and batches of a configuration, before the first step.

    Args:
        config: the configuration.
        data: what it reads.
        device: where to compute.
        precision: of the products.
        data_parallel: the ranks that share each batch of `config.batch_size`, if there are several.

    Raises:
        ValueError: model, exits or rule do not fit together, or nothing can be compiled here.
    """
    rank, size = (0, 1) if data_parallel is None else (data_parallel.rank, data_parallel.size)
    vocab_size = data.tokenizer.get_vocab_size()
    model = build_model(config, vocab_size=vocab_size, end_of_text_id=data.end_of_text_id)
    # Dropout differs between ranks.
    torch.manual_seed(config.seed if rank == 0 else derive_seed(config.seed, str(rank)))
    local = attach_exits(model, config, device=device, data_parallel=data_parallel)
    if config.compile:
        compile_units(local)
    sampler = BatchSampler(
        data.train,
        batch_size=config.batch_size // size,
        context=config.context,
        seed=config.seed,
        rank=rank,
        world_size=size,
    )
    return Trainer(local, sampler, config, precision=precision)


@contextmanager
def _started(
    ranks: Ranks,
    folder: RunFolder,
    config: TrainConfig,
    data: RunData,
    trainer: Trainer,
    console: Console,
    *,
    resume: bool,
) -> Iterator[_Run]:
    """Logs opened and, for a resume, everything put back to the newest whole checkpoint."""
    lines: list[str] = []
    saved_step = _restore(ranks, folder, trainer, lines) if resume else None
    with ExitStack() as stack:
        log = MetricsLog(folder.metrics if ranks.is_main else Path(os.devnull))
        stack.callback(log.close)
        trackers = Trackers.of_run(folder, config, first_step=trainer.step) if ranks.is_main else Trackers(())
        stack.callback(trackers.close)
        lines.append(_description(config, trainer))
        log.event(trainer.step, "resumed" if resume else "started", "; ".join(lines))
        display = Display(console, num_steps=config.steps, first_step=trainer.step)
        for line in lines:
            display.say(line)
        prompt = _default_prompt(data) if config.prompt is None else config.prompt
        yield _Run(
            ranks=ranks,
            folder=folder,
            config=config,
            data=data,
            trainer=trainer,
            log=log,
            trackers=trackers,
            display=stack.enter_context(display),
            prompt=prompt,
            saved_step=saved_step,
        )


def _restore(ranks: Ranks, folder: RunFolder, trainer: Trainer, lines: list[str]) -> int | None:
    """Go back to the newest whole checkpoint, and return its step; None when there is none yet."""
    snapshot = load_newest(folder.checkpoints, lines.append)
    if snapshot is None and lines:
        raise ValueError(
            f"run: expected a whole checkpoint in {str(folder.checkpoints)!r}, but {'; '.join(lines)}; put one "
            f"back, or delete the damaged ones to start over"
        )
    if snapshot is None:
        lines.append("no checkpoint yet: from the beginning")
    else:
        trainer.restore(snapshot)
        lines.append(f"continued from checkpoint step-{snapshot.step}")
    if ranks.largest(trainer.step) != -ranks.largest(-trainer.step):
        raise ValueError(
            f"run: expected the same checkpoint in {str(folder.path)!r} for all processes, got step {trainer.step} for "
            f"process {ranks.rank} and another for others; put the folder where all machines see it"
        )
    if ranks.is_main:
        drop_after(folder.metrics, trainer.step)
    return None if snapshot is None else snapshot.step


def _train(run: _Run) -> Outcome:
    trainer, config = run.trainer, run.config
    try:
        with run.stop.listening():
            stopped_by = _stopped_by(run)
            while trainer.step < config.steps and not stopped_by:
                _step(run)
                stopped_by = _stopped_by(run)
            if run.saved_step != trainer.step:
                _checkpoint(run)
    except RunFailedError as error:
        run.log.event(trainer.step, "non_finite" if isinstance(error, NonFiniteError) else "failed", str(error))
        raise
    status: Literal["finished", "interrupted"] = "finished" if trainer.step == config.steps else "interrupted"
    whole = gathered_state(trainer.local) if config.shard else None
    with _saving(run.folder):
        if run.ranks.is_main:
            export_model(run.folder, trainer.local, run.data.tokenizer, whole=whole)
    run.ranks.wait()
    run.log.event(trainer.step, status, f"after {trainer.tokens} tokens in {trainer.seconds:.1f} s of training")
    return Outcome(run=run.folder, status=status, signal_number=stopped_by or None, is_main=run.ranks.is_main)


def _stopped_by(run: _Run) -> int:
    """The signal that asked any of the processes to stop, or 0: all stop after the same step."""
    return run.ranks.largest(run.stop.signal_number or 0)


def _step(run: _Run) -> None:
    config, trainer = run.config, run.trainer
    result = trainer.train_step()
    is_last = result.step == config.steps
    for reason in result.skipped:
        run.log.event(result.step, "skipped", reason)
        run.display.say(reason)
    run.display.step(result)
    if is_last or result.step % config.log_every == 0:
        run.log.train(result)
        run.trackers.train(result)
    if is_last or result.step % config.eval_every == 0:
        _validate(run)
    if config.diagnose_every and (is_last or result.step % config.diagnose_every == 0):
        _diagnose(run)
    if is_last or result.step % config.checkpoint_every == 0:
        _checkpoint(run)


def _validate(run: _Run) -> None:
    trainer, config = run.trainer, run.config
    validation = validate(
        trainer.local,
        run.data.valid,
        batch_size=config.batch_size,
        context=config.context,
        max_tokens=config.eval_tokens,
        precision=trainer.precision,
        # Forwards of sharded blocks are made together: then all processes go through all of the text.
        data_parallel=None if config.shard else run.ranks.data_parallel,
    )
    if not all(map(math.isfinite, validation.loss)):
        raise NonFiniteError(
            f"step {trainer.step}: expected finite validation losses, got {list(validation.loss)}; the last "
            f"checkpoint is from before. Try a lower lr or a longer warm-up"
        )
    run.log.valid(trainer.step, trainer.tokens, validation)
    run.display.valid(trainer.step, validation)
    run.trackers.valid(trainer.step, validation)
    if config.sample_tokens:
        sampling = Sampling(max_new_tokens=config.sample_tokens, seed=config.seed)
        text = sample_text(trainer.local, run.data.tokenizer, run.prompt, sampling=sampling)
        run.log.sample(trainer.step, prompt=run.prompt, text=text, exit_index=trainer.local.num_exits - 1)


def _diagnose(run: _Run) -> None:
    trainer, config = run.trainer, run.config
    diagnosis = diagnose_feedback(
        trainer.local,
        run.data.valid,
        batch_size=config.batch_size,
        context=config.context,
        precision=trainer.precision,
    )
    run.log.diagnosis(trainer.step, diagnosis)
    run.trackers.diagnosis(trainer.step, diagnosis)


def _checkpoint(run: _Run) -> None:
    # A step can overflow a parameter although its gradients were finite; an older checkpoint is worth more then.
    named = [(name, shard_of(p)) for name, p in run.trainer.local.named_parameters()]
    broken = [name for name, shard in named if not bool(torch.isfinite(shard).all())]
    if run.ranks.largest(len(broken)):
        raise NonFiniteError(
            f"step {run.trainer.step}: expected finite parameters, but {(broken or ['another process'])[0]} has "
            f"others; the last checkpoint is from before. Try a lower lr or a longer warm-up"
        )
    snapshot = run.trainer.snapshot()
    if run.ranks.is_main:
        # What a checkpoint says has happened must be in the log before it.
        run.log.sync()
    with _saving(run.folder):
        if run.config.shard:
            save_sharded(run.folder.checkpoints, snapshot, run.ranks)
        elif run.ranks.is_main:
            save_checkpoint(run.folder.checkpoints, snapshot)
    # Else a fast process could be steps ahead of a checkpoint that it believes in.
    run.ranks.wait()
    run.saved_step = run.trainer.step


@contextmanager
def _saving(folder: RunFolder) -> Iterator[None]:
    """What is refused while a run saves (a checkpoint that reads back as another) is its failure, not bad input."""
    try:
        yield
    except ValueError as error:
        raise RunFailedError(f"run {folder.path}: {error}; the checkpoint before is whole, use --resume") from error


def _default_prompt(data: RunData) -> str:
    ids = [int(token) for token in data.valid.tokens[:PROMPT_TOKENS]]
    return data.tokenizer.decode([token for token in ids if token != data.end_of_text_id])


def _description(config: TrainConfig, trainer: Trainer) -> str:
    local = trainer.local
    num_trained = sum(p.numel() for p in local.parameters() if p.requires_grad)
    device = trainer.device
    return (
        f"{config.model}: {num_trained:,} parameters to train, {local.num_exits} exits, feedback {config.feedback}, "
        f"backward {config.backward}, {device} {str(trainer.precision).removeprefix('torch.')}, "
        f"torch {versions()['torch']}"
    )
