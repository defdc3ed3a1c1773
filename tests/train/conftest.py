from __future__ import annotations

from pathlib import Path

import pytest

from train.small_runs import write_corpus


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text."""
    return write_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vocabularies and token streams of this session's tests."""
    return tmp_path_factory.mktemp("cache")
