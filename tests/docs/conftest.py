from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from docs.commands import run_command
from docs.pages import README, blocks
from train.small_runs import write_corpus


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's commands were run: it has what the snippets of all pages name."""
    folder = tmp_path_factory.mktemp("workplace")
    write_corpus(folder / "path/to/text", num_files=6, num_sentences=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for block in blocks(README.read_text(encoding="utf-8"), "console"):
            for line in block.splitlines():
                run_command(line)
    shutil.copytree(folder / "runs/mine/model", folder / "path/to/model")
    return folder
