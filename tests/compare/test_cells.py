"""Cells are kept, found again, merged, and never mixed up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compare.made_up import BASE, cell
from localexit.compare.cells import FILE_NAME, Cell, CellFile, check_one_setting, check_one_text, read_cells


def test_a_cell_reads_back_as_it_was() -> None:
    made = cell("mirror:num_pairs=8", 3, 2.5, diagnostics=({"step": 4, "exits": [{"cosine": 0.5}]},), peak_bytes=7)
    assert Cell.from_json(made.to_json().encode()) == made
    assert "\n" not in made.to_json()


def test_cells_are_found_again(tmp_path: Path) -> None:
    made = [cell("dense", 0, 3.0), cell("dense", 1, 3.1), cell("transport", 0, 2.9)]
    file = CellFile(tmp_path)
    for one in made:
        file.add([one])
    again = CellFile(tmp_path)
    assert again.cells == tuple(made)
    assert again.get(made[1].key) == made[1]
    assert again.get(made[1].key._replace(steps=41)) is None
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_merging_folders_keeps_each_cell_once(tmp_path: Path) -> None:
    CellFile(tmp_path / "a").add([cell("dense", 0, 3.0), cell("dense", 1, 3.1)])
    CellFile(tmp_path / "b").add([cell("dense", 1, 3.1), cell("dense", 2, 3.2)])
    both = CellFile(tmp_path / "all")
    for name in "ab":
        both.add(read_cells(tmp_path / name))
    assert [one.key.seed for one in both.cells] == [0, 1, 2]
    assert read_cells(tmp_path / "all" / FILE_NAME) == list(both.cells)


def test_two_results_of_one_cell_are_refused(tmp_path: Path) -> None:
    file = CellFile(tmp_path)
    file.add([cell("dense", 0, 3.0)])
    with pytest.raises(ValueError, match="'dense' on 'mini', seed 0, 40 steps, got two that differ"):
        file.add([cell("dense", 0, 3.5)])


def test_cells_of_another_text_are_refused_before_they_are_kept(tmp_path: Path) -> None:
    file = CellFile(tmp_path)
    file.add([cell("dense", 0, 3.0)])
    with pytest.raises(ValueError, match="expected one text for all"):
        file.add([cell("dense", 1, 3.0, corpus={"sha256": "0" * 64, "name": "packages"})])
    assert len(file.cells) == len(read_cells(tmp_path)) == 1


def test_what_is_no_cell_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"format": 0}\n')
    with pytest.raises(ValueError, match="expected a cell"):
        CellFile(tmp_path)
    (tmp_path / FILE_NAME).write_text("[" * 10**6)
    with pytest.raises(ValueError, match="expected a cell .*nested deeper than any"):
        CellFile(tmp_path)
    with (tmp_path / FILE_NAME).open("r+b") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(ValueError, match=r"cells\.jsonl line 1: longer than any that was written"):
        CellFile(tmp_path)
    with pytest.raises(ValueError, match="expected a cells.jsonl"):
        read_cells(tmp_path / "nowhere")


def test_one_method_has_one_setting() -> None:
    other = replace(BASE, lr=0.5)
    check_one_setting([cell("dense", 0, 3.0), cell("dense", 1, 3.0), cell("mirror", 0, 3.0, config=other)])
    with pytest.raises(ValueError, match="differ in lr"):
        check_one_setting([cell("dense", 0, 3.0), cell("dense", 1, 3.0, config=other)])


@pytest.mark.parametrize("name", ["vocab_size", "batch_size", "accumulate", "context", "eval_tokens"])
def test_all_methods_have_the_same_batches(name: str) -> None:
    other = replace(BASE, **{name: 300})
    with pytest.raises(ValueError, match=f"one setting on 'mini' with 40 steps, got two that differ in {name};"):
        check_one_setting([cell("dense", 0, 3.0), cell("mirror", 0, 3.0, config=other)])
    check_one_setting([cell("dense", 0, 3.0), cell("mirror", 0, 3.0, config=replace(other, steps=80))])


def test_the_same_text_may_be_elsewhere_on_another_machine() -> None:
    made = cell("dense", 0, 3.0)
    elsewhere = cell("dense", 1, 3.0, config=replace(BASE, data="other/text"), corpus={**made.corpus, "name": "text"})
    check_one_text([made, elsewhere])
    check_one_setting([made, elsewhere])


def test_threads_and_device_are_no_setting() -> None:
    check_one_setting([cell("dense", 0, 3.0), cell("dense", 1, 3.0, config=replace(BASE, threads=7, device="cuda"))])


def test_loss_of_a_diverged_cell_is_none() -> None:
    assert cell("dense", 0, 3.0).loss == (3.1, 3.0)
    assert cell("dense", 0, 3.0, status="diverged", detail="NaN").loss == ()
