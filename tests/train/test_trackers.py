"""Who gets a run's numbers: TensorBoard for real, trackio and wandb through modules that write down every call."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from localexit import cli
from localexit.train.config import TrainConfig, tracker_names
from localexit.train.evaluate import Validation
from localexit.train.folder import RunFolder
from localexit.train.trackers import TensorBoard, Trackers
from localexit.train.trainer import StepResult
from train.small_runs import small_config, train_quietly

STEP = StepResult(
    step=3,
    tokens=96,
    seconds=1.5,
    lr=1e-3,
    losses=(2.5, None),
    grad_norms=(0.1, 0.2, 0.3),
    tokens_per_second=64.0,
)
VALIDATION = Validation(loss=(2.0, 1.5), bits_per_byte=(1.0, 0.75), accuracy=(0.25, 0.5), num_tokens=99)


class FakeRun:
    """What `init` of trackio and wandb returns."""

    def __init__(self, **given: Any) -> None:
        self.given = given
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.is_finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        assert not self.is_finished
        self.logged.append((step, values))

    def finish(self) -> None:
        self.is_finished = True


class FakeModule(ModuleType):
    """A package whose `init` remembers its runs."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.runs: list[FakeRun] = []

    def init(self, **given: Any) -> FakeRun:
        self.runs.append(FakeRun(**given))
        return self.runs[-1]


@pytest.fixture(params=["trackio", "wandb"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeModule:
    module = FakeModule(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_a_hosted_run_gets_the_numbers_by_name(package: FakeModule, tmp_path: Path) -> None:
    config = TrainConfig(track=package.__name__)
    trackers = Trackers.of_run(RunFolder(path=tmp_path / "mine"), config, first_step=0)
    trackers.train(STEP)
    trackers.valid(3, VALIDATION)
    trackers.close()
    (run,) = package.runs
    assert run.logged == [
        (
            3,
            {
                "loss/train/exit_0": 2.5,
                "grad_norm_0": 0.1,
                "grad_norm_1": 0.2,
                "grad_norm_2": 0.3,
                "lr": 1e-3,
                "tokens_per_second": 64.0,
            },
        ),
        (
            3,
            {
                "loss/valid/exit_0": 2.0,
                "loss/valid/exit_1": 1.5,
                "accuracy/valid/exit_0": 0.25,
                "accuracy/valid/exit_1": 0.5,
            },
        ),
    ]
    assert run.is_finished
    assert run.given["project"] == "localexit"
    assert run.given["config"] == config.to_json()


def test_a_run_and_its_resume_are_one_run(package: FakeModule, text: Path, cache_dir: Path, tmp_path: Path) -> None:
    config = small_config(text, track=package.__name__)
    for resume in (False, True):
        train_quietly(config, tmp_path / "run", cache_dir, resume=resume)
    first, second = package.runs
    assert [step for step, _ in first.logged] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert second.logged == []
    assert first.is_finished
    assert second.is_finished
    assert first.given == second.given
    assert first.given["resume"] == "allow"
    assert first.given["name"].startswith("run-")


def test_runs_of_the_same_name_elsewhere_are_others(package: FakeModule, tmp_path: Path) -> None:
    for parent in ("a", "b"):
        folder = RunFolder(path=tmp_path / parent / "run")
        Trackers.of_run(folder, TrainConfig(track=package.__name__), first_step=0).close()
    assert package.runs[0].given["name"] != package.runs[1].given["name"]


def test_event_files_hold_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path, first_step=0)
    trackers = Trackers([board])
    trackers.train(STEP)
    trackers.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("loss/train/exit_0")[0].value == 2.5
    assert events.Scalars("loss/train/exit_0")[0].step == 3
    assert "loss/train/exit_1" not in events.Tags()["scalars"]


def test_several_trackers_get_the_same_and_one_that_fails_to_close_keeps_none_open() -> None:
    class Broken(FakeRun):
        def close(self) -> None:
            raise OSError("no network")

    class Closing(FakeRun):
        close = FakeRun.finish

    first, last = Closing(), Broken()
    trackers = Trackers([first, last])
    trackers.valid(1, VALIDATION)
    assert first.logged == last.logged
    with pytest.raises(OSError, match="no network"):
        trackers.close()
    assert first.is_finished


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("localexit.train.preflight.find_spec", lambda _: None)
    run = tmp_path / "run"
    assert cli.run(["train", str(run), "--data", str(text), "--model", "tiny", "--track", "wandb"]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize(
    ("track", "names"), [("none", ()), ("wandb", ("wandb",)), ("tensorboard, trackio", ("tensorboard", "trackio"))]
)
def test_names(track: str, names: tuple[str, ...]) -> None:
    assert tracker_names(track) == names


@pytest.mark.parametrize("track", ["", "tensorboard,", "none,wandb", "wandb,wandb", "paper"])
def test_what_is_no_tracker_is_refused(track: str) -> None:
    with pytest.raises(ValueError, match="track must be none, or of tensorboard, trackio, wandb"):
        TrainConfig(track=track)


@pytest.mark.parametrize(("was", "track"), [(True, "tensorboard"), (False, "none")])
def test_runs_that_knew_tensorboard_only_are_read(was: bool, track: str) -> None:
    content = TrainConfig().to_json()
    del content["track"]
    assert TrainConfig.from_json({**content, "tensorboard": was}).track == track
