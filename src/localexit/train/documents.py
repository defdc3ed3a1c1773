"""Text files as documents: found below a folder, read and decoded, with a count of what was left out."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

TEST_FOLDERS = frozenset({"test", "tests", "testing", "idle_test", "testmock"})


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of a corpus.

    Attributes:
        name: where it comes from, relative to the corpus.
        text: non-empty text that can be encoded as UTF-8.
    """

    name: str
    text: str


def is_not_hidden(relative: PurePosixPath, _is_folder: bool) -> bool:
    """Whether a name does not start with a dot; a choice for `read_folder`."""
    return not relative.name.startswith(".")


def read_folder(
    root: Path, counts: Counter[str], *, is_wanted: Callable[[PurePosixPath, bool], bool]
) -> list[Document]:
    """Every readable text file below `root`, by name; `is_wanted(relative path, is it a folder)` chooses."""
    documents = []
    for relative in sorted(_walk(root, counts, is_wanted)):
        text = read_text(root / relative, counts)
        if text is not None:
            documents.append(Document(name=_clean_name(str(relative)), text=text))
    return documents


def _walk(
    root: Path, counts: Counter[str], is_wanted: Callable[[PurePosixPath, bool], bool]
) -> Iterator[PurePosixPath]:
    """Relative paths of the files below `root`; a folder reached through a link is counted, not entered."""

    def count_unreadable(_error: OSError) -> None:
        counts["unreadable"] += 1

    for folder, subfolders, files in os.walk(root, onerror=count_unreadable):
        here = PurePosixPath(Path(folder).relative_to(root).as_posix())
        subfolders[:] = [name for name in subfolders if is_wanted(here / name, True)]
        counts["linked_folder"] += sum((Path(folder) / name).is_symlink() for name in subfolders)
        yield from (here / name for name in files if is_wanted(here / name, False))


def read_text(path: Path, counts: Counter[str]) -> str | None:
    """Text of a file, or None with the reason counted; never opens a pipe or a device."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            counts["special"] += 1
            return None
        data = path.read_bytes()
    except OSError:
        # a link that leads nowhere or in a circle, or no permission
        counts["unreadable"] += 1
        return None
    if b"\0" in data:
        counts["binary"] += 1
        return None
    return _decode(data, counts)


def _decode(data: bytes, counts: Counter[str]) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        counts["invalid_utf8"] += 1
        return data.decode("utf-8-sig", errors="replace")


def _clean_name(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def clean_text(text: str) -> str:
    """`text` with lone surrogates, which UTF-8 cannot express, replaced by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
