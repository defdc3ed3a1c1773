from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import localexit
from helpers.commands import environment, refused
from localexit import LocalModel, cli
from localexit.feedback import feedback_names
from localexit.measure import AuditReport
from train.small_runs import write_corpus

SMALL = [
    *("--model", "tiny", "--vocab-size", "300", "--steps", "4", "--warmup-steps", "1", "--batch-size", "2"),
    *("--context", "16", "--eval-every", "2", "--eval-tokens", "128", "--checkpoint-every", "2"),
    *("--sample-tokens", "3", "--threads", "1", "--device", "cpu", "--track", "none"),
]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("text")))


@pytest.fixture(scope="module")
def trained(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    assert cli.run(["train", str(run), "--data", text, *SMALL]) == 0
    return run


def test_training_ends_with_table_sample_and_report(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.run(["train", str(run), "--data", text, *SMALL]) == 0
    printed = capsys.readouterr().out
    assert all(
        word in printed for word in ("nats/token", "bits/byte", "accuracy", "sample of the last exit", "report: ")
    )
    assert (run / "report.html").is_file()


def test_a_run_goes_on_with_its_own_configuration(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.run(["train", str(run), "--data", text, *SMALL, "--feedback", "dense:gain=0.5"]) == 0
    assert cli.run(["train", str(run), "--resume", "--threads", "1"]) == 0
    capsys.readouterr()
    line = refused(["train", str(run), "--resume", "--lr", "0.5", "--seed", "3"], capsys)
    assert "lr: the run has 0.003, got 0.5" in line or "lr: the run has" in line
    assert "seed: the run has 0, got 3" in line
    assert "feedback" not in line


def test_a_new_run_gets_a_folder_of_its_own(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert cli.run(["train", "--data", text, *SMALL, "--feedback", "anchors"]) == 0
    capsys.readouterr()
    assert sorted(path.name for path in Path("runs").iterdir()) == ["tiny-anchors", "tiny-anchors-2"]


def test_generate_with_exits_that_are_sure(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(trained), "--prompt", "the parser", "--max-new-tokens", "5", "--exit", "confidence"]
    assert cli.run([*command, "--threshold", "0.00001"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "tokens by exit: 0: 5"
    assert cli.run([*command, "--threshold", "1"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "tokens by exit: 1: 5"


def test_a_verified_draft_is_the_last_exits_text(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(trained), "--prompt", "the parser", "--max-new-tokens", "9", "--temperature", "0"]
    assert cli.run(command) == 0
    expected = capsys.readouterr()
    assert cli.run([*command, "--draft-exit", "0", "--draft-tokens", "3"]) == 0
    drafted = capsys.readouterr()
    assert drafted.out == expected.out
    assert "tokens by exit" in drafted.err
    assert "tokens by exit" not in expected.err
    assert "temperature" in refused([*command[:-1], "1", "--draft-exit", "0"], capsys)


def test_generate_writes_prompt_and_text(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(trained), "--prompt", "the parser", "--max-new-tokens", "5", "--seed", "1"]
    texts = []
    for index in ("0", "1", "-1"):
        assert cli.run([*command, "--exit", index]) == 0
        texts.append(capsys.readouterr().out)
    assert all(written.startswith("the parser") for written in texts)
    assert texts[1] == texts[2]


@pytest.mark.parametrize("source", ["run", "model", "preset"])
def test_audit_prints_what_passed(source: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"run": trained, "model": trained / "model", "preset": "tiny"}[source]
    assert cli.run(["audit", str(model), "--exits", "every:2"]) == 0
    printed = capsys.readouterr().out
    assert "audit of feedback 'mirror' on 1 units: passed" in printed


def test_a_rule_that_reads_the_weights_fails_the_audit(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["audit", "tiny", "--feedback", "transport"]) == 1
    assert "audit of feedback 'transport' on 2 units: FAILED" in capsys.readouterr().out


def test_report_writes_a_page_for_several_runs(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, other = tmp_path / "page.html", tmp_path / "other"
    shutil.copytree(trained, other)
    assert cli.run(["report", str(trained), str(other), "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    assert "<html" in output.read_text()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--vocab-size", "60000"], ["vocab_size", "expected at most", "60000"]),
        (["--context", "1000000"], ["data", "one context of 1000000"]),
        (["--exits", "5"], ["exits has block 5", "2 blocks"]),
        (["--feedback", "dense:rank=999"], ["rank=999", "64"]),
        (["--vocab-size", "0"], ["vocab_size must be at least 1"]),
    ],
)
def test_what_does_not_fit_the_text_or_the_model_leaves_nothing(
    text: str, arguments: list[str], names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    line = refused(["train", str(run), "--data", text, *SMALL, *arguments], capsys)
    assert all(name in line for name in names), line
    assert not run.exists()


def test_a_folder_that_exists_is_not_touched(text: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    line = refused(["train", str(trained), "--data", text, *SMALL], capsys)
    assert str(trained) in line
    assert "--resume" in line
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_an_exit_that_is_not_there_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", str(trained), "--prompt", "x", "--exit", "7"]) == 2
    assert "exit must be in -2..1, got 7" in capsys.readouterr().err


def test_nothing_is_written_before_an_exit_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", str(trained), "--prompt", "x", "--exit", "-3"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "localexit: exit must be in -2..1, got -3\n"


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"localexit {localexit.__version__}\n"


def test_a_warning_is_one_line_without_the_place_in_our_sources(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert cli.run(["audit", str(trained), "--feedback", "parallel"]) == 0
    printed = capsys.readouterr().err
    assert printed.startswith("localexit: warning: feedback 'parallel' works along the normed hidden")
    assert printed.count("\n") == 1
    assert warnings.showwarning is before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried …"),
        MemoryError(),
    ],
)
def test_no_memory_left_is_one_line(
    error: Exception, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(cli.Report, "execute", fail)
    assert cli.run(["report", str(trained)]) == 1
    line = capsys.readouterr().err
    assert line.startswith("localexit: not enough memory (")
    assert "smaller batches" in line
    assert line.count("\n") == 1


def test_an_evaluation_that_cannot_be_written_is_refused_before_it_is_made(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localexit.train.eval.evaluate_run", lambda *_, **__: pytest.fail("it was made"))
    assert "expected a file, got the folder" in refused(["eval", str(trained), "--output", str(trained)], capsys)
    below = str(trained / "config.json" / "eval.json")
    assert "no folder that can be written to" in refused(["eval", str(trained), "--output", below], capsys)


def test_where_something_was_refused_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--traceback", "report", "nowhere"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert any("in read_run" in line for line in lines)
    assert lines[-1].startswith("localexit: run: expected a run directory")


@pytest.mark.parametrize("package", ["tyro", "jinja2"])
def test_a_missing_package_is_one_line_that_names_the_extra(package: str, trained: Path) -> None:
    code = f"""
import sys
sys.modules[{package!r}] = None
sys.argv = ["localexit", "report", {str(trained)!r}]
from localexit.__main__ import main
main()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment())
    assert (ended.returncode, ended.stdout) == (2, "")
    line = f"localexit: package {package!r} is not installed: this needs pip install 'localexit[train]'\n"
    assert ended.stderr == line


def test_the_audit_of_a_run_uses_the_state_of_its_rule(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from localexit import measure

    audited: list[LocalModel] = []
    audit_attached = measure.audit_attached

    def keep(local: LocalModel, **options: Any) -> AuditReport:
        audited.append(local)
        return audit_attached(local, **options)

    monkeypatch.setattr(measure, "audit_attached", keep)
    saved = load_file(trained / "model" / "exits.safetensors")["feedback.rows"]
    assert saved.any()
    for options in ([], ["--exits", "every:2"]):
        assert cli.run(["audit", str(trained), *options]) == 0
        assert torch.equal(audited[-1].feedback.state_dict()["rows"], saved)
    assert cli.run(["audit", str(trained), "--feedback", "mirror"]) == 0
    assert not audited[-1].feedback.state_dict()["rows"].any()


def test_control_characters_of_a_message_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["report", "a\x1b[31mb"], capsys)
    assert "\x1b" not in line


@pytest.mark.parametrize("command", [[], ["train"], ["generate"], ["report"], ["audit"], ["bench"]])
def test_help_explains_every_option(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run([*command, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: localexit" in printed
    if command == ["train"]:
        options = re.findall(r"--[a-z-]+", printed)
        fields = {name.replace("_", "-") for name in cli.TrainConfig.__dataclass_fields__}
        assert {f"--{name}" for name in fields} <= set(options)
        squeezed = re.sub(r"[\s│]", "", printed)
        assert all(name in squeezed for name in feedback_names())


def test_the_module_can_be_run(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "localexit", "train", "--lr", "0"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment(),
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "localexit: lr must be a positive number, got 0.0\n"


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(text: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [*SMALL, "--steps", "100000", "--warmup-steps", "10", "--eval-every", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "localexit", "train", str(run), "--data", text, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert f"localexit train {run} --resume" in printed.replace("\n", " ")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (lines[-1]["kind"], lines[-1]["event"]) == ("event", "interrupted")
    assert (run / "checkpoints" / f"step-{lines[-1]['step']}" / "manifest.json").is_file()
    assert (run / "model" / "model.safetensors").is_file()


def test_a_run_that_fails_is_one_line_and_code_1(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", str(tmp_path / "run"), "--data", text, *SMALL, "--lr", "1e30", "--clip", "1e30"]
    assert cli.run([*arguments, "--steps", "50", "--warmup-steps", "0"]) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "step 2: expected finite validation losses" in printed
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_checkpoint_that_reads_back_as_another_ends_the_run(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from localexit.train import checkpoint

    def refuse(path: Path) -> None:
        raise checkpoint.CheckpointError(f"checkpoint {path.name}: model.safetensors is damaged")

    monkeypatch.setattr(checkpoint, "verify", refuse)
    assert cli.run(["train", str(tmp_path / "run"), "--data", text, *SMALL]) == 1
    assert "model.safetensors is damaged" in capsys.readouterr().err
