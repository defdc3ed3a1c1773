"""Rows of the table from cells."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from compare.made_up import BASE, cell
from localexit.compare.results import best_settings, groups, ladder
from localexit.compare.table import group_table

CELLS = [
    *(cell("dense", seed, 3.2 + seed) for seed in (0, 1, 2)),
    *(cell("transport", seed, 3.0 + seed) for seed in (0, 1)),
    *(cell("backprop", seed, 2.9 + seed) for seed in (1, 2)),
    cell("hybrid", 0, 9.9, status="diverged", detail="NaN"),
]


def test_rows() -> None:
    (group,) = groups(CELLS)
    assert (group.model, group.steps, group.tokens) == ("mini", 40, 40 * 32)
    assert [row.method for row in group.rows] == ["transport", "dense", "backprop", "hybrid"]
    exact, dense, backprop, hybrid = group.rows
    assert exact.to_exact is None
    assert exact.to_backprop is not None
    assert (exact.to_backprop.mean, exact.to_backprop.num_values) == (pytest.approx(0.1), 1)
    assert dense.seeds == (0, 1, 2)
    assert dense.losses == (pytest.approx(4.3), pytest.approx(4.2))
    assert dense.to_exact is not None
    assert (dense.to_exact.mean, dense.to_exact.num_values) == (pytest.approx(0.2), 2)
    assert backprop.to_backprop is None
    assert (hybrid.losses, hybrid.loss, hybrid.num_diverged, hybrid.to_exact) == ((), None, 1, None)


def test_budgets_and_models_are_apart() -> None:
    other = replace(BASE, steps=80)
    found = groups(
        [*CELLS, cell("dense", 0, 2.0, config=other), cell("dense", 0, 2.0, config=replace(BASE, model="tiny"))]
    )
    assert [(group.model, group.steps, len(group.rows)) for group in found] == [
        ("mini", 40, 4),
        ("mini", 80, 1),
        ("tiny", 40, 1),
    ]
    assert found[1].rows[0].to_exact is None


def test_cells_of_different_texts_are_never_paired() -> None:
    """Neither with another method of the same model nor with another width of the same method."""
    other = cell("backprop", 0, 3.0, corpus={"sha256": "0" * 64, "name": "packages"})
    with pytest.raises(ValueError, match=r"got packages \(sha256 000000000000\), stdlib \(sha256 5f5f5f5f5f5f\)"):
        groups([cell("transport", 0, 3.0), other])
    with pytest.raises(ValueError, match="expected one text for all"):
        ladder([cell("backprop", 0, 3.0, config=replace(BASE, model="tiny")), other])


def test_the_table_shows_what_is_resolved() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(group_table(groups(CELLS)[0]))
    lines = {line.split()[0]: line for line in console.file.getvalue().splitlines() if line.strip()}  # type: ignore[attr-defined]
    assert "+0.200 ±0.000" in lines["dense"]
    assert "(+0.100)" in lines["transport"]
    assert "+1 diverged" in lines["hybrid"]


def test_columns_without_a_number_are_left_out() -> None:
    headings = [str(column.header) for column in group_table(groups([cell("dense@lr=0.1", 0, 3.0)])[0]).columns]
    assert headings == ["method", "first exit", "last exit", "seeds", "ms/step"]


def test_best_settings_of_a_sweep() -> None:
    cells = [
        cell("dense@lr=0.1", 0, 3.0),
        cell("dense@lr=0.1", 1, 3.4),
        cell("dense@lr=0.2", 0, 3.1),
        cell("dense@lr=0.2", 1, 3.1),
        cell("dense@lr=0.4", 0, 1.0, status="diverged"),
        cell("transport", 0, 2.0),
        cell("dense@unembedding_init=codes,lr=0.1", 0, 2.5),
    ]
    assert best_settings(cells) == {"dense": {"lr": 0.2}, "dense@unembedding_init=codes": {"lr": 0.1}}
