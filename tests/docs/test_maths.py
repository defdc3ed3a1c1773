"""The numbered equations and the code that cites them stay together."""

from __future__ import annotations

import ast
import re

import pytest

from docs.pages import PACKAGE, headings, page, section
from localexit import feedback_names, make_feedback

EQUATIONS = {int(match[1]): match[0] for h in headings(page("maths.md")) if (match := re.match(r"\((\d+)\) .+", h))}
_CITATION = re.compile(r"\beqs?\.\s+((?:\(\d+\)(?:,?\s+(?:and\s+)?)?)+)", re.IGNORECASE)


def cited() -> set[int]:
    """Numbers that the sources cite."""
    texts = (path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    return {int(n) for text in texts for group in _CITATION.findall(text) for n in re.findall(r"\d+", group)}


def defined(source: str) -> set[str]:
    """Functions and classes of a module, methods as `Class.method`."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


def test_equations_are_numbered_without_gaps() -> None:
    assert list(EQUATIONS) == list(range(1, len(EQUATIONS) + 1))


def test_every_citation_has_its_equation_and_every_equation_its_citation() -> None:
    assert cited() == set(EQUATIONS)


@pytest.mark.parametrize("number", EQUATIONS)
def test_the_code_an_equation_names_exists(number: int) -> None:
    text = section(page("maths.md"), EQUATIONS[number])
    places = text.split("In the code:")[1].split("\n\n")[0].replace("\n", " ")
    for place in places.strip().rstrip(".").split(";"):
        file, *names = re.findall(r"`([^`]+)`", place)
        assert names, f"no name given in {file}"
        assert set(names) <= defined((PACKAGE / file).read_text(encoding="utf-8")), place


def test_additive_rules_are_named() -> None:
    line = section(page("maths.md"), "What holds for every rule").split("*Additive*")[1]
    named = set(re.findall(r"`(\w+)`", line))
    assert named == {name for name in feedback_names() if not make_feedback(name, 4, 8).is_additive}
