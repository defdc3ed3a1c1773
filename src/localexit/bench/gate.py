"""Nothing is timed unless it is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import torch

from localexit.exits.reference import Reference, reference_exit
from localexit.train.config import FeedbackSpec

from .contenders import Contender, make_rule, rule_contenders
from .inputs import Exact, Inputs, exact, make_inputs, relative_error
from .peers import EAGER, plain_loss, reason_of, run_loss
from .plans import RulePlan
from .platforms import Platform
from .prepare import Prepared
from .shapes import Shape
from .timing import Say

# The oracle's whole [N, V] error fits at this size, and every part of a rule does something.
_SMALL = Shape(num_tokens=48, hidden_size=64, vocab_size=1000)
_TOLERANCE = 1e-4
# A draw may fall on the other side of a boundary by rounding, and moves one token's feedback; a wrong rule is off by
# more than this.
_TOLERANCE_OF_DRAWS = 5e-2


class GateError(RuntimeError):
    """A loss or a gradient is wrong: nothing is timed."""


def check_rules(plans: Sequence[RulePlan], hidden_size: int, device: torch.device) -> None:
    """Loss, feedback and dW of every plan in fp32 against the fp64 oracle, for few tokens and a small vocabulary.

    Raises:
        GateError: one is wrong.
    """
    inputs = make_inputs(replace(_SMALL, hidden_size=hidden_size), dtype=torch.float32, device=device)
    hidden, weight, target = (tensor.detach().cpu() for tensor in (inputs.hidden, inputs.weight, inputs.target))

    @cache
    def oracle(spec: FeedbackSpec) -> Reference:
        return reference_exit(hidden, weight, target, feedback=make_rule(spec, inputs).cpu())

    for plan in plans:
        # Each with a rule of its own: one that was updated would draw differently from the oracle's.
        (contender,) = rule_contenders([plan], inputs)
        expected = oracle(plan.rule)
        inputs.restart()
        loss = contender(inputs)
        assert loss is not None
        assert inputs.hidden.grad is not None
        tolerance = _TOLERANCE_OF_DRAWS if contender.has_draws else _TOLERANCE
        _gate(plan, "loss", relative_error(loss.cpu(), expected.loss), _TOLERANCE)
        if not contender.is_filtered:
            _gate(plan, "dW", relative_error(inputs.weight_grad.cpu(), expected.weight_grad), _TOLERANCE)
        _gate(plan, "feedback", relative_error(inputs.hidden.grad.cpu(), expected.feedback), tolerance)


def errors_of(prepared: Prepared, platform: Platform, *, say: Say) -> dict[str, float]:
    """Relative error of every contender at the measured size: the largest of loss, dW and, where promised, dh.

    Contenders of others that do not run are moved to `prepared.not_available`; ours have to.

    Raises:
        GateError: a rule is off by more than twice plain PyTorch in the same dtype, plus one rounding.
    """
    inputs = prepared.inputs
    expected = exact(inputs, dtype=platform.exact_dtype)
    plain = Contender(name=EAGER, kind="exact", run=partial(run_loss, plain_loss), is_exact=True)
    plain_error = _error_of(plain, inputs, expected)
    budget = 2 * plain_error + torch.finfo(platform.dtype).eps
    errors = {}
    for name, contender in list(prepared.contenders.items()):
        if contender.kind == "products":
            continue
        if contender.kind == "rule":
            errors[name] = _error_of(contender, inputs, expected)
            if not contender.is_filtered:
                _gate(name, "loss or gradient", errors[name], budget)
            continue
        # Others tune and compile for a while before their first result.
        say(f"{name}: first call")
        try:
            errors[name] = _error_of(contender, inputs, expected)
        except Exception as error:
            # Whatever a package does not do on this machine: it is not measured, and not beaten either.
            prepared.not_available[name] = reason_of(error)
            del prepared.contenders[name]
            inputs.clear()
            platform.release()
    return errors


def _error_of(contender: Contender, inputs: Inputs, expected: Exact) -> float:
    inputs.restart()
    loss = contender(inputs)
    assert loss is not None
    assert inputs.hidden.grad is not None
    errors = [relative_error(loss, expected.loss), relative_error(inputs.weight_grad, expected.weight_grad)]
    if contender.is_exact:
        errors.append(relative_error(inputs.hidden.grad, expected.hidden_grad))
    return max(errors)


def _gate(name: object, what: str, error: float, budget: float) -> None:
    if not error <= budget:
        raise GateError(f"{name}: {what} is off by {error:.1e} of its norm, {budget:.1e} allowed; nothing is timed")
