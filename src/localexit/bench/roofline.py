"""What an exit could cost at best: FLOPs and bytes of its parts against what the machine can do.

The parts follow each other, and each is bound by the slower of its arithmetic and its traffic:

- error: one product, reads h and W, writes the error where the logits would go;
- dW: one product, reads the error, reads and writes the fp32 sum;
- feedback: a product of the error with codes or all rows, or a gather of a few rows a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .shapes import Shape

_BF16, _FP32 = 2, 4
# Ranks, anchors and picks of the rules' defaults.
_CODES, _PICKED = 128, 33


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a data sheet promises: dense bf16 FLOP/s, and bytes/s of its memory."""

    flops: float
    bandwidth: float


_MACHINES = {
    "H100": Machine(flops=989e12, bandwidth=3.35e12),
    "H200": Machine(flops=989e12, bandwidth=4.8e12),
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of an exit."""

    name: str
    flops: float
    num_bytes: float

    def seconds(self, machine: Machine, *, flops: float | None = None) -> float:
        """The least it takes; `flops` is a speed of products that was measured, instead of the promised one."""
        return max(self.flops / (flops or machine.flops), self.num_bytes / machine.bandwidth)


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """A contender of one run next to its floors, in ms.

    Attributes:
        name: the rule.
        shape: sizes.
        flops, num_bytes: of all parts.
        promised_ms: floor by the data sheet.
        attainable_ms: floor with products as fast as `h @ W.T` alone was in the same run.
        measured_ms: median.
    """

    name: str
    shape: Shape
    flops: float
    num_bytes: float
    promised_ms: float
    attainable_ms: float
    measured_ms: float

    @property
    def gap_ms(self) -> float:
        """What neither arithmetic nor traffic accounts for."""
        return self.measured_ms - self.attainable_ms


def parts(rule: str, shape: Shape) -> tuple[Part, ...]:
    """The parts of an `exit_step` with that rule and its default options, in bf16."""
    n, d, v = shape.num_tokens, shape.hidden_size, shape.vocab_size
    product, logits = 2.0 * n * v * d, float(_BF16 * n * v)
    if rule in ("mirror", "transport"):
        feedback = Part(name="feedback", flops=product, num_bytes=logits + _BF16 * (v + n) * d)
    elif rule.endswith("_sampled"):
        feedback = Part(name="feedback", flops=2.0 * n * _PICKED * d, num_bytes=float(_BF16 * n * (_PICKED + 1) * d))
    else:
        codes = 2.0 * n * v * _CODES + 2.0 * n * _CODES * d
        feedback = Part(name="feedback", flops=codes, num_bytes=logits + _BF16 * (v * _CODES + n * d))
    return (
        Part(name="error", flops=product, num_bytes=_BF16 * (n + v) * d + logits),
        Part(name="dW", flops=product, num_bytes=logits + _BF16 * n * d + 2 * _FP32 * v * d),
        feedback,
    )


# Rules that are products and passes; the others work through V in ways that have no simple floor.
RULES = ("anchors", "dense", "sketch", "hybrid", "mirror_sampled", "transport_sampled", "mirror", "transport")


def rooflines(content: dict[str, Any]) -> list[Roofline]:
    """The steps of a file of results next to their floors; none for a device whose data sheet is not known here."""
    machine = next((m for name, m in _MACHINES.items() if name in content["device"]), None)
    if machine is None:
        return []
    found = []
    for measured in content.get("shapes", {}).values():
        medians = {result["name"]: result["median_ms"] for result in measured["results"]}
        shape = Shape(**measured["shape"])
        for rule in RULES:
            if f"{rule} step" in medians:
                found.append(_roofline(rule, shape, machine, medians))
    return found


def _roofline(rule: str, shape: Shape, machine: Machine, medians: dict[str, float]) -> Roofline:
    exit_parts = parts(rule, shape)
    # A product that stays below what the data sheet promises, at any size: that is as fast as they get.
    speed = 1e3 * exit_parts[0].flops / medians["h @ W.T"]
    return Roofline(
        name=rule,
        shape=shape,
        flops=sum(part.flops for part in exit_parts),
        num_bytes=sum(part.num_bytes for part in exit_parts),
        promised_ms=1e3 * sum(part.seconds(machine) for part in exit_parts),
        attainable_ms=1e3 * sum(part.seconds(machine, flops=speed) for part in exit_parts),
        measured_ms=medians[f"{rule} step"],
    )
