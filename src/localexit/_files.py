"""Files that a stranger may have made: read within bounds, and kept inside their folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Configurations, states and manifests are kilobytes; what is much larger was not written by us.
LARGEST_JSON = 16 * 2**20
# Vocabularies of large models are some 30 MB.
LARGEST_OF_MODEL = 256 * 2**20


def read_json(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        ValueError: it is larger than any that we write, or not JSON.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        # Not the size that the file system tells: of a device or a pipe it tells nothing.
        content = file.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise ValueError("larger than any that was written")
    return parse_json(content)


def parse_json(content: bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("nested deeper than any that was written") from error


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line of a file that is not blank.

    Raises:
        ValueError: a line is longer than any that we write.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LARGEST_JSON + 1), b""), start=1):
            if len(line) > LARGEST_JSON:
                raise ValueError(f"{path} line {number}: longer than any that was written; delete the line")
            if line.strip():
                yield number, line


def check_output(name: str, path: Path) -> None:
    """Refuse the path of a file that cannot be written, before there is anything to lose; its folders need not exist.

    Raises:
        ValueError: it is a folder, lies below a file, or where nobody may write.
    """
    if path.is_dir():
        raise ValueError(f"{name}: expected a file, got the folder {str(path)!r}; name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(
            f"{name}: expected a file that can be written, got {str(path)!r}, but {str(folder)!r} is no folder that "
            f"can be written to; name another"
        )


def check_model_files(folder: Path) -> None:
    """Refuse a folder of a model whose configuration or vocabulary is no file, or larger than any that is known.

    Others read them whole, before they look at them.

    Raises:
        ValueError: there is such a file.
    """
    for path in sorted(folder.glob("*")):
        if path.suffix not in (".json", ".txt", ".jinja", ".model"):
            continue
        if not path.is_file():
            raise ValueError(f"{path.name}: expected a file, got a folder, device, pipe or broken link")
        if path.stat().st_size > LARGEST_OF_MODEL:
            raise ValueError(f"{path.name}: expected at most {LARGEST_OF_MODEL} bytes, got {path.stat().st_size}")


def check_links(folder: Path) -> None:
    """Refuse a folder with a link in it that leads out of it: following one would read or write something else.

    Raises:
        ValueError: there is one.
    """
    root = folder.resolve()
    for path, folders, files in os.walk(root):
        for name in (*folders, *files):
            entry = Path(path, name)
            if entry.is_symlink() and not entry.resolve().is_relative_to(root):
                raise ValueError(
                    f"run: expected a folder whose links stay in it, got {str(folder)!r}, where "
                    f"{str(entry.relative_to(root))!r} leads to {str(entry.resolve())!r}; put the file itself there"
                )
