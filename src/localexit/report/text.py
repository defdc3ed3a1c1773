"""Numbers with their units, for people."""

from __future__ import annotations

import math

_MISSING = "–"
_MINUS = "\u2212"


def shortened(text: str, limit: int) -> str:
    """Cut `text` to `limit` characters and say how long it was.

    >>> shortened("abcdef", 3)
    'abc… (6 characters)'
    """
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def number(value: float | None, digits: int = 3) -> str:
    """Format with fixed decimals, so that a column aligns; very large or tiny values in powers of ten.

    >>> number(3.14159), number(-0.5), number(None), number(float("nan")), number(2.5e9)
    ('3.142', '−0.500', '–', 'NaN', '2.50e+09')
    """
    if value is None:
        return _MISSING
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else f"{_MINUS}∞"
    plain = f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.2e}"
    return plain.replace("-", _MINUS, 1) if plain.startswith("-") else plain


def signed(value: float | None, digits: int = 3) -> str:
    """Format a difference with its sign.

    >>> signed(0.25), signed(-0.25), signed(None)
    ('+0.250', '−0.250', '–')
    """
    text = number(value, digits)
    return f"+{text}" if value is not None and math.isfinite(value) and value > 0 else text


def percent(fraction: float | None) -> str:
    """Format a fraction as a percentage.

    >>> percent(0.4231), percent(None)
    ('42.3 %', '–')
    """
    is_number = fraction is not None and math.isfinite(fraction)
    return f"{number(100 * fraction, 1)} %" if fraction is not None and is_number else number(fraction)


def count(value: float | None) -> str:
    """Format a whole number with thousands apart.

    >>> count(1234567), count(None)
    ('1,234,567', '–')
    """
    return _MISSING if value is None or not math.isfinite(value) else f"{int(value):,}"


def compact(value: float) -> str:
    """Format a tick label in few characters.

    >>> compact(0), compact(1500), compact(2_000_000), compact(0.0003), compact(3e12)
    ('0', '1.5k', '2M', '0.0003', '3e+12')
    """
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if unit <= abs(value) < 1e3 * unit:
            return f"{value / unit:.4g}{suffix}"
    return f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """Format a time span by its two largest units.

    >>> duration(4.25), duration(75), duration(3700), duration(200000), duration(None)
    ('4.2 s', '1 min 15 s', '1 h 1 min', '2 d 7 h', '–')
    """
    if seconds is None or not math.isfinite(seconds):
        return _MISSING
    for large, small, unit, part in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if seconds >= large:
            return f"{int(seconds // large)} {unit} {int(seconds % large // small)} {part}"
    return f"{seconds:.1f} s"
