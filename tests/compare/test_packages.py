"""The larger text: sources of packages, copied."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from localexit.train.corpus import load_corpus

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from packages import copy_sources, main


def test_sources_are_copied_and_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "text"
    assert main([str(folder), "--packages", "json", "email", "no_such_package"]) == 0
    printed = capsys.readouterr()
    assert "no_such_package" in printed.err
    import json

    copied = folder / "json" / "decoder.py"
    assert copied.read_bytes() == (Path(json.__file__).parent / "decoder.py").read_bytes()
    assert (folder / "email" / "mime" / "text.py").exists()
    assert load_corpus(str(folder)).num_files > 20


def test_a_folder_that_is_there_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--packages", "json"])
    assert "is there already" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_packages_that_are_missing_are_named(tmp_path: Path) -> None:
    assert copy_sources(["no_such_package"], tmp_path / "text") == (0, ["no_such_package"])
