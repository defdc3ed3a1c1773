"""The map of the code is the code: rooms and files exist, and stand in the order of imports."""

from __future__ import annotations

import re

import pytest

from docs.pages import PACKAGE, ROOT, headings, page, section, table
from test_imports import ROOMS

ROWS = [re.findall(r"`([\w.]+)/?`", row["room"]) for row in table(page("architecture.md"), "room")]
LEVEL = {room.removesuffix(".py"): level for level, rooms in enumerate(ROWS) for room in rooms}


def test_every_room_is_on_the_map() -> None:
    on_disk = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert set(LEVEL) == on_disk | modules


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_stand_below_what_they_import(room: str) -> None:
    assert all(LEVEL[other] < LEVEL[room] for other in ROOMS[room])


@pytest.mark.parametrize("room", [h.strip("`/") for h in headings(page("architecture.md")) if h.endswith("/`")])
def test_files_of_a_room(room: str) -> None:
    rows = table(section(page("architecture.md"), f"`{room}/`"), "file")
    listed = {name for row in rows for name in re.findall(r"`([\w.]+)`", row["file"])}
    assert listed
    assert listed <= {path.name for path in (PACKAGE / room).glob("*.py")}


def test_files_named_in_the_text_exist() -> None:
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", page("architecture.md")))
    assert named
    missing = [name for name in sorted(named) if not ((PACKAGE / name).exists() or (ROOT / name).exists())]
    assert missing == []
