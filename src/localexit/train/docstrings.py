"""Docstrings of installed packages as documents, read from their sources without importing them."""

from __future__ import annotations

import ast
import importlib.util
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from localexit.train.documents import TEST_FOLDERS, Document, clean_text, read_folder

DOCSTRING_PACKAGES = ("matplotlib", "mpmath", "networkx", "numpy", "pandas", "scipy", "sklearn", "sympy", "torch")


def docstring_documents(packages: Sequence[str] = DOCSTRING_PACKAGES) -> list[Document]:
    """Docstrings of the installed ones of `packages`, a document per module; nothing is imported.

    Raises:
        ValueError: none of them is installed.
    """
    roots = [root for package in packages if (root := _package_folder(package)) is not None]
    if not roots:
        raise ValueError(
            f"data: 'docstrings' expected an installed package of {', '.join(packages)}; got none; "
            f"pip install {packages[0]}"
        )
    return [document for root in roots for document in _package_docstrings(root)]


def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _package_docstrings(root: Path) -> Iterator[Document]:
    def is_wanted(relative: PurePosixPath, is_folder: bool) -> bool:
        return relative.name not in TEST_FOLDERS if is_folder else relative.suffix == ".py"

    for source in read_folder(root, Counter(), is_wanted=is_wanted):
        text = "\n\n".join(_docstrings(source.text))
        if text:
            yield Document(name=f"{root.name}/{source.name}", text=clean_text(text) + "\n")


def _docstrings(source: str) -> Iterator[str]:
    """Docstrings of a module, its classes and their functions, each below the name it documents."""
    try:
        with warnings.catch_warnings():
            # other people's invalid escapes are no concern of the person who trains
            warnings.simplefilter("ignore")
            module = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    yield from _docstrings_of(module, "")


def _docstrings_of(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[str]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield f"{name}\n\n{docstring}" if name else docstring
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings_of(child, f"{name}.{child.name}" if name else child.name)
