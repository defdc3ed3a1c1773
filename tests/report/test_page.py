"""The page is whole, needs nothing but itself, and whatever a run says stays text."""

from __future__ import annotations

import re

import matplotlib
import pytest

from localexit.report import write_report
from report.reading import Page
from report.runs_on_disk import FakeRun

HOSTILE = (
    "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`$x^{$ {{ 7*7 }}\x00\u202e\ud800\x1b[2J_"
)
# what a file system allows of it
HOSTILE_NAME = "_$x^{$<script>alert(1)<&\"' {{ 7*7 }}\u202e\udcff日本"
ALLOWED_TAGS = {"html", "head", "meta", "title", "style", "body", "header", "main", "section", "h1", "h2", "h3", "p"}
ALLOWED_TAGS |= {
    "ul",
    "li",
    "span",
    "bdi",
    "dl",
    "div",
    "dt",
    "dd",
    "small",
    "pre",
    "b",
    "details",
    "summary",
    "strong",
}
ALLOWED_TAGS |= {
    "table",
    "caption",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "br",
    "figure",
    "figcaption",
    "img",
    "a",
    "strong",
}


@pytest.fixture
def without_charts(monkeypatch):
    """Pages without pictures, where a test is about words."""
    monkeypatch.setattr("localexit.report.views.run_charts", lambda _: ())


def page_of(path):
    return Page(path.read_text(encoding="utf-8"))


def hostile_run(path, **changes):
    """A run in which every string is hostile."""
    return FakeRun(
        num_steps=30,
        valid_every=10,
        config={
            "train": {"feedback": HOSTILE, "model": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}},
            "model": {"model_type": HOSTILE, "id2label": {str(index): HOSTILE for index in range(100)}},
            "versions": {HOSTILE: HOSTILE},
            "device": HOSTILE,
        },
        corpus={"name": HOSTILE, "sha256": HOSTILE, "vocab_size": HOSTILE, **changes},
        records=[
            {"kind": "sample", "step": 30, "prompt": HOSTILE, "text": HOSTILE + HOSTILE, "exit": -1},
            {"kind": "event", "step": 30, "event": HOSTILE, "detail": HOSTILE},
            {"kind": HOSTILE},
        ],
    ).write(path)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_report(
        [FakeRun(num_exits=4, num_steps=600, valid_every=50).write(tmp_path_factory.mktemp("r") / "demo")]
    )


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("r")
    first = hostile_run(folder / HOSTILE_NAME)
    second = hostile_run(folder / f"{HOSTILE_NAME}2", vocab_size=12, sha256="other")
    return [write_report([first]), write_report([first, second], output=folder / "both.html")]


def test_the_page_of_one_run(demo):
    page = page_of(demo)
    assert demo.name == "report.html"
    assert page.open == []
    for part in ("demo", "Exits", "Curves", "Samples", "Events", "Settings", "Versions", "2.13.0", "run finished"):
        assert part in page.text
    assert "600" in page.text
    assert "614,400" in page.text
    assert "NaN" not in page.text
    assert len(page.images()) == 5
    assert sorted(path.name for path in (demo.parent / "plots").iterdir()) == [
        "gradient_norms.png",
        "learning_curves.png",
        "learning_rate.png",
        "loss_by_depth.png",
        "throughput.png",
    ]


def test_equal_files_give_an_equal_page_and_leave_matplotlib_as_it_was(demo):
    settings = dict(matplotlib.rcParams)
    before = {path: path.read_bytes() for path in (demo, *(demo.parent / "plots").iterdir())}
    write_report([demo.parent])
    assert {path: path.read_bytes() for path in before} == before
    assert dict(matplotlib.rcParams) == settings


def test_pictures_follow_the_scheme_and_say_what_they_show(demo):
    for alt, svg in page_of(demo).images():
        assert len(alt) > 20
        style = "".join(element.text or "" for element in svg.iter("{http://www.w3.org/2000/svg}style"))
        assert "@media screen and (prefers-color-scheme:dark)" in style
        drawn = "".join(element.get("style", "") for element in svg.iter())
        assert "var(--" in drawn
        assert re.findall("#[0-9a-f]{6}", drawn) == []


