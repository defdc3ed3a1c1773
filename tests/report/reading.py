"""Read a page as a browser would: elements, attributes, text, embedded pictures."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from xml.etree import ElementTree

_VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A parsed page: its elements as (tag, attributes), its text, and the elements left open."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[tuple[str, ElementTree.Element]]:
        """Alternative text and SVG tree of every picture."""
        found = []
        for tag, attributes in self.elements:
            if tag == "img":
                kind, _, data = (attributes["src"] or "").partition(",")
                assert kind == "data:image/svg+xml;base64"
                found.append((attributes["alt"] or "", ElementTree.fromstring(base64.b64decode(data))))
        return found
