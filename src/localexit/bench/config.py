"""What the benchmark measures, as one frozen value: the options of `localexit bench`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from localexit import _values
from localexit.train.config import FeedbackSpec

from .plans import PEERS, Backend, Mode, Peer, RulePlan, default_plans
from .shapes import Shape
from .sweeps import Letter, Sweep, default_sweep

# A median of fewer says little.
_LEAST_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Options of `localexit bench`.

    Attributes:
        cpu: measure on the CPU although there is a GPU.
        shapes: names (cpu, llama, gemma, gpt2) or NxDxV; what fits the machine by default.
        rules: NAME or NAME:OPTION=VALUE,…, as in `localexit train --feedback`; every rule by default.
        modes: how they are called: step (`exit_step`), filtered (the same, small errors left out of dW), autograd
            (`exit_cross_entropy` and its backward), memory (the same with the memory preset); what people do with
            them by default.
        backend: of our rules: auto, torch or triton.
        peers: exact heads to compare with; all that are installed by default, none when the list is empty.
        original: Python file of the heads this project started from.
        rounds: how often everything is timed, at least 5 times; 7 on a CPU, 5 on a GPU by default.
        threads: of the CPU.
        patience: seconds to spend on waiting for a quiet CPU.
        sweep: vary one size instead: tokens N, width D, vocabulary V, rank R or anchors M; the others are those of
            `shapes`, if one is given.
        values: what that size takes; around the others by default.
        shared_exits: measure this many exits that share one unembedding instead.
        mirror_updates: measure a mirror's update by itself instead, for each way to store it.
        numerics: tell errors against fp64 instead, in every dtype and where heads are known to go wrong.
        output: JSON file of results; what it holds already is not measured again.
        plots: folder for pictures; that of `output` by default.
        show: only show such a file.
        commit: of the sources, where git cannot be asked.
    """

    cpu: bool = False
    shapes: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    modes: tuple[Mode, ...] = ()
    backend: Backend = "auto"
    peers: tuple[Peer, ...] = PEERS
    original: Path | None = None
    rounds: int | None = None
    threads: int = 2
    patience: float = 0.0
    sweep: Letter | None = None
    values: tuple[int, ...] = ()
    shared_exits: int = 0
    mirror_updates: bool = False
    numerics: bool = False
    output: Path | None = None
    plots: Path | None = None
    show: Path | None = None
    commit: str | None = None

    def __post_init__(self) -> None:
        for shape in self.shapes:
            Shape.parse(shape)
        for rule in self.rules:
            FeedbackSpec.parse(rule)
        if self.rounds is not None:
            _values.count("rounds", self.rounds, minimum=_LEAST_ROUNDS)
        for value in self.values:
            _values.count("values", value, minimum=1)
        if self.values and self.sweep is None:
            raise ValueError("values are those of a sweep, and there is none; pass --sweep")
        _values.count("shared_exits", self.shared_exits, minimum=0)
        _values.threads(self.threads)
        _values.non_negative("patience", self.patience)
        if self.original is not None and not self.original.is_file():
            raise ValueError(f"original must be the Python file of the original heads, got {self.original}")

    def plans(self, device: str, *, rules: tuple[str, ...] = ()) -> tuple[RulePlan, ...]:
        """Our contenders; `rules` where none are given."""
        default = default_plans(device, backend=self.backend)
        given = tuple(FeedbackSpec.parse(rule) for rule in self.rules or rules)
        specs = given or tuple(dict.fromkeys(plan.rule for plan in default))
        if self.modes:
            return tuple(RulePlan(rule=spec, mode=mode, backend=self.backend) for mode in self.modes for spec in specs)
        return tuple(replace(plan, rule=spec) for plan in default for spec in specs if spec.name == plan.rule.name)

    def sweep_of(self, device: str) -> Sweep | None:
        """The sweep that is asked for."""
        if self.sweep is None:
            return None
        sweep = default_sweep(self.sweep, device)
        base = Shape.parse(self.shapes[0]) if self.shapes else sweep.base
        return replace(sweep, base=base, values=self.values or sweep.values)
