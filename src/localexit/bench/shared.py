"""Exits that share one unembedding, as in a model: one accumulator and one chunk of logits for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from localexit.exits import exit_step
from localexit.feedback import Feedback

from .contenders import make_rule
from .gate import GateError
from .inputs import Inputs, exact, make_inputs, relative_error
from .peers import plain_loss, run_loss
from .plans import Backend, Case, RulePlan
from .platforms import Platform
from .timing import Say


def make_exits(case: Case, platform: Platform, num_exits: int) -> tuple[Inputs, ...]:
    """The same tokens in another order at each exit, so that all are as peaked; W and the accumulator are shared."""
    first = make_inputs(case.shape, dtype=platform.dtype, device=platform.device)
    hidden = first.hidden.detach()
    return tuple(replace(first, hidden=hidden.roll(i, 0), target=first.target.roll(i)) for i in range(num_exits))


def one_step(rule: Feedback, backend: Backend, exits: Sequence[Inputs]) -> Tensor:
    """What the exits of a training step cost: dW is cleared, summed over the exits, and folded into W's dtype."""
    total, weight = exits[0].total, exits[0].weight
    total.zero_()
    for index, inputs in enumerate(exits):
        exit_step(
            inputs.hidden,
            weight,
            inputs.target,
            feedback=rule,
            grad_weight=total,
            exit_index=index,
            backend=backend,
        )
    # What they collect or share is of one step.
    rule.discard()
    return total.to(weight.dtype)


def measure_shared(case: Case, platform: Platform, *, num_exits: int, rounds: int, say: Say) -> dict[str, Any]:
    """Time and memory of an exit alone, and of each of several that share the unembedding.

    Raises:
        GateError: dW of all exits is off by more than twice plain PyTorch's.
    """
    about = f"{num_exits} exits, {case.shape}"
    say(f"{about}: gate")
    exits = make_exits(case, platform, num_exits)
    rules = {plan: make_rule(plan.rule, exits[0]) for plan in case.plans}
    _check(exits, rules, platform)
    runs = {
        (plan, count): partial(one_step, rule, plan.backend, exits[:count])
        for plan, rule in rules.items()
        for count in (1, num_exits)
    }
    say(f"{about}: memory and times")
    peaks = {key: platform.peak_mib(case, str(key), run) for key, run in runs.items()}
    named = {str(key): run for key, run in runs.items()}
    times = platform.timer(named, rounds=rounds, say=lambda line: say(f"{about}: {line}"))
    results = []
    for plan in case.plans:
        alone, shared = (plan, 1), (plan, num_exits)
        results.append(
            {
                "name": str(plan.rule),
                "alone_ms": times[str(alone)].median,
                "exit_ms": times[str(shared)].median / num_exits,
                "exit_to_alone": times[str(alone)].ratio_to(times[str(shared)]) / num_exits,
                "alone_peak_mib": peaks[alone],
                "shared_peak_mib": peaks[shared],
            }
        )
    return {**case.summary(), "num_exits": num_exits, "rounds": rounds, "results": results}


def _check(exits: Sequence[Inputs], rules: dict[RulePlan, Feedback], platform: Platform) -> None:
    one = exact(exits[0], dtype=platform.exact_dtype).weight_grad
    plain = replace(exits[0], hidden=exits[0].hidden.detach().requires_grad_())
    run_loss(plain_loss, plain)
    budget = 2 * relative_error(plain.weight_grad, one) + torch.finfo(platform.dtype).eps
    plain.clear()
    for plan, rule in rules.items():
        error = relative_error(one_step(rule, plan.backend, exits), len(exits) * one)
        if not error <= budget:
            raise GateError(f"{plan}: dW of {len(exits)} exits is off by {error:.1e} of its norm, {budget:.1e} allowed")
