from __future__ import annotations

import pytest

from bench.machines import Event, quiet
from localexit.bench import timing
from localexit.bench.timing import CpuTimer, StreamTimer, Times


@pytest.fixture(autouse=True)
def _leave_the_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection before each call takes half a second in a process as large as that of the tests."""
    monkeypatch.setattr(timing.gc, "collect", lambda: None)


def test_every_run_once_a_round_after_one_that_warms_up() -> None:
    calls: list[str] = []
    times = CpuTimer()({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=5, say=quiet)
    assert calls[:3] == ["a", "b", "c"]
    rounds = [calls[i : i + 3] for i in range(3, 18, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
    assert {name: len(own.ms) for name, own in times.items()} == {"a": 5, "b": 5, "c": 5}


def test_a_gpu_is_asked_after_each_round_and_each_run_is_timed_after_one_of_its_own() -> None:
    calls: list[str] = []
    timer = StreamTimer(event=Event, synchronize=lambda: calls.append("wait"))
    times = timer({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2, say=quiet)
    assert calls == ["a", "a", "b", "b", "wait"] * 2
    assert {name: len(own.ms) for name, own in times.items()} == {"a": 2, "b": 2}


def test_events_are_around_the_second_run() -> None:
    class Counter:
        now = 0

        def record(self) -> None:
            self.at = Counter.now

        def elapsed_time(self, end: Counter) -> float:
            return float(end.at - self.at)

    def run() -> None:
        Counter.now += 10

    timer = StreamTimer(event=Counter, synchronize=lambda: None)
    assert timer({"a": run}, rounds=3, say=quiet)["a"].ms == (10.0, 10.0, 10.0)


def test_ratios_are_taken_within_a_round() -> None:
    mine, theirs = Times(ms=(1.0, 10.0, 3.0)), Times(ms=(2.0, 20.0, 3.0))
    assert mine.median == 3.0
    assert mine.ratio_to(theirs) == 2.0


def test_progress_names_the_round() -> None:
    lines: list[str] = []
    CpuTimer()({"a": lambda: None}, rounds=5, say=lines.append)
    assert lines == [f"round {i} of 5" for i in range(1, 6)]
