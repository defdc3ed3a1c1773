"""Versions: the lowest that are allowed are the ones that `make test-min` installs, the pinned ones are allowed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USERS = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"]]
EVERYTHING = [*USERS, *(text for extra in PROJECT["optional-dependencies"].values() for text in extra)]


def pinned(name: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    return {
        requirement.name: Version(next(iter(requirement.specifier)).version)
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate(dict(default_environment()))
    }


def lowest(requirement: Requirement) -> Version:
    (bound,) = [part for part in requirement.specifier if part.operator == ">="]
    return Version(bound.version)


def test_the_lowest_versions_are_tested() -> None:
    requirements = [Requirement(text) for text in USERS]
    assert pinned("constraints-min.txt") == {requirement.name: lowest(requirement) for requirement in requirements}


def test_pinned_versions_are_allowed() -> None:
    versions = pinned("constraints.txt")
    own = Requirement(PROJECT["name"]).name
    for requirement in map(Requirement, EVERYTHING):
        if requirement.name in versions and requirement.name != own:
            assert versions[requirement.name] in requirement.specifier, requirement.name
    # Every package that a user gets is pinned, on a Python for which releases are.
    missing = {Requirement(text).name for text in USERS} - set(versions)
    assert sys.version_info < (3, 11) or missing == set()


def test_no_range_forbids_what_comes_later() -> None:
    assert [text for text in EVERYTHING if {"<", "<=", "=="} & operators(text)] == []


def operators(text: str) -> set[str]:
    return {part.operator for part in Requirement(text).specifier}
