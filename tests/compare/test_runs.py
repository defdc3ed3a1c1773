"""Training cells: the same again, only what is missing, and only while there is time."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from localexit import cli
from localexit.compare.cells import CellFile
from localexit.compare.methods import Method, method_names
from localexit.compare.plans import CODES, PLANS, Job, jobs, tuned_values
from localexit.compare.results import groups
from localexit.compare.runner import missing_jobs, run_jobs
from localexit.compare.table import group_table
from localexit.compare.training import OutOfTimeError, run_cell
from localexit.local import compile_units
from localexit.train.config import TrainConfig
from localexit.train.trainer import StepResult, Trainer
from train.small_runs import small_config, write_corpus


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return small_config(write_corpus(tmp_path_factory.mktemp("text")), eval_every=3, steps=6)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def job(base: TrainConfig, text: str, *, seed: int = 0) -> Job:
    method = Method.parse(text)
    return Job(method=str(method), config=method.config(replace(base, seed=seed), {}))


@pytest.mark.parametrize("name", method_names())
def test_every_method_trains(base: TrainConfig, name: str) -> None:
    cell = run_cell(job(base, name))
    assert [v.step for v in cell.valid] == [3, 6]
    assert len(cell.loss) == (1 if name == "backprop" else 2)
    assert cell.step_seconds > 0
    assert cell.corpus["sha256"]
    num_exits = len(cell.loss)
    assert cell.exit_flops_per_token >= 4 * 64 * 320
    assert cell.flops_per_token > num_exits * 4 * 64 * 320


def test_the_same_cell_again_is_the_same(base: TrainConfig) -> None:
    once, again = (run_cell(job(base, "mirror_sampled", seed=5)) for _ in range(2))
    assert once.valid == again.valid
    assert once.valid != run_cell(job(base, "mirror_sampled", seed=6)).valid


def test_feedback_is_diagnosed_at_the_steps_asked_for(base: TrainConfig) -> None:
    plain = job(base, "mirror")
    cell = run_cell(replace(plain, diagnose_steps=(2, 6), diagnose_tokens=128))
    assert [one["step"] for one in cell.diagnostics] == [2, 6]
    assert [one["num_tokens"] for one in cell.diagnostics] == [8 * 15] * 2
    assert cell.diagnostics[1]["rows_error"] < cell.diagnostics[0]["rows_error"] < 1
    assert cell.valid == run_cell(plain).valid


def test_products_are_counted(base: TrainConfig) -> None:
    """Logits, dW and feedback are 2·V·D each; sampled rows spare the third."""
    products = {
        name: run_cell(job(base, name)).exit_flops_per_token / (2 * 64 * 320) for name in ("transport", "parallel")
    }
    assert products == {"transport": pytest.approx(3), "parallel": pytest.approx(2)}


def test_products_that_exits_share_are_shared_out(base: TrainConfig) -> None:
    """2·V·D for each of logits and dW, and for M anchors their logits and rows once a step."""
    alone, all_exits = (run_cell(job(base, f"anchors_shared:num_anchors=8@exits_per_step={count}")) for count in (1, 2))
    num_tokens, products = base.batch_size * base.context, 2 * 2 * 64 * 320
    shared = (alone.exit_flops_per_token - products) * num_tokens
    assert all_exits.exit_flops_per_token == pytest.approx(products + shared / 2 / num_tokens)
    # The anchors' system of M×M comes on top.
    assert 2 * 2 * 8 * 64 * 320 < shared < 1.1 * 2 * 2 * 8 * 64 * 320
    assert alone.feedback_bytes == 8


def test_products_in_kernels_are_added_to_those_counted(base: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a kernel makes the logits: the counter sees two of an exit's three products, at both exits."""
    plain = run_cell(job(base, "transport"))
    product, num_tokens = 2 * 64 * 320, base.batch_size * base.context
    counts = {"torch": 3 * product * num_tokens, "auto": 2 * product * num_tokens}
    monkeypatch.setattr(
        "localexit.compare.training.exit_flops", lambda *_, backend="torch", **__: float(counts[backend])
    )
    assert run_cell(job(base, "transport")).flops_per_token == pytest.approx(plain.flops_per_token + 2 * product)
    fewer = run_cell(job(base, "transport@exits_per_step=1")).flops_per_token
    monkeypatch.undo()
    assert fewer == pytest.approx(run_cell(job(base, "transport@exits_per_step=1")).flops_per_token + product)


