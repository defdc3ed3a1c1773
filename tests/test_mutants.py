"""What `make mutants` counts, and as what."""

from __future__ import annotations

import functools
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

import mutants

SOURCE = """
class Sum:
    total = 1

    def add(self, x: int = 3) -> int:
        if x > 4:
            raise ValueError(f"{x + 1} > 4")
        return self.total + x.sum(-1)
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(mutants, "SOURCE", tmp_path)
    path = tmp_path / "sums.py"
    path.write_text(SOURCE)
    return path


def test_each_mistake_is_one_change_of_the_file(file: Path) -> None:
    made = {mutant.key: mutant.text() for mutant in mutants.mutants_of(file)}
    assert list(made) == [
        "sums.py Sum: total = 1 -> total = 2",
        "sums.py Sum.add: self, x: int=3 -> self, x: int=4",
        "sums.py Sum.add: if x > 4 -> if not x > 4",
        "sums.py Sum.add: x > 4 -> x >= 4",
        "sums.py Sum.add: x > 4 -> x > 5",
        "sums.py Sum.add: return self.total + x.sum(-1) -> return self.total - x.sum(-1)",
        "sums.py Sum.add: return self.total + x.sum(-1) -> return self.total + x.sum(1)",
        "sums.py Sum.add: return self.total + x.sum(-1) -> return self.total + x.sum(-2)",
    ]
    assert "    total = 2\n" in made["sums.py Sum: total = 1 -> total = 2"]
    assert all(text.count("\n") == SOURCE.strip().count("\n") for text in made.values())
    assert len(set(made.values())) == len(made)


def test_names_and_order_outlive_edits_elsewhere(file: Path) -> None:
    before = mutants.in_random_order(mutants.mutants_of(file), seed=1)
    file.write_text("import math\n\nstart = 5\n" + SOURCE)
    after = mutants.in_random_order(mutants.mutants_of(file), seed=1)
    names = {mutant.key for mutant in before}
    assert [mutant.key for mutant in after if mutant.key in names] == [mutant.key for mutant in before]


def test_the_same_mistake_twice_in_a_function_has_two_names(file: Path) -> None:
    file.write_text("def twice(x):\n    x += 1\n    x += 1\n")
    keys = [mutant.key for mutant in mutants.mutants_of(file)]
    assert keys[::2] == ["sums.py twice: x += 1 -> pass", "sums.py twice: x += 1 -> pass #2"]
    assert len(set(keys)) == len(keys)


@functools.cache
def keys_of_all_rooms() -> list[str]:
    files = [path for room in mutants.ROOM_TESTS for path in sorted((mutants.SOURCE / room).rglob("*.py"))]
    return [mutant.key for path in files for mutant in mutants.mutants_of(path)]


def test_names_are_unique() -> None:
    keys = keys_of_all_rooms()
    assert len(set(keys)) == len(keys) > 1000


def test_argued_mutants_exist_and_have_a_reason() -> None:
    argued = mutants.argued()
    assert not argued.keys() - set(keys_of_all_rooms())
    assert all(reason.strip() for reason in argued.values())


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (0, "survived"),
        (1, "failed"),
        (2, "not importable"),
        (-signal.SIGXCPU, "too slow"),
        (-signal.SIGSEGV, "crashed"),
    ],
)
def test_outcomes_that_count(status: int, outcome: str, tmp_path: Path) -> None:
    trial = SimpleNamespace(mutant=SimpleNamespace(key="a -> b"), start=0.0)
    mutants.record(trial, status, tmp_path / "results.jsonl")
    assert mutants.read(tmp_path / "results.jsonl") == {"a -> b": outcome}


@pytest.mark.parametrize("status", [3, 4, 5, -signal.SIGKILL, -signal.SIGTERM])
def test_what_says_nothing_of_the_mutant_ends_the_run(status: int, tmp_path: Path) -> None:
    trial = SimpleNamespace(mutant=SimpleNamespace(key="a -> b"), start=0.0)
    with pytest.raises(SystemExit, match="a -> b: the tests ended with status"):
        mutants.record(trial, status, tmp_path / "results.jsonl")
    assert not (tmp_path / "results.jsonl").exists()


def test_argued_is_not_killed(capsys: pytest.CaptureFixture[str]) -> None:
    mutants.say("exits", {"a": "failed", "b": "survived", "c": "survived", "d": "too slow"}, {"b": "speed alone"})
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "exits: 2 of 4 killed, 50.0% (15.0% to 85.0%); 1 argued, 1 survived"
    assert rest == ["  argued    b: speed alone", "  survived  c"]


def test_the_last_line_of_a_mutant_counts(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    lines = [{"mutant": "a", "outcome": outcome, "seconds": 1.0} for outcome in ("survived", "failed")]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert mutants.read(results) == {"a": "failed"}


def test_what_is_argued_is_a_mistake_in_the_source_of_today() -> None:
    files = {mutants.SOURCE / key.split()[0].rstrip(":") for key in mutants.argued()}
    there = {mutant.key for path in files for mutant in mutants.mutants_of(path)}
    assert set(mutants.argued()) <= there
