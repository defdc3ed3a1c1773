"""What one interleaved run compares, as a value: it goes to other processes and into the results. Without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from localexit._rules import feedback_names
from localexit.train.config import FeedbackSpec

from .shapes import Shape

# The names of `exits.backends`, which needs torch.
Backend = Literal["auto", "torch", "triton"]
Mode = Literal["step", "filtered", "autograd", "memory"]
Peer = Literal[
    "F.cross_entropy",
    "torch.compile",
    "F.linear_cross_entropy",
    "cut-cross-entropy",
    "cut-cross-entropy-exact",
    "liger",
    "quack",
]
PEERS: tuple[Peer, ...] = get_args(Peer)
# How the names of the heads this project started from begin.
ORIGINAL = "original"


@dataclass(frozen=True, kw_only=True)
class RulePlan:
    """A rule and how it is called.

    Attributes:
        rule: name and options.
        mode: "step" is `exit_step`: dW is added to an accumulator that was there. "autograd" is
            `exit_cross_entropy(...).backward()` and the rule's `update()`: the gradients are multiplied by what comes
            from above, and count as memory. "memory" is the same with that preset. "filtered" is a step that leaves
            errors which do not matter out of dW.
        backend: as for `exit_cross_entropy`.
    """

    rule: FeedbackSpec
    mode: Mode
    backend: Backend = "auto"

    def __str__(self) -> str:
        named = "" if self.backend == "auto" else f" {self.backend}"
        return f"{self.rule} {self.mode}{named}"


def default_plans(device: str, *, backend: Backend = "auto") -> tuple[RulePlan, ...]:
    """Every rule as people call it there; what differs little by rule with some of them."""
    every = feedback_names()
    cheap = ("anchors", "dense", "sketch", "hybrid", "mirror_sampled", "transport_sampled")
    modes: dict[Mode, tuple[str, ...]] = {"autograd": every, "memory": ("anchors",)}
    if device != "cpu":
        modes = {"step": every, "filtered": ("anchors", "dense"), "autograd": every, "memory": cheap}
    return tuple(
        RulePlan(rule=FeedbackSpec(name=name), mode=mode, backend=backend)
        for mode, names in modes.items()
        for name in names
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape and what runs on it.

    Attributes:
        shape: sizes.
        plans: our rules and how they are called.
        peers: names of exact heads.
        original: Python file of the heads this project started from, or None.
    """

    shape: Shape
    plans: tuple[RulePlan, ...]
    peers: tuple[Peer, ...]
    original: Path | None = None

    def resized(self, shape: Shape) -> Case:
        """The same on other sizes."""
        return replace(self, shape=shape)

    def only(self, name: str) -> Case:
        """One contender of it."""
        return replace(
            self,
            plans=tuple(plan for plan in self.plans if str(plan) == name),
            peers=tuple(peer for peer in self.peers if peer == name),
            original=self.original if name.startswith(ORIGINAL) else None,
        )

    def summary(self) -> dict[str, Any]:
        """What a result must have in common with this case to stand for it."""
        return {
            "shape": vars(self.shape),
            "plans": [str(plan) for plan in self.plans],
            "peers": list(self.peers),
            "has_original": self.original is not None,
        }
