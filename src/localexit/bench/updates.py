"""A mirror's update by itself: time, its share of the exits it learns from, memory, and the bytes it cannot avoid."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from localexit.exits.chunked import raw_logits
from localexit.feedback import WeightMirror
from localexit.feedback.rows import Pairs

from .contenders import run_step
from .gate import GateError
from .inputs import Inputs, make_inputs, relative_error
from .plans import Case, RulePlan
from .platforms import Platform
from .timing import Say, Times

# Exits whose pairs one update learns from: one, and those of a model whose blocks share the mirror.
NUM_EXITS = (1, 12)
# Of ‖B‖ after the update: rounding, where B is stored in bf16 one rounding of every number.
_BUDGETS = {torch.float32: 2.0**-13, torch.bfloat16: 2.0**-7}


def measure_updates(case: Case, platform: Platform, *, rounds: int, say: Say) -> dict[str, Any]:
    """Every mirror of the case: its update with the pairs of one exit and of several, next to an exit of its own.

    Raises:
        GateError: an update differs from the one in fp64 by more than rounding.
        ValueError: a rule of the case is no mirror.
    """
    about = f"updates, {case.shape}"
    inputs = make_inputs(case.shape, dtype=platform.dtype, device=platform.device)
    mirrors = {plan: make_mirror(plan, inputs) for plan in case.plans}
    say(f"{about}: gate")
    for plan, mirror in mirrors.items():
        _check(plan, mirror, make_pairs(inputs, mirror.num_pairs, 1))
    runs: dict[str, Any] = {}
    for plan, mirror in mirrors.items():
        runs[_exit_name(plan)] = partial(run_step, mirror, plan.backend, inputs)
        for count in NUM_EXITS:
            runs[_update_name(plan, count)] = partial(run_update, mirror, make_pairs(inputs, mirror.num_pairs, count))
    say(f"{about}: memory and times")
    peaks = {name: platform.peak_mib(case, name, run) for name, run in runs.items()}
    times = platform.timer(runs, rounds=rounds, say=lambda line: say(f"{about}: {line}"))
    results = [_result(plan, mirror, count, times, peaks) for plan, mirror in mirrors.items() for count in NUM_EXITS]
    return {**case.summary(), "rounds": rounds, "results": results}


def make_mirror(plan: RulePlan, inputs: Inputs) -> WeightMirror:
    """A mirror that has learned half of W."""
    vocab_size, hidden_size = inputs.weight.shape
    rule = plan.rule.build(hidden_size=hidden_size, vocab_size=vocab_size, seed=0)
    if not isinstance(rule, WeightMirror):
        raise ValueError(f"mirror_updates are of mirrors, and {plan.rule} is none; leave rules out, or name mirrors")
    rule.to(inputs.weight.device).rows.copy_(0.5 * inputs.weight.detach())
    return rule


@torch.no_grad()
def make_pairs(inputs: Inputs, num_pairs: int, num_exits: int) -> list[Pairs]:
    """Pairs of so many exits, of other tokens at each where there are enough."""
    pairs = []
    for index in range(num_exits):
        hidden = inputs.hidden.detach().roll(-index * num_pairs, 0)[:num_pairs]
        keys = torch.arange(len(hidden), device=hidden.device)
        pairs.append(Pairs(hidden=hidden, logits=raw_logits(hidden, inputs.weight), keys=keys))
    return pairs


def run_update(mirror: WeightMirror, pairs: Sequence[Pairs]) -> None:
    """One update from these pairs."""
    for index, of_exit in enumerate(pairs):
        mirror.collect(index, of_exit)
    mirror.update()


def _check(plan: RulePlan, mirror: WeightMirror, pairs: Sequence[Pairs]) -> None:
    exact = WeightMirror(mirror.hidden_size, mirror.vocab_size, num_pairs=mirror.num_pairs, ridge=mirror.ridge)
    exact.rows = mirror.rows.double()
    run_update(exact, pairs)
    run_update(mirror, pairs)
    error = relative_error(mirror.rows, exact.rows)
    budget = _BUDGETS[mirror.rows.dtype]
    if not error <= budget:
        raise GateError(f"{plan.rule}: the update is off by {error:.1e} of the mirror's norm, {budget:.1e} allowed")


def _exit_name(plan: RulePlan) -> str:
    return f"{plan.rule} exit"


def _update_name(plan: RulePlan, num_exits: int) -> str:
    return f"{plan.rule} update {num_exits}"


def _result(
    plan: RulePlan, mirror: WeightMirror, num_exits: int, times: dict[str, Times], peaks: dict[str, float | None]
) -> dict[str, Any]:
    name = _update_name(plan, num_exits)
    own, of_exit = times[name], times[_exit_name(plan)]
    least_bytes = 2 * mirror.rows.nbytes
    return {
        "name": str(plan.rule),
        "storage": mirror.storage,
        "num_exits": num_exits,
        "num_pairs": mirror.num_pairs * num_exits,
        "update_ms": own.median,
        "min_ms": min(own.ms),
        "max_ms": max(own.ms),
        "times_ms": own.ms,
        "exit_ms": of_exit.median,
        "share": 1 / own.ratio_to(of_exit) / num_exits,
        # The mirror read once and written once.
        "least_mib": least_bytes / 2**20,
        "least_gb_per_s": least_bytes / own.median / 1e6,
        "peak_mib": peaks[name],
    }
