"""Every relative link of the documentation leads somewhere."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from docs.pages import PAGES, ROOT, anchors, links


def _is_outside(link: str) -> bool:
    return link.startswith(("http://", "https://", "mailto:"))


def broken(path: Path, text: str) -> list[str]:
    """Links of a page that lead nowhere."""
    found = []
    for link in links(text):
        if _is_outside(link):
            continue
        file, _, fragment = link.partition("#")
        target = (path.parent / file) if file else path
        if not target.exists() or (fragment and fragment not in anchors(target.read_text(encoding="utf-8"))):
            found.append(link)
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(path: Path) -> None:
    assert broken(path, path.read_text(encoding="utf-8")) == []


def test_links_that_lead_nowhere_are_noticed(tmp_path: Path) -> None:
    text = "# A page\n[a](missing.md) [b](#a-page) [c](#no-heading) `[d](code.md)`\n```text\n[e](block.md)\n```\n"
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    assert broken(path, text) == ["missing.md", "#no-heading"]


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    names = {str(path.relative_to(ROOT / "docs")) for path in PAGES if path.is_relative_to(ROOT / "docs")}
    assert {link.partition("#")[0] for link in links(index)} >= names - {"index.md"}


def test_pictures_are_well_formed_and_readable_in_the_dark() -> None:
    for path in (ROOT / "docs" / "images").glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        root = ElementTree.fromstring(text)
        assert root.get("viewBox")
        assert root.find("{http://www.w3.org/2000/svg}title") is not None
        assert "prefers-color-scheme:dark" in text.replace(": ", ":")
