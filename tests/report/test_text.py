"""Text for people: nothing hides, columns align."""

from __future__ import annotations

import doctest
import unicodedata
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localexit import _text
from localexit._text import visible
from localexit.report import curves, text

# every character, lone surrogates included
ANY_TEXT = st.text(alphabet=st.characters(codec=None, exclude_categories=()))


@pytest.mark.parametrize("module", [_text, text, curves])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@given(ANY_TEXT)
def test_visible_text_can_be_stored_and_hides_nothing(hostile):
    shown = visible(hostile)
    shown.encode()
    ElementTree.fromstring(f"<a>{shown.translate({60: None, 62: None, 38: None})}</a>")
    hidden = {c for c in shown if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}}
    assert hidden <= set("\n\t\u200c\u200d")


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S", "Zs", "Mn"])))
def test_visible_leaves_plain_text_alone(plain):
    assert visible(plain) == plain


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x00", "⟨U+0000⟩"),
        ("\x1b[31m", "⟨U+001B⟩[31m"),
        ("\u202egnp.exe", "⟨U+202E⟩gnp.exe"),
        ("\u2066\u2069", "⟨U+2066⟩⟨U+2069⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("\uffff", "⟨U+FFFF⟩"),
        ("line\r\nline\n\ttab", "line\nline\n\ttab"),
        ("👩\u200d💻 e\u0301", "👩\u200d💻 e\u0301"),
    ],
)
def test_visible(hostile, shown):
    assert visible(hostile) == shown


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e300, -1e300, 1e-300])
def test_every_float_can_be_shown(value):
    for formatted in (text.number, text.signed, text.percent, text.count, text.duration, text.compact):
        assert formatted(value)


def test_numbers_of_one_column_have_the_same_decimals():
    assert [text.number(value) for value in (3.7, 12.0, -0.25)] == ["3.700", "12.000", "−0.250"]
