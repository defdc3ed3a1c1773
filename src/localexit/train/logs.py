"""What a run tells: `metrics.jsonl`, and the terminal."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from localexit._files import parse_json, read_lines
from localexit.measure import Diagnosis
from localexit.train.cache import written_atomically
from localexit.train.evaluate import Validation
from localexit.train.trainer import StepResult

# Where lines replace the progress bar, seconds between two of them.
LINE_INTERVAL = 10.0


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, on disk as soon as it is written.

    Args:
        path: the file; lines are appended.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def train(self, result: StepResult) -> None:
        """A training step."""
        self._write(
            "train",
            result.step,
            tokens=result.tokens,
            seconds=result.seconds,
            lr=result.lr,
            loss=result.losses,
            grad_norm=result.grad_norms,
            tokens_per_second=result.tokens_per_second,
        )

    def valid(self, step: int, tokens: int, validation: Validation) -> None:
        """A validation."""
        self._write(
            "valid",
            step,
            tokens=tokens,
            loss=validation.loss,
            bits_per_byte=validation.bits_per_byte,
            accuracy=validation.accuracy,
        )

    def diagnosis(self, step: int, diagnosis: Diagnosis) -> None:
        """The feedback against the exact gradient: a number an exit, and two of the matrix that stands in for W."""
        self._write(
            "diagnosis",
            step,
            **diagnosis.by_exit(),
            rows_cosine=diagnosis.rows_cosine,
            rows_error=diagnosis.rows_error,
        )

    def sample(self, step: int, *, prompt: str, text: str, exit_index: int) -> None:
        """Generated text."""
        self._write("sample", step, prompt=prompt, text=text, exit=exit_index)

    def event(self, step: int, event: str, detail: str) -> None:
        """Something that happened to the run."""
        self._write("event", step, event=event, detail=detail)

    def sync(self) -> None:
        """Wait until everything is on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, kind: str, step: int, **fields: Any) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, **fields}) + "\n")
        self._file.flush()


def drop_after(path: Path, step: int) -> None:
    """Drop what was measured after `step`, for a resume from there to measure it again; events stay.

    A last line that was cut off in the middle of a write goes too.

    Raises:
        ValueError: a line is longer than any that was written.
    """
    if not path.exists():
        return
    with written_atomically(path) as temporary, temporary.open("wb") as new:
        for _, line in read_lines(path):
            if _is_kept(line, step):
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
        shutil.copymode(path, temporary)


def _is_kept(line: bytes, step: int) -> bool:
    try:
        record = parse_json(line)
        return line.endswith(b"\n") and (record["kind"] == "event" or record["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False


class Display:
    """Progress on the terminal: a bar with ETA, or a line now and then where there is none.

    Args:
        console: where to.
        num_steps: of the whole run.
        first_step: steps made before.
    """

    def __init__(
        self, console: Console, *, num_steps: int, first_step: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._num_steps = num_steps
        self._clock = clock
        self._started, self._first_step, self._last_line = clock(), first_step, -LINE_INTERVAL
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._progress.add_task("", total=num_steps, completed=first_step, numbers="")

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Old versions of rich end a bar that is disabled with an empty line.
        if self._console.is_terminal:
            self._progress.stop()

    def step(self, result: StepResult) -> None:
        """After an optimiser step."""
        (*_, last) = (loss for loss in result.losses if loss is not None)
        numbers = f"loss {last:.3f} · {result.tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, completed=result.step, numbers=numbers)
        is_due = self._clock() - self._last_line >= LINE_INTERVAL or result.step == self._num_steps
        if not self._console.is_terminal and is_due:
            self._last_line = self._clock()
            self.say(f"step {result.step}/{self._num_steps} · {numbers} · {self._remaining(result.step)} left")

    def valid(self, step: int, validation: Validation) -> None:
        """After a validation."""
        losses = " ".join(f"{loss:.3f}" for loss in validation.loss)
        self.say(f"step {step}/{self._num_steps} · validation nats/token by exit: {losses}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _remaining(self, step: int) -> str:
        per_step = (self._clock() - self._started) / max(step - self._first_step, 1)
        seconds = round(per_step * (self._num_steps - step))
        return f"{seconds // 60}:{seconds % 60:02d}"
