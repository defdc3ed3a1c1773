"""What the README says can be done is done, and its numbers are right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.commands import parse_command, run_command
from docs.pages import PAGES, README, ROOT, blocks, inline_code, section
from localexit import cli

TEXT = README.read_text(encoding="utf-8")
SNIPPETS = blocks(TEXT, "python")


def test_commands_leave_what_the_readme_promises(workplace: Path) -> None:
    assert (workplace / "runs/mine/report.html").exists()
    assert (workplace / "runs/mine/model/model.safetensors").exists()


def test_the_audit_tells_transport(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    assert "localexit audit runs/mine --feedback transport" in inline_code(TEXT)
    assert cli.run(["audit", "runs/mine"]) == 0
    assert capsys.readouterr().out.count("\nok") == 10
    assert cli.run(["audit", "runs/mine", "--feedback", "transport"]) == 1


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_each_snippet_runs_alone(snippet: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "snippet"})


# A page's blocks are read one after the other, so they run like that.
@pytest.mark.parametrize(
    "path", [path for path in PAGES if path != README and blocks(path.read_text(encoding="utf-8"), "python")], ids=str
)
def test_blocks_of_other_pages_run_in_order(path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(path.read_text(encoding="utf-8"), "python"):
        exec(compile(block, str(path.relative_to(ROOT)), "exec"), names)


def test_training_a_model_folder(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("path", "cache"):
        (tmp_path / name).symlink_to(workplace / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for line in "".join(blocks((ROOT / "docs/your-model.md").read_text(encoding="utf-8"), "console")).splitlines():
        run_command(line)
    assert (tmp_path / "runs/mine/model/model.safetensors").exists()


def test_commands_about_early_exits(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    lines = "".join(blocks((ROOT / "docs/early-exit.md").read_text(encoding="utf-8"), "console")).splitlines()
    commands = [line for line in lines if line.startswith("localexit ")]
    assert len(commands) == 5
    for line in commands:
        run_command(line)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_in_the_text_are_commands(path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for code in inline_code(path.read_text(encoding="utf-8")):
        if code.startswith("localexit "):
            parse_command(code)


def test_what_is_no_command_is_noticed() -> None:
    with pytest.raises(ValueError, match="no-such"):
        parse_command("localexit train --no-such-option 1")


def factor(*, width: int, vocab: int, num_blocks: int, num_exits: int) -> float:
    """FLOPs of local training over those of backprop with one loss at the top, by the README's cost model."""
    in_blocks = num_blocks * 6 * 12 * width**2
    return (in_blocks + num_exits * 4 * vocab * width) / (in_blocks + 6 * vocab * width)


def test_cost_factors() -> None:
    told = [float(number) for number in re.findall(r"\b\d\.\d\b", section(TEXT, "Costs"))]
    expected = [
        factor(width=768, vocab=50304, num_blocks=12, num_exits=12),
        factor(width=768, vocab=50304, num_blocks=12, num_exits=3),
        factor(width=4096, vocab=32000, num_blocks=12, num_exits=12),
    ]
    assert told == [round(value, 1) for value in expected]
