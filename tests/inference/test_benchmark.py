"""benchmarks/generate.py: what it prints and records, and that nothing is timed when a text is wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from localexit.inference.decoder import Decoder
from localexit.inference.strategies import Choose, FixedExit, SelfSpeculative, Token
from train.small_runs import small_config, train_quietly, write_corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_generate", ROOT / "benchmarks/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    config = small_config(write_corpus(folder / "text"), steps=20, lr=1e-2, eval_every=100, checkpoint_every=100)
    return train_quietly(config, folder / "run", folder / "cache").run.path


class Broken(SelfSpeculative):
    """Keeps every draft."""

    def write(self, decoder: Decoder, choose: Choose) -> list[Token]:
        return FixedExit(exit_index=0).write(decoder, choose)


OPTIONS = ["--prompts", "2", "--prompt-tokens", "4", "--tokens", "6", "--rounds", "2", "--device", "cpu"]


def test_every_strategy_is_timed_against_full_depth(
    script: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "generate.json"
    assert script.main([str(run), *OPTIONS, "--draft-tokens", "2", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == ["full depth", "exit 0", "sure at 0.5", "sure at 0.9", "draft 2 at exit 0"]
    assert rows["full depth"]["speedup"] == 1
    assert rows["full depth"]["blocks_a_token"] == 2
    assert rows["exit 0"]["blocks_a_token"] == 1
    assert rows["exit 0"]["by_exit"] == [1, 0]
    for row in rows.values():
        assert row["range"][0] <= row["tokens_per_second"] <= row["range"][1]
        assert sum(row["by_exit"]) == pytest.approx(1)
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


def test_nothing_is_timed_when_a_text_is_wrong(
    script: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = script.gate

    def mutant(local: object, prompts: object, named: dict[str, object], num: int) -> list[str]:
        broken = type(
            "Broken", (script.SelfSpeculative,), {"write": lambda _, *args: FixedExit(exit_index=0).write(*args)}
        )
        return gate(local, prompts, {**named, "broken": broken()}, num)

    monkeypatch.setattr(script, "gate", mutant)
    assert script.main([str(run), *OPTIONS]) == 1
    assert capsys.readouterr().out == "not timed, for these do not write what they must: broken\n"
