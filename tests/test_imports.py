"""Importing is light, and rooms import one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import localexit

assert localexit.__file__ is not None
ROOT = Path(localexit.__file__).parent

# What a room may import of the package, besides itself.
ROOMS: dict[str, set[str]] = {
    "_values": set(),
    "_rules": {"_values"},
    "_checks": {"_values"},
    "_text": set(),
    "_files": set(),
    "feedback": {"_checks", "_rules"},
    "exits": {"_checks", "feedback"},
    "kernels": {"_checks", "feedback", "exits"},
    "local": {"_checks", "feedback", "exits"},
    "inference": {"_values", "local"},
    "integrations": {"local"},
    "measure": {"_checks", "feedback", "exits", "local"},
    "train": {"_checks", "_files", "_rules", "_values", "feedback", "exits", "local", "inference", "measure"},
    "report": {"_checks", "_files", "_text", "feedback"},
    "bench": {"_files", "_rules", "_values", "feedback", "exits", "train", "report"},
    "compare": {
        "_checks",
        "_files",
        "_rules",
        "_text",
        "_values",
        "feedback",
        "exits",
        "local",
        "train",
        "measure",
        "report",
        "bench",
    },
}
# The choice of a backend is made where exits are called or a mirror learns, and only when one is asked for.
LAZY: dict[str, set[str]] = {"_checks": {"feedback"}, "exits": {"kernels"}, "feedback": {"kernels"}}
# What the command imports before it has work to do.
LIGHT = ("localexit", "localexit.cli", "localexit.train.preflight", "localexit.inference.sampling", "localexit.bench")
HEAVY = (
    "triton",
    "transformers",
    "tokenizers",
    "matplotlib",
    "jinja2",
    "tyro",
    "rich",
    "tensorboard",
    "datasets",
    "scipy",
)


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """Rooms of the package that a file imports, and whether only inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        for parts in imported(node, path.relative_to(ROOT.parent).parts):
            if parts[0] == "localexit" and len(parts) > 1:
                yield parts[1], id(node) in inside


def imported(node: ast.AST, importer: tuple[str, ...]) -> list[list[str]]:
    """Dotted names that a statement imports, relative ones resolved."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".") for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = [*importer[: -node.level]] if node.level else []
    base += node.module.split(".") if node.module else []
    return [[*base, alias.name] for alias in node.names]


FILES = [path for path in sorted(ROOT.rglob("*.py")) if room_of(path) in ROOMS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_one_way(path: Path) -> None:
    room = room_of(path)
    for other, is_lazy in imports_of(path):
        allowed = ROOMS[room] | {room} | (LAZY.get(room, set()) if is_lazy else set())
        assert other in allowed or other.startswith("__"), f"{room} imports {other}"


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(ROOMS)


def fresh_python(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


def test_importing_is_light_and_changes_nothing_global() -> None:
    code = f"""
import random, sys, torch, warnings

def state():
    modes = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    return (*modes, torch.get_rng_state().tolist(), random.getstate(), list(warnings.filters))

before = state()
for name in ("localexit.local", "localexit.measure"):
    __import__(name)
    print(name, [heavy for heavy in {HEAVY!r} if heavy in sys.modules], torch.cuda.is_initialized(), state() == before)
"""
    assert fresh_python(code).splitlines() == ["localexit.local [] False True", "localexit.measure [] False True"]


@pytest.mark.parametrize("name", LIGHT)
def test_the_command_answers_without_torch(name: str) -> None:
    assert fresh_python(f"import sys, {name}; print('torch' in sys.modules, 'numpy' in sys.modules)") == "False False"


def test_a_name_that_is_not_public_is_none() -> None:
    with pytest.raises(AttributeError, match="module 'localexit' has no attribute 'backprop'"):
        localexit.backprop  # noqa: B018
    assert set(localexit.__all__) <= set(dir(localexit))


def test_all_public_names_exist() -> None:
    assert sorted(localexit.__all__) == localexit.__all__
    assert all(hasattr(localexit, name) for name in localexit.__all__)