def test_only_what_is_missing_is_trained(base: TrainConfig, tmp_path: Path) -> None:
    wanted = [job(base, name) for name in ("dense", "transport")]
    lines: list[str] = []
    assert run_jobs(wanted[:1], CellFile(tmp_path), say=lines.append) == 0
    cells = CellFile(tmp_path)
    missing = missing_jobs(wanted, cells)
    assert [one.method for one in missing] == ["transport"]
    assert run_jobs(missing, cells, say=lines.append) == 0
    assert missing_jobs(wanted, CellFile(tmp_path)) == []
    assert [line.split()[1] for line in lines] == ["dense", "transport"]


def test_another_text_than_that_of_the_cells_is_refused_before_training(base: TrainConfig, tmp_path: Path) -> None:
    cells = CellFile(tmp_path)
    run_jobs([job(base, "dense")], cells, say=print)
    other = replace(base, data=str(write_corpus(tmp_path / "other", seed=1)))
    with pytest.raises(ValueError, match="expected the text that the other cells were trained on"):
        run_jobs([job(other, "dense", seed=1)], cells, say=print)
    run_jobs([job(base, "dense", seed=1)], cells, say=print)


def test_other_settings_than_those_of_a_cell_are_refused(base: TrainConfig, tmp_path: Path) -> None:
    cells = CellFile(tmp_path)
    run_jobs([job(base, "dense")], cells, say=print)
    with pytest.raises(ValueError, match="'dense' with seed 0 is there with another lr"):
        missing_jobs([job(replace(base, lr=0.5), "dense")], cells)


@pytest.mark.slow
def test_processes_give_the_same_cells(base: TrainConfig, tmp_path: Path) -> None:
    wanted = [job(base, "dense"), job(base, "anchors")]
    run_jobs(wanted, CellFile(tmp_path / "one"), say=print)
    run_jobs(wanted, CellFile(tmp_path / "two"), num_processes=2, say=print)
    one, two = ({c.key: c.valid for c in CellFile(tmp_path / name).cells} for name in ("one", "two"))
    assert one == two


def test_nothing_is_kept_of_a_cell_that_had_no_time_for_a_step(base: TrainConfig, tmp_path: Path) -> None:
    cells, wanted = CellFile(tmp_path), job(base, "dense")
    with pytest.raises(OutOfTimeError, match="dense seed 0 stopped after step 0 of 6; the same command goes on"):
        run_cell(wanted, deadline=time.time() - 1, unfinished=cells.unfinished(wanted.key))
    assert run_jobs([wanted], cells, max_seconds=0.0, say=print) == 1
    assert cells.cells == ()
    assert list(tmp_path.iterdir()) == []


def cut_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Have the time be over after a step of the next cell."""
    train_step, clock = Trainer.train_step, time.time

    def stepped(self: Trainer) -> StepResult:
        result = train_step(self)
        if self.step == step:
            monkeypatch.setattr("localexit.compare.training.time.time", lambda: clock() + 1e6)
        return result

    monkeypatch.setattr(Trainer, "train_step", stepped)


@pytest.mark.parametrize("method", ["mirror_sampled", "anchors_sampled", "backprop", "direct"])
@pytest.mark.parametrize("step", [1, 4])
def test_a_cell_cut_in_two_is_the_whole_cell(
    base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, step: int
) -> None:
    """Cut before the step whose FLOPs are counted, or after a validation and a diagnosis."""
    monkeypatch.setattr("localexit.compare.training.NUM_WARM_UP_STEPS", 1)
    steps = () if method in ("backprop", "direct") else (2, 6)
    wanted = replace(job(base, method), diagnose_steps=steps, diagnose_tokens=64)
    whole, cells, lines = run_cell(wanted), CellFile(tmp_path), list[str]()
    with monkeypatch.context() as patch:
        cut_after(patch, step)
        assert run_jobs([wanted], cells, max_seconds=600.0, say=lines.append) == 1
    assert lines == [
        f"out of time: {wanted.method} seed 0 stopped after step {step} of 6; the same command goes on with it"
    ]
    assert cells.cells == ()
    steps_made = count_steps(monkeypatch)
    assert run_jobs([wanted], CellFile(tmp_path), max_seconds=600.0, say=print) == 0
    assert steps_made == list(range(step + 1, 7))
    (cell,) = CellFile(tmp_path).cells
    for name in ("valid", "flops_per_token", "exit_flops_per_token", "status", "config", "corpus", "feedback_bytes"):
        assert getattr(cell, name) == getattr(whole, name), name
    assert json.loads(cell.to_json())["diagnostics"] == json.loads(whole.to_json())["diagnostics"]
    assert cell.step_seconds > 0
    assert list((tmp_path / "unfinished").iterdir()) == []


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are made from now on."""
    train_step, made = Trainer.train_step, list[int]()

    def stepped(self: Trainer) -> StepResult:
        result = train_step(self)
        made.append(self.step)
        return result

    monkeypatch.setattr(Trainer, "train_step", stepped)
    return made


