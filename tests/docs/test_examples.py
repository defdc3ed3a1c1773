"""The scripts in examples/ run, and print what they promise."""

from __future__ import annotations

import importlib.util
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from docs.pages import ROOT
from helpers.commands import environment
from helpers.ranks import rank_replies
from localexit import feedback_names

SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare_rules(workplace: Path) -> list[str]:
    # So few tokens that no nucleus is cut, which would be a warning.
    return ["--vocab-size", "40", "--steps", "2"]


def early_exit(workplace: Path) -> list[str]:
    return [str(workplace / "runs/mine"), "--threshold", "0.001", "--tokens", "6"]


def frozen_model(workplace: Path) -> list[str]:
    return [str(workplace / "path/to/model"), str(workplace / "path/to/text/0.txt"), "--steps", "2"]


def plain_module(workplace: Path) -> list[str]:
    return [str(workplace / "path/to/text/0.txt"), "--steps", "2"]


def reward_weighted(workplace: Path) -> list[str]:
    return [str(workplace / "runs/mine"), "--steps", "2", "--word", "e"]


def pipeline_of_units(workplace: Path) -> list[str]:
    return [str(workplace / "path/to/text/0.txt"), str(workplace / "path/to/staged"), "--steps", "3"]


def several_processes(workplace: Path) -> list[str]:
    return [str(workplace / "path/to/text/0.txt"), "--steps", "3"]


def with_accelerate(workplace: Path) -> list[str]:
    return [str(workplace / "path/to/model"), str(workplace / "path/to/text/0.txt"), "--steps", "3"]


def with_lightning(workplace: Path) -> list[str]:
    return [str(workplace / "path/to/text/0.txt"), "--steps", "3"]


def with_trainer(workplace: Path) -> list[str]:
    return [str(workplace / "path/to/model"), str(workplace / "path/to/text/0.txt"), "--steps", "2"]


ARGUMENTS: dict[str, Callable[[Path], list[str]]] = {
    function.__name__: function
    for function in (
        compare_rules,
        early_exit,
        frozen_model,
        pipeline_of_units,
        plain_module,
        reward_weighted,
        several_processes,
        with_accelerate,
        with_lightning,
        with_trainer,
    )
}
PRINTED = {
    "compare_rules": feedback_names(),
    "early_exit": ("last exit: 0 of 6 tokens", "first exit that is sure: 6 of 6 tokens", "draft and verify: "),
    "frozen_model": (
        "nats/token by exit, as the model is: [",
        "step 2: nats/token by exit [",
        "exits.safetensors; the",
    ),
    "pipeline_of_units": ("nats/byte by exit after 3 steps",),
    "plain_module": ("exit 2: validation",),
    "reward_weighted": ("step 2: mean reward",),
    "several_processes": ("nats/byte by exit after 3 steps",),
    "with_accelerate": ("step 3: nats/token by exit", "path/to/model-tuned"),
    "with_trainer": ("after 2 steps: validation nats/token by exit [", "written by the first exit that is sure: the"),
    "with_lightning": ("validation nats/byte by exit after 3 steps",),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_example(name: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(name).main(ARGUMENTS[name](workplace))
    printed = capsys.readouterr().out
    for text in PRINTED[name]:
        assert text in printed


# peft reads an attribute that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_trainer_goes_on_with_adapters_from_its_checkpoint(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workplace / "path/to/model", tmp_path / "model")
    script, text = load("with_trainer"), str(workplace / "path/to/text/0.txt")
    script.main([str(tmp_path / "model"), text, "--steps", "2", "--lora"])
    checkpoint = tmp_path / "model-trainer/checkpoint-2"
    assert (checkpoint / "exits.safetensors").exists()
    names = load_file(checkpoint / "adapter_model.safetensors").keys()
    assert names
    assert all("lora_" in name for name in names)
    script.main([str(tmp_path / "model"), text, "--steps", "4", "--lora", "--resume"])
    assert "after 4 steps" in capsys.readouterr().out
    before, after = (load_file(tmp_path / f"model-trainer/checkpoint-{n}/adapter_model.safetensors") for n in (2, 4))
    assert any(not torch.equal(before[name], after[name]) for name in names)


@pytest.mark.slow
def test_accelerate_in_two_processes(workplace: Path, tmp_path: Path) -> None:
    """What `prepare` gives back is then a wrapper, without the attached model's methods."""
    shutil.copytree(workplace / "path/to/model", tmp_path / "model")
    script = str(ROOT / "examples/with_accelerate.py")
    options = [str(tmp_path / "model"), str(workplace / "path/to/text/0.txt"), "--steps", "3"]
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script, *options],
        capture_output=True,
        text=True,
        check=False,
        env=environment(ACCELERATE_USE_CPU="true"),
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("step 3: nats/token by exit [") == 1
    assert (tmp_path / "model-tuned" / "exits.safetensors").is_file()


def printed_by_rank(name: str, arguments: list[str]) -> str:
    """What the example prints in this process."""
    with redirect_stdout(io.StringIO()) as printed:
        load(name).main(arguments)
    return printed.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["several_processes", "pipeline_of_units"])
def test_several_processes_print_what_one_does(name: str, workplace: Path) -> None:
    arguments = ARGUMENTS[name](workplace)
    replies = rank_replies(printed_by_rank, 2, name, arguments)
    assert [error for error, _ in replies if error] == []
    assert [printed for _, printed in replies] == [printed_by_rank(name, arguments), ""]


def test_text_that_is_too_short_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(SystemExit):
        load("plain_module").main([str(tmp_path / "short.txt")])
    assert "expected at least 640 bytes, got 9" in capsys.readouterr().err
