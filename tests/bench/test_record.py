from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from bench.machines import gpu_like, quiet
from localexit import cli
from localexit.bench import command, platforms
from localexit.bench.config import BenchConfig
from localexit.bench.memory import peak_bytes, peak_in_child
from localexit.bench.plans import Backend, Case, RulePlan
from localexit.bench.record import Results, environment, read_results
from localexit.bench.shapes import SHAPES, Shape
from localexit.exits.backends import BACKENDS
from localexit.train.config import FeedbackSpec

DENSE = FeedbackSpec(name="dense")


def circumstances(**changes: Any) -> dict[str, Any]:
    return {**environment(torch.device("cpu"), threads=1, commit="abc"), **changes}


def config(**options: Any) -> BenchConfig:
    return BenchConfig(rules=("dense",), modes=("step",), peers=(), **options)


def test_a_result_says_where_it_comes_from() -> None:
    told = circumstances()
    assert told["versions"]["torch"] == torch.__version__
    assert (told["threads"], told["commit"]) == (1, "abc")
    assert told["device"]


def test_shapes_are_written_as_they_come_and_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, measured = tmp_path / "results" / "exit.json", []

    def fake(case: Case, *_: object, **__: object) -> dict[str, Any]:
        measured.append(str(case.shape))
        if len(measured) == 2:
            raise RuntimeError("the machine went away")
        return {**case.summary(), "rounds": 5}

    monkeypatch.setattr(command, "measure", fake)
    both = config(shapes=("8x4x9", "9x4x9"))
    with pytest.raises(RuntimeError, match="went away"):
        command.measure_shapes(both, gpu_like(), Results(path, circumstances()), say=quiet)
    assert list(read_results(path)["shapes"]) == ["8x4x9"]
    lines: list[str] = []
    command.measure_shapes(both, gpu_like(), Results(path, circumstances()), say=lines.append)
    assert list(read_results(path)["shapes"]) == ["8x4x9", "9x4x9"]
    assert measured == ["N=8 D=4 V=9", "N=9 D=4 V=9", "N=9 D=4 V=9"]
    assert lines == ["shapes 8x4x9: measured before"]
    # Other rounds are another measurement.
    command.measure_shapes(replace(both, rounds=6), gpu_like(), Results(path, circumstances()), say=quiet)
    assert len(measured) == 5


@pytest.mark.parametrize("change", [{"commit": "def"}, {"device": "another"}, {"threads": 3}])
def test_results_of_other_circumstances_are_not_mixed(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "exit.json"
    Results(path, circumstances()).add("shapes", "cpu", measured={})
    before = path.read_bytes()
    (key,) = change
    with pytest.raises(ValueError, match=rf"measured with {key} .* name another file"):
        Results(path, circumstances(**change))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1]", '{"benchmark": "exit", "format": 1}', "\x00", "[" * 10**6],
    ids=["empty", "no fields", "a list", "an old format", "NUL", "without bottom"],
)
def test_what_is_no_file_of_results_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(ValueError, match=r"results: expected a .*got .*file\.json"):
        read_results(tmp_path / "file.json")


def test_the_peak_of_a_call_is_seen() -> None:
    size = 64 * 2**20

    def run() -> None:
        torch.ones(size // 4)

    # Run once before: what the first call of all loads is not its own.
    run()
    assert 0.95 * size < peak_bytes(run) < 1.2 * size


@pytest.mark.slow
def test_the_peak_of_a_contender_in_its_own_process() -> None:
    shape = Shape(num_tokens=512, hidden_size=32, vocab_size=20_000)
    plans = (RulePlan(rule=DENSE, mode="autograd"),)
    case = Case(shape=shape, plans=plans, peers=("F.cross_entropy",))
    whole = 4 * shape.num_tokens * shape.vocab_size / 2**20
    plain = peak_in_child(case, "F.cross_entropy", threads=1)
    ours = peak_in_child(case, "dense autograd", threads=1)
    assert plain is not None
    assert ours is not None
    # Logits, log-probabilities and their gradient against one chunk.
    assert 1.9 * whole < plain < 4 * whole
    assert ours < 1.9 * whole


def test_the_command_measures_writes_and_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platforms, "cpu", lambda **_: gpu_like())
    path = tmp_path / "exit.json"
    options = ["--cpu", "--rules", "dense", "anchors:num_anchors=3", "--modes", "step", "--peers", "F.cross_entropy"]
    assert cli.run(["bench", *options, "--output", str(path)]) == 0
    printed = capsys.readouterr()
    assert "32x48x301: N=32 D=48 V=301 bfloat16, median of 5" in printed.out
    assert "anchors:num_anchors=3 step" in printed.out
    assert "round 5 of 5" in printed.err
    assert cli.run(["bench", "--show", str(path)]) == 0
    assert capsys.readouterr().out == printed.out
    assert json.loads(path.read_text())["shapes"]["32x48x301"]["plans"] == ["dense step", "anchors:num_anchors=3 step"]


def test_a_wrong_result_is_one_line_and_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from localexit.bench import contenders

    monkeypatch.setattr(platforms, "cpu", lambda **_: gpu_like())
    right = contenders._CALLS["step"]
    monkeypatch.setitem(contenders._CALLS, "step", lambda *given: 2 * right(*given))
    assert cli.run(["bench", "--cpu", "--rules", "dense", "--modes", "step", "--peers"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1].startswith("localexit: dense step: loss is off by")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "12x8"], "shapes must be NxDxV or one of cpu"),
        (["--shapes", "0x8x8"], "shapes must be NxDxV"),
        (["--rounds", "4"], "rounds must be at least 5, got 4"),
        (["--values", "64"], "values are those of a sweep"),
        (["--sweep", "D", "--values", "0"], "values must be at least 1, got 0"),
        (["--sweep", "X"], "'X'"),
        (["--shared-exits", "-1"], "shared_exits must be at least 0"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--patience", "-1"], "patience must be a finite number of at least 0"),
        (["--original", "nowhere.py"], "original must be the Python file"),
        (["--rules", "no-such"], "feedback must be one of"),
        (["--modes", "no-such"], "no-such"),
        (["--peers", "no-such"], "no-such"),
        (["--show", "nowhere.json"], "results: expected a file of"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="pass --cpu"):
        platforms.cuda()


def test_sizes_by_name_and_written() -> None:
    assert Shape.parse("gpt2") == SHAPES["gpt2"]
    assert str(Shape.parse("16384x768x50304")) == str(SHAPES["gpt2"])


def test_the_names_of_backends_are_those_of_the_exit() -> None:
    assert get_args(Backend) == BACKENDS