def test_what_was_left_with_other_settings_is_trained_from_its_beginning(
    base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, cells = job(base, "dense"), CellFile(tmp_path)
    with monkeypatch.context() as patch:
        cut_after(patch, 2)
        run_jobs([wanted], cells, max_seconds=600.0, say=print)
    steps_made = count_steps(monkeypatch)
    other = job(replace(base, lr=1e-4), "dense")
    with pytest.warns(UserWarning, match="'dense' was left at step 2 with another config, and is trained from its beg"):
        run_jobs([other], cells, say=print)
    assert steps_made == [1, 2, 3, 4, 5, 6]
    assert cells.cells[0].valid == run_cell(other).valid


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_cells_are_those_of_eager_ones_but_are_not_mixed_with_them(
    base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localexit.train.loop.compile_units", partial(compile_units, backend="aot_eager"))
    methods, fast = ("transport", "backprop"), replace(base, compile=True)
    eager, compiled = ([run_cell(job(config, name)) for name in methods] for config in (base, fast))
    for one, other in zip(compiled, eager, strict=True):
        assert (one.config["compile"], other.config["compile"]) == (True, False)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.flops_per_token == other.flops_per_token
    assert "blocks compiled" in str(group_table(groups(compiled)[0]).title)
    assert "compiled" not in str(group_table(groups(eager)[0]).title)
    cells = CellFile(tmp_path)
    cells.add(eager)
    with pytest.raises(ValueError, match="'transport' with seed 0 is there with another compile than is asked for"):
        missing_jobs([job(fast, "transport")], cells)
    with pytest.raises(
        ValueError, match=r"expected one setting on 'tiny' with 6 steps, got two that differ in compile"
    ):
        groups([eager[0], compiled[1]])


def test_a_plan_is_compiled_for_all_methods() -> None:
    assert {one.config.compile for one in jobs(PLANS["b1"], compile_blocks=True)} == {True}
    assert {one.config.compile for one in jobs(PLANS["b1"])} == {False}


def test_a_run_that_diverges_is_a_result(base: TrainConfig) -> None:
    cell = run_cell(job(base, "transport@lr=1e30,clip=1e30"))
    assert cell.status == "diverged"
    assert "expected finite" in cell.detail
    assert cell.loss == ()


@pytest.mark.parametrize("name", PLANS)
def test_plans_are_of_cells_that_can_be_trained(name: str) -> None:
    wanted = jobs(PLANS[name])
    assert len({one.key for one in wanted}) == len(wanted) > 0
    for one in wanted:
        assert one.config.eval_every <= one.config.steps
        assert all(0 < step <= one.config.steps for step in one.diagnose_steps)


def test_all_methods_of_a_seed_come_before_the_next_seed() -> None:
    seeds = [one.config.seed for one in jobs(PLANS["b0"])]
    assert seeds == sorted(seeds)


def test_every_rule_and_control_is_in_a_plan_of_each_size() -> None:
    for names in (("b0", "b0-all"), ("b1",)):
        planned = {Method.parse(one.method).name for name in names for one in jobs(PLANS[name])}
        assert planned == set(method_names())


def test_tuned_values_name_methods_and_settings() -> None:
    for setting in ("b0", "b1"):
        for name, settings in tuned_values(setting).items():
            method = Method.parse(name)
            replace(method, settings=(*method.settings, *settings.items()))


def test_tuned_values_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localexit.compare.plans.tuned_values", lambda _setting: {"dense": {"lr": 0.125}})
    rates = {one.method: one.config.lr for one in jobs(PLANS["b0"], methods=("dense", "mirror"), seeds=(0,))}
    assert rates["dense"] == 0.125
    assert rates["mirror"] != 0.125
    ladder = jobs(PLANS["b2"], methods=("dense",), seeds=(0,))
    assert {one.config.model: one.config.lr for one in ladder} == {
        "small-256": 0.25,
        "small": 0.125,
        "small-768": pytest.approx(0.125 * 512 / 768),
        "small-1024": 0.0625,
    }


def test_values_of_a_method_as_written_win_over_those_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = {"dense": {"lr": 0.125}, "dense:rank=512@unembedding_init=codes": {"lr": 0.25, "unembedding_std": 0.5}}
    monkeypatch.setattr("localexit.compare.plans.tuned_values", lambda _setting: tuned)
    found = {one.method: one.config for one in jobs(PLANS["b1"], methods=("dense:rank=512", CODES), seeds=(0,))}
    assert (found["dense:rank=512"].lr, found["dense:rank=512"].unembedding_std) == (0.125, 0.02)
    assert (found[CODES].lr, found[CODES].unembedding_std) == (0.25, 0.5)


def test_b0_has_both_rules_that_reach_the_exact_gradient_with_every_seed() -> None:
    found = {(one.method, one.config.seed) for one in jobs(PLANS["b0"])}
    assert found >= {(name, seed) for name in ("mirror_sampled", "anchors_sampled") for seed in range(5)}


def test_the_sweep_of_b1_is_of_every_method() -> None:
    assert {Method.parse(one.method).name for one in jobs(PLANS["b1-sweep"])} == set(method_names())


def test_codes_are_swept_with_w_starting_as_them() -> None:
    found = [one.config for one in jobs(PLANS["b1-codes"])]
    assert {config.unembedding_init for config in found} == {"codes"}
    grid = {(config.lr, config.unembedding_std) for config in found}
    assert grid == {(lr, std) for lr in (1e-3, 2e-3, 4e-3) for std in (0.02, 0.05, 0.1, 0.2)}


def test_another_text_takes_the_place_of_the_plans_own() -> None:
    texts = {one.config.data for one in jobs(PLANS["b1"], data="some/folder")}
    assert texts == {"some/folder"}
    assert {one.config.data for one in jobs(PLANS["b1"])} == {"stdlib"}


def test_a_text_that_is_not_there_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "cells"
    assert cli.run(["compare", "--data", str(tmp_path / "absent"), "--output", str(output)]) == 2
    assert "data: expected" in capsys.readouterr().err
    assert not output.exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["compare", "--preset", "b0", "--methods", "transport", "frozen", "--seeds", "0", "--budgets", "41"]
    monkeypatch.setattr("localexit.compare.runner.run_cell", _pretend)
    assert cli.run([*command, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "2 cells, 2 to be trained" in printed
    assert "frozen" in printed
    assert cli.run([*command, "--output", str(tmp_path)]) == 0
    assert "2 cells, 0 to be trained" in capsys.readouterr().out
    assert cli.run([*command, "--output", str(tmp_path / "no-time"), "--max-minutes", "1e-9"]) == 2
    assert "with more --max-minutes" in capsys.readouterr().err
    merged = [*command, "--output", str(tmp_path / "merged"), "--merge", str(tmp_path), "--no-train"]
    assert cli.run(merged) == 0
    lines = (tmp_path / "merged" / "cells.jsonl").read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines] == ["transport", "frozen"]


def _pretend(one: Job, *, deadline: float, unfinished: Path) -> object:
    from compare.made_up import cell

    return cell(one.method, one.config.seed, 3.0, config=one.config)
