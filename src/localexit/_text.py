"""Strangers' strings, made harmless to look at."""

from __future__ import annotations

import unicodedata

# Line breaks and tabs belong to text; the two joiners belong to the spelling of several scripts and emoji.
_KEPT = frozenset("\n\t\u200c\u200d")
# Control, format (all bidirectional overrides are here), surrogate, line and paragraph separators.
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def visible(text: str) -> str:
    r"""Spell out characters that hide, reorder or break text: NUL, escapes, bidirectional overrides.

    The result can always be encoded as UTF-8 and is legal in XML. It is not escaped for HTML: that is the
    template's work.

    >>> visible("a\x00b\u202ec")
    'a⟨U+0000⟩b⟨U+202E⟩c'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_spelled(character) for character in text.replace("\r\n", "\n"))


def _spelled(character: str) -> str:
    is_hidden = unicodedata.category(character) in _HIDDEN_CATEGORIES and character not in _KEPT
    return f"⟨U+{ord(character):04X}⟩" if is_hidden or _is_noncharacter(ord(character)) else character


def _is_noncharacter(code: int) -> bool:
    return code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
