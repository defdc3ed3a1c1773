"""The page on scaling is what its formulas say, and the formulas are what the project says elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from docs.pages import ROOT, page


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling_page", ROOT / "benchmarks" / "scaling_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks for its module there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_formulas_say(writer: ModuleType) -> None:
    text = page("scaling.md")
    assert writer.written(text, writer.Setting()) == text, "run `make tables`"
    assert writer.written(text, writer.Setting(width=2048)) != text


def test_the_figure_is_what_the_formulas_say(writer: ModuleType) -> None:
    assert writer.figure(writer.Setting()) == writer.FIGURE.read_bytes(), "run `make tables`"


def test_one_gpu_sends_nothing_and_waits_for_nobody(writer: ModuleType) -> None:
    steps = [form(writer.Setting(), 1) for form in writer.FORMS.values()]
    assert [step.sent for step in steps] == [0, 0, 0, 0]
    assert [step.idle for step in steps] == pytest.approx([0, 0, 0, 0])


def test_formulas_by_hand(writer: ModuleType) -> None:
    small = writer.Setting(blocks=4, width=10, vocab=100, exits=2, rank=5, tokens=7, microbatches=3, machine=2)
    data = writer.data_parallel(small, 2)
    assert data.flops == 6 * 7 * 12 * 4 * 10**2 + 4 * 7 * 2 * 100 * 10
    # Around a ring of two every number is sent once: gradients of blocks, embedding and unembedding, 4 bytes each.
    assert data.sent == 4 * (12 * 4 * 10**2 + 2 * 100 * 10)
    vocab = writer.vocabulary_parallel(small, 2)
    assert vocab.flops == 6 * 14 * 12 * 4 * 10**2 + 4 * 14 * 2 * 100 * 10 / 2
    assert vocab.sent == 4 * 2 * 14 * (4 + 5)
    staged = writer.pipeline(small, 2)
    assert staged.flops == data.flops
    assert staged.sent == 14 * 10 * 2 + 4 * 100 * 10
    assert staged.idle == 1 / 4
    top = writer.one_forward_one_backward(small, 2)
    assert top.flops == 6 * 7 * (12 * 4 * 10**2 + 100 * 10)
    assert top.sent == 2 * 14 * 10 * 2
    busy = (6 * 14 * 4800 + 6 * 14 * 1000) / 2
    assert top.idle == pytest.approx(1 - 3 / 4 * busy / (6 * 14 * 4800 / 2 + 6 * 14 * 1000))


def test_measured_speeds_by_hand(writer: ModuleType) -> None:
    rates = {"tokens_per_second": {"1": 100.0, "2": 150.0}}
    found = {
        "ranks": 2,
        "data_parallel": rates,
        "pipeline": {"units": {"tokens_per_second": {"1": 100.0, "2": 190.0}}, "1f1b": rates},
        "vocab_parallel": {"dense": {"whole_ms": 30.0, "spread_ms": 20.0}},
        "sizes": {
            "blocks": 16,
            "width": 64,
            "vocab": 100,
            "exits": "every:4",
            "rows": 8,
            "context": 32,
            "micro": 5,
        },
    }
    assert writer.measured_speeds(found) == {
        "data parallel": 1.5,
        "pipeline of units": 1.9,
        "1F1B, one loss": 1.5,
        "vocabulary parallel": 1.5,
    }
    assert writer.measured_setting(found) == writer.Setting(
        blocks=16, width=64, vocab=100, exits=4, tokens=256, microbatches=5
    )
