"""What the writers of pages share: places on a page, tables in Markdown, and what a result was measured on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any


def rewritten(text: str, block: Callable[[str], str]) -> str:
    """A page with what stands between `<!-- NAME -->` and `<!-- end -->` made anew, each from the place's name."""
    return re.sub(
        r"<!-- ([a-z-]+) -->\n.*?\n?<!-- end -->",
        lambda found: f"<!-- {found[1]} -->\n{block(found[1])}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def measured_on(content: dict[str, Any], section: str = "") -> str:
    """Device, torch and commit; a section of another commit than the rest has its own in `commits`, by name."""
    commit = content.get("commits", {}).get(section, content["commit"])
    return f"{content['device']}, torch {content['versions']['torch']}, commit {commit[:7]}."
