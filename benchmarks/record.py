"""What a result must say about where it comes from, and how it is shown."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import localexit

ROOT = Path(__file__).resolve().parents[1]


def environment(threads: int) -> dict[str, Any]:
    """Device, versions and commit of a run."""
    return {
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "localexit": localexit.__version__,
        },
        "commit": commit(),
    }


def cpu_name() -> str:
    """The processor's name as Linux gives it, with its instruction set as torch uses it."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":")[1].strip() if lines else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """The commit of the sources, marked when they differ from it; "unknown" outside a repository."""
    try:
        head = _git("rev-parse", "HEAD")
        is_changed = bool(_git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks/*.py"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (" with changes" if is_changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell: the first and the last to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        last = len(cells) - 1
        padded = (
            c.ljust(w) if i in (0, last) else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *map(line, rows)])
