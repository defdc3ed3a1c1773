"""What a result must say about where it comes from, and how it is kept."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import localexit
from localexit._files import check_output, read_json

FORMAT = 2
_SOURCES = Path(__file__).resolve().parents[3]


def environment(device: torch.device, *, threads: int, commit: str | None) -> dict[str, Any]:
    """Device, versions and commit of a run: what all parts of one file of results have in common."""
    return {
        "format": FORMAT,
        "benchmark": "exit",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "localexit": localexit.__version__,
        },
        "commit": commit or current_commit(),
    }


def cpu_name() -> str:
    """The processor's name as Linux gives it, with its instruction set as torch uses it."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":")[1].strip() if lines else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def current_commit() -> str:
    """The commit of the sources, marked when they differ from it; "unknown" outside a repository."""
    try:
        head = _git("rev-parse", "HEAD")
        is_changed = bool(_git("status", "--porcelain", "--untracked-files=no", "--", "src"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (" with changes" if is_changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=_SOURCES, capture_output=True, text=True, check=True)
    return done.stdout.strip()


class Results:
    """A file of results that grows: what was measured under the same circumstances is kept.

    Args:
        path: the file, or None to keep nothing.
        environment: of this run.

    Raises:
        ValueError: the file is of another device, version or commit, no file of results, or cannot be written.
    """

    def __init__(self, path: Path | None, environment: dict[str, Any]) -> None:
        if path is not None:
            check_output("output", path)
        self.path = path
        self.content: dict[str, Any] = dict(environment)
        if path is not None and path.exists():
            self.content = read_results(path)
            for key, value in environment.items():
                if self.content.get(key) != value:
                    raise ValueError(
                        f"output {path} was measured with {key} {self.content.get(key)!r}, this is {value!r}; "
                        "name another file, or remove that one"
                    )

    def has(self, *keys: str, summary: dict[str, Any]) -> bool:
        """Whether the same was measured before and is kept under these keys."""
        found: Any = self.content
        for key in keys:
            found = found.get(key, {})
        return bool(found) and all(found.get(name) == value for name, value in summary.items())

    def add(self, *keys: str, measured: dict[str, Any]) -> None:
        """Keep a measurement under these keys, the outermost first; the file is whole at any time."""
        part = self.content
        for key in keys[:-1]:
            part = part.setdefault(key, {})
        part[keys[-1]] = measured
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_name(f"{self.path.name}.tmp")
            unfinished.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(self.path)


def read_results(path: Path) -> dict[str, Any]:
    """Results from a file.

    Raises:
        ValueError: not a file of results, or of another format.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"results: expected a file of `localexit bench --output`, got {path}: {error}") from error
    if not isinstance(content, dict) or content.get("benchmark") != "exit" or content.get("format") != FORMAT:
        raise ValueError(f"results: expected a benchmark of format {FORMAT}, got {path}; measure again")
    return content
