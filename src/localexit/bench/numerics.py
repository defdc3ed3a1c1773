"""How far an exit is from fp64, in every dtype and where heads are known to go wrong, next to plain PyTorch.

The budget is not a guess: twice what plain PyTorch is off in the same dtype, plus one rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from localexit.exits import exit_cross_entropy
from localexit.exits.functional import Preset
from localexit.exits.reference import Reference, reference_exit
from localexit.feedback import Feedback
from localexit.train.config import FeedbackSpec

from .contenders import make_rule
from .gate import GateError
from .inputs import Inputs, make_inputs, relative_error
from .plans import Backend
from .platforms import Platform
from .shapes import Shape
from .timing import Say

# A gold token with probability 0.9999 is this far above the log-sum-exp of the others.
_CONFIDENT = 9.21
_LARGE_VOCAB = 262_144
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rules whose naive equation is quick at these sizes; dW does not depend on the rule.
_RULES = ("anchors", "dense", "transport")
_PRESETS: tuple[Preset, ...] = ("fast", "memory")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One way to strain an exit.

    Attributes:
        name: what strains it.
        shape: sizes.
        dtype: of hidden states and unembedding.
        margin: of the gold logit, see `make_inputs`.
        offset: added to every logit, through the bias.
        scale: what the loss is multiplied by before its backward, as by a GradScaler.
        num_items: what the sum is divided by; None means the tokens.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    margin: float = 0.0
    offset: float = 0.0
    scale: float = 1.0
    num_items: int | None = None

    @property
    def title(self) -> str:
        """Name and dtype."""
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"


def trials(shape: Shape) -> tuple[Trial, ...]:
    """Every trial, at these sizes unless the size is what strains."""
    # So large that W in fp64, several times over, still fits a small machine.
    large = Shape(num_tokens=min(shape.num_tokens, 64), hidden_size=min(shape.hidden_size, 64), vocab_size=_LARGE_VOCAB)
    plain = [Trial(name="peaked", shape=shape, dtype=dtype) for dtype in _DTYPES]
    confident = [Trial(name="p_gold 0.9999", shape=shape, dtype=dtype, margin=_CONFIDENT) for dtype in _DTYPES]
    offset = [Trial(name="logits + 1e4", shape=shape, dtype=dtype, offset=1e4) for dtype in _DTYPES[:2]]
    vocab = [Trial(name=f"V={_LARGE_VOCAB}", shape=large, dtype=dtype) for dtype in _DTYPES[:2]]
    scaled = Trial(name="loss x 65536 / 16384", shape=shape, dtype=torch.float16, scale=65536.0, num_items=16384)
    return (
        *plain,
        scaled,
        replace(scaled, name="the same, p_gold 0.9999", margin=_CONFIDENT),
        *confident,
        *offset,
        *vocab,
    )


def measure_numerics(shape: Shape, platform: Platform, *, backend: Backend, say: Say) -> dict[str, Any]:
    """Errors of every trial, rule and preset."""
    results = []
    for trial in trials(shape):
        say(f"{trial.title}, {trial.shape}")
        results += _errors(trial, platform.device, backend)
        platform.release()
    return {"shape": vars(shape), "backend": backend, "results": results}


def check_numerics(measured: dict[str, Any]) -> None:
    """Refuse results outside the budget.

    Raises:
        GateError: there are some.
    """
    wrong = [f"{r['trial']} {r['name']}" for r in measured["results"] if not r["is_within"]]
    if wrong:
        raise GateError(f"off by more than twice plain PyTorch plus one rounding: {'; '.join(wrong)}")


def _errors(trial: Trial, device: torch.device, backend: Backend) -> list[dict[str, Any]]:
    inputs = make_inputs(trial.shape, dtype=trial.dtype, device=device, margin=trial.margin)
    bias = inputs.weight.new_full((trial.shape.vocab_size,), trial.offset) if trial.offset else None
    rules = {name: make_rule(FeedbackSpec(name=name), inputs) for name in _RULES}
    exact = _oracle(trial, inputs, bias, rules["transport"])
    plain = _found(trial, inputs, _plain_loss(trial, inputs, bias), exact, exact.feedback)
    rows = []
    for name, rule in rules.items():
        truth = exact.feedback if name == "transport" else _oracle(trial, inputs, bias, rule).feedback
        for preset in _PRESETS:
            loss = exit_cross_entropy(
                inputs.hidden,
                inputs.weight,
                inputs.target,
                feedback=rule,
                linear_bias=bias,
                num_items=trial.num_items,
                preset=preset,
                backend=backend,
            )
            found = _found(trial, inputs, loss, exact, truth)
            rows.append(_row(trial, f"{name} {preset}", found, plain, judges_feedback=rule.needs_weight))
    return rows


def _oracle(trial: Trial, inputs: Inputs, bias: Tensor | None, rule: Feedback) -> Reference:
    return reference_exit(
        inputs.hidden.detach().cpu(),
        inputs.weight.detach().cpu(),
        inputs.target.cpu(),
        feedback=make_rule(FeedbackSpec(name=rule.name), inputs).cpu(),
        linear_bias=None if bias is None else bias.cpu(),
        num_items=trial.num_items,
    )


def _plain_loss(trial: Trial, inputs: Inputs, bias: Tensor | None) -> Tensor:
    logits = F.linear(inputs.hidden, inputs.weight, bias).float()
    return F.cross_entropy(logits, inputs.target, reduction="sum") / (trial.num_items or trial.shape.num_tokens)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Relative errors."""

    loss: float
    weight_grad: float
    feedback: float


def _found(trial: Trial, inputs: Inputs, loss: Tensor, exact: Reference, feedback: Tensor) -> _Found:
    """The backward of a loss, and how far all is from the truth."""
    inputs.clear()
    (trial.scale * loss).backward()
    assert inputs.hidden.grad is not None
    return _Found(
        loss=relative_error(loss.cpu(), exact.loss),
        weight_grad=relative_error(inputs.weight_grad.cpu().double() / trial.scale, exact.weight_grad),
        feedback=relative_error(inputs.hidden.grad.cpu().double() / trial.scale, feedback),
    )


def _row(trial: Trial, name: str, found: _Found, plain: _Found, *, judges_feedback: bool) -> dict[str, Any]:
    eps = torch.finfo(trial.dtype).eps
    # A scalar may be right by chance, so the loss is judged by the worst of plain PyTorch's errors.
    is_within = [
        found.loss <= 2 * max(plain.loss, plain.weight_grad) + eps,
        found.weight_grad <= 2 * plain.weight_grad + eps,
        not judges_feedback or found.feedback <= 2 * plain.feedback + eps,
    ]
    return {
        "trial": trial.title,
        "name": name,
        "loss": found.loss,
        "weight_grad": found.weight_grad,
        "feedback": found.feedback,
        "plain_loss": plain.loss,
        "plain_weight_grad": plain.weight_grad,
        "plain_hidden_grad": plain.feedback,
        "is_within": all(is_within),
    }
