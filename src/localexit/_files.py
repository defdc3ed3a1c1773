"""Files that a stranger may have made: read within bounds, and kept inside their folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# Configurations, states and manifests are kilobytes; what is much larger was not written by us.
LARGEST_JSON = 16 * 2**20


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
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("nested deeper than any that was written") from error


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