def test_nothing_is_fetched(demo, hostile):
    for path in (demo, *hostile):
        page = page_of(path)
        policies = [attributes["content"] for tag, attributes in page.elements if "http-equiv" in attributes]
        assert policies == [
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
        ]
        for tag, attributes in page.elements:
            assert not attributes.keys() & {"srcset", "action", "data", "poster", "background"}
            assert attributes.get("src", "data:").startswith("data:image/svg+xml;base64,") or tag != "img"
            assert attributes.get("href", "#").startswith("#")
        html = path.read_text(encoding="utf-8")
        assert "@import" not in html
        assert "url(" not in html
        for _, svg in page.images():
            for element in svg.iter():
                for name, value in element.attrib.items():
                    assert not name.endswith("href") or value.startswith("#")


def test_strings_of_a_run_stay_text(hostile):
    for path in hostile:
        page = page_of(path)
        assert page.open == []
        assert {tag for tag, _ in page.elements} <= ALLOWED_TAGS
        assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
        # its words are all there, spelled out
        assert "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`$x^{$ {{ 7*7 }}" in page.text
        assert "⟨U+0000⟩⟨U+202E⟩⟨U+D800⟩⟨U+001B⟩[2J_" in page.text
        assert "_$x^{$<script>alert(1)<&\"' {{ 7*7 }}⟨U+202E⟩⟨U+DCFF⟩日本" in page.text
        raw = path.read_bytes().decode("utf-8")
        assert not set(raw) & set("\x00\x1b\u202e")


def test_pictures_of_hostile_runs_run_nothing(hostile):
    images = [svg for path in hostile for _, svg in page_of(path).images()]
    assert len(images) == 5 + 2 + 10
    for svg in images:
        tags = {element.tag.rpartition("}")[2] for element in svg.iter()}
        assert tags <= {"svg", "defs", "style", "g", "path", "text", "tspan", "use", "clipPath", "rect"}
        assert not [name for element in svg.iter() for name in element.attrib if name.startswith("on")]


def test_names_are_written_in_the_comparison_as_they_are(hostile):
    labels = "".join("".join(svg.itertext()) for _, svg in page_of(hostile[1]).images()[:1])
    # not read as mathematics, not dropped for its leading underscore
    assert "A _$x^{$<script>alert(1)" in labels


def test_a_sample_keeps_its_line_breaks_and_says_where_its_prompt_ends(tmp_path, without_charts):
    record = {"kind": "sample", "step": 2, "prompt": "\n\nx =", "text": "\n\nx = 1\n", "exit": 1}
    path = write_report([FakeRun(num_steps=2, valid_every=9, records=[record]).write(tmp_path / "run")])
    assert '<pre dir="auto">\n<b>\n\nx =</b> 1\n</pre>' in path.read_text(encoding="utf-8")


def test_several_runs_are_laid_over_each_other(tmp_path):
    folders = [FakeRun(num_steps=40 + 10 * seed, seed=seed).write(tmp_path / f"seed{seed}") for seed in range(3)]
    path = write_report(folders, output=tmp_path / "pages" / "all.html")
    page = page_of(path)
    assert path == tmp_path / "pages" / "all.html"
    assert "3 runs" in page.text
    assert "Not comparable" not in page.text
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == ["#run-A", "#run-B", "#run-C"]
    assert {f"#{attributes['id']}" for _, attributes in page.elements if "id" in attributes} == set(links)
    overlay = "".join(page.images()[0][1].itertext())
    assert all(label in overlay for label in ("A seed0", "B seed1", "C seed2", "nats/token"))
    assert sorted(entry.name for entry in (tmp_path / "pages" / "plots").iterdir()) == ["exits.png", "last_exits.png"]
    assert not (folders[0] / "report.html").exists()


