"""The numbers of `metrics.jsonl` for programs that draw them while a run goes on: TensorBoard, trackio, wandb."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from localexit.measure import Diagnosis
from localexit.train.config import TrainConfig, tracker_names
from localexit.train.evaluate import Validation
from localexit.train.folder import RunFolder
from localexit.train.trainer import StepResult

PROJECT = "localexit"


class Tracker(Protocol):
    """Where numbers of a step go."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of one step, by name."""

    def close(self) -> None:
        """Write out what is buffered."""


class TensorBoard:
    """Event files for TensorBoard.

    Args:
        folder: of the event files.
        first_step: what an earlier process wrote from this step on is superseded.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: SummaryWriter = SummaryWriter(str(folder), purge_step=first_step or None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One scalar a number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is buffered."""
        self._writer.close()


class Hosted:
    """A run of trackio or wandb, whose interfaces are alike.

    A resumed run goes on under the same name.

    Args:
        package: which of them.
        folder: of our run; its path makes the name.
        config: what to show as the configuration.
    """

    def __init__(self, package: str, folder: RunFolder, config: TrainConfig) -> None:
        path = folder.path.resolve()
        name = f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        own: dict[str, Any] = {"id": name, "dir": str(path)} if package == "wandb" else {}
        module: Any = import_module(package)
        self._run = module.init(project=PROJECT, name=name, config=config.to_json(), resume="allow", **own)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """All numbers of the step in one call."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Say that the run is over, as far as this process goes."""
        self._run.finish()


class Trackers:
    """All trackers of a run.

    Args:
        trackers: any number of them.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    @classmethod
    def of_run(cls, folder: RunFolder, config: TrainConfig, *, first_step: int) -> Trackers:
        """Those that the configuration names; opened before the first step of this process."""
        with ExitStack() as opened:
            trackers: list[Tracker] = []
            for name in tracker_names(config.track):
                if name == "tensorboard":
                    trackers.append(TensorBoard(folder.tensorboard, first_step=first_step))
                else:
                    trackers.append(Hosted(name, folder, config))
                opened.callback(trackers[-1].close)
            opened.pop_all()
        return cls(trackers)

    def train(self, result: StepResult) -> None:
        """A training step."""
        values = {"lr": result.lr, "tokens_per_second": result.tokens_per_second}
        self._log(
            {**by_index("loss/train/exit", result.losses), **by_index("grad_norm", result.grad_norms), **values},
            result.step,
        )

    def valid(self, step: int, validation: Validation) -> None:
        """A validation."""
        accuracy = by_index("accuracy/valid/exit", validation.accuracy)
        self._log({**by_index("loss/valid/exit", validation.loss), **accuracy}, step)

    def diagnosis(self, step: int, diagnosis: Diagnosis) -> None:
        """The feedback against the exact gradient."""
        rows = {"feedback/rows_cosine": diagnosis.rows_cosine, "feedback/rows_error": diagnosis.rows_error}
        values = {name: value for name, value in rows.items() if value is not None}
        for name, of_exits in diagnosis.by_exit().items():
            values |= by_index(f"feedback/{name}/exit", of_exits)
        self._log(values, step)

    def close(self) -> None:
        """Close all, the last one first; if one fails, the others all the same."""
        with ExitStack() as closing:
            for tracker in self._trackers:
                closing.callback(tracker.close)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(values, step)


def by_index(name: str, values: Sequence[float | None]) -> dict[str, float]:
    """Numbers of exits or units by name; those that were not measured are left out.

    >>> by_index("loss", (2.5, None, 2.0))
    {'loss_0': 2.5, 'loss_2': 2.0}
    """
    return {f"{name}_{index}": value for index, value in enumerate(values) if value is not None}
