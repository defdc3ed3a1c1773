"""Cost against one size, the others fixed: tokens N, width D, vocabulary V, rank R, anchors M. Without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from localexit.train.config import FeedbackSpec

from .plans import Case, RulePlan
from .shapes import Shape

Letter = Literal["N", "D", "V", "R", "M"]

_FIELDS = {"N": "num_tokens", "D": "hidden_size", "V": "vocab_size"}
# Rules that have the option, and how it is called.
_OPTIONS = {"R": ("rank", ("dense", "sketch", "hybrid")), "M": ("num_anchors", ("anchors",))}
_RULES = ("anchors", "dense", "hybrid", "mirror_sampled", "transport")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One size that varies.

    Attributes:
        letter: which.
        base: the sizes that do not.
        values: what it takes.
    """

    letter: Letter
    base: Shape
    values: tuple[int, ...]

    def rules(self) -> tuple[str, ...]:
        """The rules that are compared unless told otherwise."""
        return _OPTIONS[self.letter][1] if self.letter in _OPTIONS else _RULES

    def at(self, value: int, case: Case) -> Case:
        """The case with that size.

        Raises:
            ValueError: a rule of the case does not have it.
        """
        if self.letter in _FIELDS:
            return case.resized(replace(self.base, **{_FIELDS[self.letter]: value}))
        option, _ = _OPTIONS[self.letter]
        plans = tuple(replace(plan, rule=_with_option(plan, option, value)) for plan in case.plans)
        return replace(case, shape=self.base, plans=plans)


def _with_option(plan: RulePlan, option: str, value: int) -> FeedbackSpec:
    others = tuple(pair for pair in plan.rule.options if pair[0] != option)
    return FeedbackSpec(name=plan.rule.name, options=(*others, (option, value)))


def default_sweep(letter: Letter, device: str) -> Sweep:
    """Sizes around those of a model that fits the machine."""
    if device == "cpu":
        base, values = Shape(num_tokens=1024, hidden_size=256, vocab_size=8192), _CPU_VALUES
    else:
        base, values = Shape(num_tokens=8192, hidden_size=2048, vocab_size=65536), _GPU_VALUES
    return Sweep(letter=letter, base=base, values=values[letter])


_CPU_VALUES: dict[Letter, tuple[int, ...]] = {
    "N": (256, 512, 1024, 2048, 4096),
    "D": (128, 256, 512, 1024, 2048),
    "V": (1024, 2048, 4096, 8192, 16384, 32768),
    "R": (16, 32, 64, 128, 256),
    "M": (16, 32, 64, 128, 256),
}
_GPU_VALUES: dict[Letter, tuple[int, ...]] = {
    "N": (1024, 2048, 4096, 8192, 16384, 32768),
    "D": (512, 1024, 2048, 4096, 8192),
    "V": (8192, 16384, 32768, 65536, 131072, 262144),
    "R": (32, 64, 128, 256, 512, 1024),
    "M": (32, 64, 128, 256, 512, 1024),
}
