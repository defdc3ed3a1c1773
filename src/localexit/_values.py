"""Checks of numbers and names, with their messages. Without torch, so that the command refuses them at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

LARGEST_THREADS = 1024


def missing_package(name: str | None) -> str:
    """What to do about a package that is not installed; the library alone needs none but torch, numpy, safetensors."""
    return f"package {name!r} is not installed: this needs pip install 'localexit[train]'"


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """`value` must be one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def count(name: str, value: Any, *, minimum: int) -> int:
    """An integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def threads(value: Any) -> int:
    """Threads of a CPU; torch crashes where the system has no room for as many as it is told to start."""
    if count("threads", value, minimum=1) > LARGEST_THREADS:
        raise ValueError(f"threads must be at most {LARGEST_THREADS}, got {value}")
    return int(value)


def integer(name: str, value: Any) -> int:
    """An integer of either sign."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(value)


def seed(value: Any) -> int:
    """A seed that fits into 64 bits, so that it can be saved as a tensor."""
    if not -(2**63) <= integer("seed", value) < 2**63:
        raise ValueError(f"seed must be a 64-bit integer, got {value}")
    return int(value)


def number(name: str, value: Any, expected: str) -> float:
    """A number that is no bool; `expected` says what it must be."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    return float(value)


def finite(name: str, value: Any) -> float:
    """A finite number."""
    if not math.isfinite(number(name, value, "a finite number")):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def positive(name: str, value: Any, *, or_infinite: bool = False) -> float:
    """A finite number above 0, or infinity where that stands for no limit."""
    expected = "a positive number"
    if not 0 < number(name, value, expected) < math.inf and not (or_infinite and value == math.inf):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return float(value)


def non_negative(name: str, value: Any) -> float:
    """A finite number of at least 0."""
    expected = "a finite number of at least 0"
    if not 0 <= number(name, value, expected) < math.inf:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return float(value)


def fraction(name: str, value: Any) -> float:
    """A number in (0, 1]."""
    if not 0 < number(name, value, "a number in (0, 1]") <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}")
    return float(value)


def rank(value: int | None, hidden_size: int, name: str = "rank", *, default: int = 128) -> int:
    """A rank in 1..hidden_size; None means min(default, hidden_size)."""
    if value is None:
        return min(default, hidden_size)
    value = count(name, value, minimum=1)
    if value > hidden_size:
        raise ValueError(
            f"{name}={value} is larger than the hidden size {hidden_size}: {value} orthonormal columns of length "
            f"{hidden_size} do not exist; pass {name}={hidden_size} or less"
        )
    return value


def rank_exact(value: int | None, full_rank: int) -> int:
    """A rank for the exact part in 0..rank; None means a quarter of it."""
    if value is None:
        return full_rank // 4
    value = count("rank_exact", value, minimum=0)
    if value > full_rank:
        raise ValueError(
            f"rank_exact={value} is larger than rank={full_rank}, of which it is a part; pass rank_exact={full_rank} "
            f"or less, or a larger rank"
        )
    return value


def loss_options(reduction: Any, label_smoothing: Any, z_loss: Any, softcap: Any) -> None:
    """Options of the loss."""
    choice("reduction", reduction, ("mean", "sum", "none"))
    if not 0 <= number("label_smoothing", label_smoothing, "a number in [0, 1)") < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}")
    non_negative("z_loss", z_loss)
    expected = "a positive number or None (no cap)"
    if softcap is not None and not 0 < number("softcap", softcap, expected) < math.inf:
        raise ValueError(f"softcap must be {expected}, got {softcap!r}")
