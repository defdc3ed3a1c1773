"""Where derived files are kept, and how they are written so that a reader never sees half of one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def default_cache_dir() -> Path:
    """Folder for tokenizers and token streams: `$XDG_CACHE_HOME/localexit`, else `~/.cache/localexit`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG convention: a relative value is to be ignored
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "localexit"


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block ends without an error.

    Parent folders are made. Two processes that write the same file at once leave one whole file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # Not `tempfile`, whose files nobody else may read: these have the mode that any new file gets.
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