def test_runs_on_different_text_are_compared_in_bits_per_byte_under_a_warning(tmp_path):
    first = FakeRun(num_steps=20).write(tmp_path / "a" / "run")
    second = FakeRun(num_steps=20, sha256="0" * 64, vocab_size=512).write(tmp_path / "b" / "run")
    page = page_of(write_report([first, second], output=tmp_path / "both.html"))
    assert page.text.count("Not comparable.") == 2
    assert "a/run" in page.text
    assert "b/run" in page.text
    classes = [attributes.get("class") for tag, attributes in page.elements if tag == "td"]
    assert classes.count("incomparable") == 4
    assert all("bits/byte" in "".join(svg.itertext()) for _, svg in page.images()[:2])


@pytest.mark.parametrize(
    ("state", "event"),
    [("interrupted", "interrupted"), ("stopped: loss not finite", "non_finite"), ("not finished", "resumed")],
)
def test_the_state_of_a_run(tmp_path, without_charts, state, event):
    records = [{"kind": "event", "step": 1, "event": event, "detail": "why"}]
    page = page_of(write_report([FakeRun(num_steps=1, records=records).write(tmp_path / "run")]))
    assert f"run {state}" in page.text


def test_notes_tell_what_to_know_before_believing_the_curves(tmp_path, without_charts):
    broken = {"kind": "train", "step": 3, "tokens": 9, "seconds": 1, "lr": 0.1, "tokens_per_second": 9}
    broken |= {"loss": [float("nan")] * 4, "grad_norm": [float("inf")] * 5}
    folder = FakeRun(num_steps=5, valid_every=9, records=[broken, {"kind": "odd"}]).write(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind"')
    page = page_of(write_report([folder]))
    for note in (
        "Nothing was validated yet.",
        "cut off in the middle of a write",
        "3 records were made again after a resume",
        "1 records have losses that are not finite",
        "1 records of kind 'odd' are unknown",
    ):
        assert note in page.text


def test_long_values_are_cut(tmp_path, without_charts):
    config = {"train": {"note": "x" * 100_000}}
    events = [{"kind": "event", "step": step, "event": "resumed", "detail": ""} for step in range(500)]
    samples = [{"kind": "sample", "step": 1, "prompt": "", "text": "y" * 100_000, "exit": 0} for _ in range(100)]
    folder = FakeRun(num_steps=1, config=config, records=[*events, *samples]).write(tmp_path / "run")
    path = write_report([folder])
    assert path.stat().st_size < 600_000
    text = page_of(path).text
    assert "(100,000 characters)" in text
    # 500 and the two that every run has, of which the last 200 are shown
    assert "302 earlier events are left out." in text


def test_the_page_replaces_an_older_one_and_leaves_nothing_else(tmp_path, without_charts):
    folder = FakeRun(num_steps=2).write(tmp_path / "run")
    (folder / "report.html").write_text("old")
    write_report([folder])
    assert (folder / "report.html").read_text(encoding="utf-8") != "old"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "corpus.json",
        "metrics.jsonl",
        "plots",
        "report.html",
    ]


def test_bad_arguments(tmp_path):
    first, second = (FakeRun(num_steps=1).write(tmp_path / name) for name in "ab")
    with pytest.raises(TypeError, match="run_dirs: expected a sequence of folders, got .*; put it into a list"):
        write_report(first)
    with pytest.raises(ValueError, match="run_dirs: expected at least one run directory"):
        write_report([])
    with pytest.raises(ValueError, match="run_dirs: expected different folders, got .* twice"):
        write_report([first, second, tmp_path / "b" / ".." / "a"])
    with pytest.raises(ValueError, match="output: expected a file to write for 2 runs, got None"):
        write_report([first, second])
    with pytest.raises(ValueError, match="output: expected a file, got the folder"):
        write_report([first, second], output=tmp_path)
    assert not (first / "report.html").exists()
