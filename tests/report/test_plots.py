"""Charts survive any record, and draw the numbers that were logged."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localexit.report import plots, read_run
from localexit.report.plots import (
    comparison_charts,
    early_exit_accuracy,
    early_exit_loss,
    gradient_norms,
    last_exit_curves,
    learning_curves,
    learning_rate,
    loss_by_depth,
    run_charts,
    throughput,
)
from localexit.report.theme import drawable, exit_colors, run_style
from report.runs_on_disk import FakeRun, write_json

CHARTS = (learning_curves, loss_by_depth, gradient_norms, throughput, learning_rate)


def read(path, **changes):
    return read_run(FakeRun(**changes).write(path))


def with_records(run, kind, **columns):
    """`run` with some columns of its records replaced."""
    records = replace(run.records, **{kind: replace(getattr(run.records, kind), **columns)})
    return replace(run, records=records)


def labels(chart):
    return [text.get_text() for text in chart.figure.axes[0].texts]


def lines(chart):
    return chart.figure.axes[0].lines


def test_learning_curves_draw_what_was_logged(tmp_path):
    run = read(tmp_path / "run", num_exits=3, num_steps=60, valid_every=20)
    chart = learning_curves(run)
    drawn = lines(chart)
    assert len(drawn) == 6
    for index in range(3):
        np.testing.assert_array_equal(drawn[index].get_ydata(), run.records.train.loss[:, index])
        np.testing.assert_array_equal(drawn[3 + index].get_xdata(), [20, 40, 60])
        np.testing.assert_array_equal(drawn[3 + index].get_ydata(), run.records.valid.loss[:, index])
        assert drawn[index].get_alpha() < 0.5
        assert drawn[3 + index].get_alpha() == 1
    assert sorted(labels(chart)) == ["exit 0", "exit 1", "exit 2"]
    assert f"{run.records.valid.loss[-1, 2]:.3f}" in chart.alt


def test_curves_go_on_where_an_exit_sits_out(tmp_path):
    run = read(tmp_path / "run", num_exits=2, num_steps=6, valid_every=3)
    loss, norms = run.records.train.loss.copy(), run.records.train.grad_norm.copy()
    loss[[0, 2, 4], 0] = loss[[1, 3], 1] = np.nan
    norms[[0, 2, 4], 0] = norms[[1, 3], 1] = 0.0
    run = with_records(run, "train", loss=loss, grad_norm=norms)
    for chart, values in ((learning_curves(run), loss), (gradient_norms(run), norms)):
        first, second = lines(chart)[:2]
        assert first.get_xdata().tolist() == [2, 4, 6]
        np.testing.assert_array_equal(first.get_ydata(), values[[1, 3, 5], 0])
        assert second.get_xdata().tolist() == [1, 3, 5, 6]
        np.testing.assert_array_equal(second.get_ydata(), values[[0, 2, 4, 5], 1])
    shared = lines(gradient_norms(run))[2]
    np.testing.assert_array_equal(shared.get_ydata(), norms[:, 2])


def test_exits_with_blocks_of_their_own_are_inside_of_the_axis(tmp_path):
    early = [{**point, "average_blocks": 4.5 + index} for index, point in enumerate(EVALUATION["early"])]
    run = read(tmp_path / "run", num_exits=2)
    write_json(run.path / "eval.json", {**EVALUATION, "early": early})
    chart = early_exit_loss(read_run(run.path))
    assert chart.figure.axes[0].get_xlim()[1] > 5.5


EVALUATION = {
    "format": 1,
    "data": "stdlib",
    "step": 120,
    "num_tokens": 1000,
    "num_blocks": 4,
    "exits": [
        {"num_blocks": 2, "loss": 4.0, "accuracy": 0.3, "confidence": 0.4, "calibration_error": 0.1, "agreement": 0.7},
        {"num_blocks": 4, "loss": 3.5, "accuracy": 0.4, "confidence": 0.5, "calibration_error": 0.1, "agreement": 1.0},
    ],
    "early": [
        {"threshold": 0.5, "average_blocks": 2.5, "loss": 3.8, "accuracy": 0.35, "agreement": 0.8},
        {"threshold": 0.9, "average_blocks": 3.5, "loss": 3.6, "accuracy": 0.39, "agreement": 0.95},
    ],
}


@pytest.mark.parametrize(("chart", "quantity"), [(early_exit_loss, "loss"), (early_exit_accuracy, "accuracy")])
def test_quality_against_average_depth(tmp_path, chart, quantity):
    path = FakeRun().write(tmp_path / "run")
    assert chart(read_run(path)) is None
    write_json(path / "eval.json", EVALUATION)
    one, sure = lines(chart(read_run(path)))
    assert one.get_xdata().tolist() == [2, 4]
    assert one.get_ydata().tolist() == [row[quantity] for row in EVALUATION["exits"]]
    assert sure.get_xdata().tolist() == [2.5, 3.5]
    assert sure.get_ydata().tolist() == [row[quantity] for row in EVALUATION["early"]]


@pytest.mark.parametrize(
    "broken", [{"exits": 3}, {"early": [{}]}, {"num_tokens": "many"}, {"exits": [{"num_blocks": "x"}]}, {"step": []}]
)
def test_an_evaluation_that_is_none_is_refused(tmp_path, broken):
    path = FakeRun().write(tmp_path / "run")
    write_json(path / "eval.json", EVALUATION | broken)
    with pytest.raises(ValueError, match=r"eval\.json: not an evaluation .*`localexit eval`"):
        read_run(path)


def test_labels_of_24_exits_are_all_there_and_apart(tmp_path):
    chart = learning_curves(read(tmp_path / "run", num_exits=24, num_steps=40))
    assert sorted(labels(chart)) == sorted(f"exit {index}" for index in range(24))
    heights = np.array([text.get_position()[1] for text in chart.figure.axes[0].texts])
    axes_height = chart.figure.axes[0].get_position().height * chart.figure.get_figheight() * 72
    font_size = chart.figure.axes[0].texts[0].get_fontsize()
    assert np.diff(np.sort(heights)).min() * axes_height > 1.15 * font_size


def test_too_many_labels_are_thinned_to_the_last(tmp_path):
    shown = labels(learning_curves(read(tmp_path / "run", num_exits=60, num_steps=4, valid_every=2)))
    assert 10 < len(shown) < 60
    assert {"exit 0", "exit 59"} <= set(shown)


def test_without_validation_the_training_curves_are_labelled(tmp_path):
    chart = learning_curves(read(tmp_path / "run", num_exits=2, num_steps=9, valid_every=100))
    assert sorted(labels(chart)) == ["exit 0", "exit 1"]
    assert "No validation yet." in chart.alt


@pytest.mark.parametrize(
    "changes",
    [
        {"num_steps": 1, "valid_every": 1},
        {"num_steps": 1, "valid_every": 2},
        {"num_exits": 1, "num_steps": 3, "valid_every": 1},
        {"num_exits": 48, "num_steps": 3, "valid_every": 1},
    ],
    ids=["one point each", "one training point", "one exit", "48 exits"],
)
def test_small_runs(tmp_path, changes):
    run = read(tmp_path / "run", **changes)
    assert all(chart.svg for chart in run_charts(run))


def test_a_single_point_is_marked(tmp_path):
    for line in lines(learning_curves(read(tmp_path / "run", num_steps=1, valid_every=1))):
        assert line.get_marker() == "o"


def test_a_run_that_logged_nothing_has_no_charts(tmp_path):
    run = read(tmp_path / "run", num_steps=0)
    assert run_charts(run) == ()
    assert comparison_charts([run, run], ["A", "B"]) == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_a_gap(tmp_path, value):
    run = read(tmp_path / "run", num_exits=2, num_steps=30, valid_every=10)
    loss = run.records.valid.loss.copy()
    loss[1] = value
    chart = learning_curves(with_records(run, "valid", loss=loss))
    assert np.isnan(lines(chart)[-1].get_ydata()).tolist() == [False, True, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_but_broken_numbers_has_no_charts(tmp_path, value):
    run = read(tmp_path / "run", num_exits=2, num_steps=30, valid_every=10)
    for kind, names in (("train", ("loss", "grad_norm", "lr", "tokens_per_second")), ("valid", ("loss",))):
        columns = {name: np.full_like(getattr(getattr(run.records, kind), name), value) for name in names}
        run = with_records(run, kind, **columns)
    assert [chart(run) for chart in CHARTS] == [None] * len(CHARTS)
    assert last_exit_curves([run, run], ["A", "B"]) is None


def test_a_diverged_loss_does_not_flatten_the_rest(tmp_path):
    run = read(tmp_path / "run", num_steps=50, vocab_size=2048)
    loss = run.records.train.loss.copy()
    loss[-1] = 1e9
    low, high = learning_curves(with_records(run, "train", loss=loss)).figure.axes[0].get_ylim()
    assert 2 < low < high < 1.5 * np.log(2048)


@pytest.mark.parametrize("extremes", [[1e308, -1e308], [1e29, 1e-300], [0.0, 5e-324], [-1e29, 1e29]])
def test_extreme_numbers_are_drawn_or_left_out(tmp_path, extremes):
    run = read(tmp_path / "run", num_exits=2, num_steps=2, valid_every=1)
    for kind, names in (("train", ("loss", "grad_norm", "lr", "tokens_per_second")), ("valid", ("loss",))):
        columns = {name: getattr(getattr(run.records, kind), name).copy() for name in names}
        for column in columns.values():
            column[:] = np.reshape(extremes, (2, *[1] * (column.ndim - 1)))
        run = with_records(run, kind, **columns)
    run_charts(run)


def test_gradients_of_zero_leave_the_logarithm(tmp_path):
    run = read(tmp_path / "run", num_steps=20)
    assert gradient_norms(run).figure.axes[0].get_yscale() == "log"
    frozen = with_records(run, "train", grad_norm=np.zeros_like(run.records.train.grad_norm))
    assert gradient_norms(frozen).figure.axes[0].get_yscale() == "linear"


def test_huge_metrics_are_thinned(tmp_path):
    folder = FakeRun(num_exits=2, num_steps=6_000, valid_every=10).write(tmp_path / "run")
    chart = learning_curves(read_run(folder))
    assert max(len(line.get_xdata()) for line in lines(chart)) <= 400
    assert lines(chart)[-1].get_xdata()[-1] == 6_000
    assert len(chart.svg) < 200_000


def test_loss_by_depth_ends_with_the_last_validation(tmp_path):
    run = read(tmp_path / "run", num_exits=5, num_steps=80, valid_every=20)
    chart = loss_by_depth(run)
    np.testing.assert_array_equal(lines(chart)[-1].get_ydata(), run.records.valid.loss[-1])
    assert labels(chart) == ["step 20", "step 40", "step 80"]


def test_runs_are_compared_in_a_unit_they_share(tmp_path):
    same = [read(tmp_path / f"{seed}", seed=seed, num_steps=40) for seed in range(2)]
    other = read(tmp_path / "other", vocab_size=512, num_steps=40)
    assert "nats/token" in last_exit_curves(same, ["A", "B"]).title
    chart = last_exit_curves([*same, other], ["A", "B", "C"])
    assert "bits/byte" in chart.title
    np.testing.assert_array_equal(lines(chart)[-1].get_ydata(), other.records.valid.bits_per_byte[:, -1])
    np.testing.assert_array_equal(lines(chart)[-1].get_xdata(), other.records.valid.tokens)


def test_names_that_the_font_lacks_are_boxes():
    assert drawable("run 日本") == "run □□"
    assert drawable("a\nb\x00") == "a b⟨U+0000⟩"
    assert len(drawable("x" * 500)) == 28


def test_colours_tell_exits_and_runs_apart():
    for num_exits in (0, 1, 2, 24):
        colors = exit_colors(num_exits)
        assert len({color.light for color in colors}) == len({color.dark for color in colors}) == num_exits
    assert len({run_style(index) for index in range(32)}) == 32


def test_pyplot_is_never_imported():
    sources = [path.read_text(encoding="utf-8") for path in Path(plots.__file__).parent.glob("*.py")]
    assert len(sources) > 5
    assert not [source for source in sources if re.search(r"^\s*(from|import) .*pyplot", source, re.MULTILINE)]


def test_a_picture_of_its_own_says_what_it_shows(tmp_path):
    chart = learning_curves(read(tmp_path / "run"))
    svg = chart.standalone_svg().decode()
    assert f"<title>{chart.alt}</title>" in svg
    assert replace(chart, alt="a < b").standalone_svg().decode() == svg.replace(chart.alt, "a &lt; b")
