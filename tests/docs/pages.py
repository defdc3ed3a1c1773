"""Reading the documentation: pages, headings, fenced blocks, tables, links."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "localexit"
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("**/*.md")))

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE_CODE = re.compile(r"`[^`]+`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def page(name: str) -> str:
    """Text of a page below docs/."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return [body for kind, body in _FENCED.findall(text) if kind == language]


def prose(text: str) -> str:
    """Text without fenced blocks."""
    return _FENCED.sub("", text)


def links(text: str) -> list[str]:
    """Targets of links and images outside of code."""
    return _LINK.findall(_INLINE_CODE.sub("", prose(text)))


def inline_code(text: str) -> list[str]:
    """What stands between single backticks, outside of fenced blocks."""
    return [" ".join(code.strip("`").split()) for code in _INLINE_CODE.findall(prose(text))]


def headings(text: str) -> list[str]:
    """Headings of every level, without their marks."""
    return re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)


def anchors(text: str) -> set[str]:
    """What a link's fragment may name: headings in lower case, without punctuation, joined by hyphens."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(text)}


def section(text: str, heading: str) -> str:
    """From a heading to the next one of the same or a higher level."""
    level, rest = re.search(rf"^(#+) {re.escape(heading)}$(.*)", text, re.MULTILINE | re.DOTALL).groups()  # type: ignore[union-attr]
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def table(text: str, first_column: str) -> list[dict[str, str]]:
    """Rows of the first table whose first column has this title, by column title."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    titles = _cells(lines[start])
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(titles, _cells(line), strict=True)))
    return rows


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
