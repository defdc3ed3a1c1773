"""Load balancing of routers (mixtures of experts): the model's auxiliary loss, for each unit by itself."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localexit.local.trace import Trace, run_model, undisturbed

# Where models and configurations keep the factor of the auxiliary loss.
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")


@dataclass(frozen=True, kw_only=True)
class RouterPlace:
    """Where a router's logits are: the output of a module, or the element `index` of it."""

    module: nn.Module
    index: int | None

    def logits_in(self, output: Any) -> Tensor:
        """The router's logits [..., num_experts] in what the module returned."""
        logits: Tensor = output if self.index is None else output[self.index]
        return logits


@dataclass(frozen=True, kw_only=True)
class Routers:
    """The routers of a model, and its auxiliary loss: `coefficient * load_balancing_loss(logits, top_k)`.

    Attributes:
        places: where the logits of each router are, in the order they run.
        top_k: experts a token.
        coefficient: factor of the auxiliary loss in the model's loss.
    """

    places: tuple[RouterPlace, ...]
    top_k: int
    coefficient: float

    def loss(self, logits: Sequence[Tensor], is_counted: Tensor | None) -> Tensor:
        """The auxiliary loss of some of the routers, times its coefficient; 0-dim."""
        return self.coefficient * load_balancing_loss(logits, self.top_k, is_counted)


def load_balancing_loss(logits: Sequence[Tensor], top_k: int, is_counted: Tensor | None = None) -> Tensor:
    """E · Σ over experts of (share of the picks) · (mean probability): Fedus et al. 2022, eqs. (4)-(6), for top-k.

    Args:
        logits: of each router, [..., E] for the same tokens.
        top_k: experts a token.
        is_counted: [...] 0 or False on tokens to leave out (padding); None counts all.

    Returns:
        0-dim, at least fp32; `top_k` when the load is even.
    """
    num_experts = logits[0].shape[-1]
    flat = torch.cat([each.reshape(-1, num_experts) for each in logits])
    probability = torch.softmax(flat, dim=1, dtype=torch.promote_types(flat.dtype, torch.float32))
    picks = torch.zeros_like(probability).scatter(1, probability.topk(top_k).indices, 1.0)
    weight = torch.ones_like(probability[:, 0])
    if is_counted is not None:
        weight = is_counted.reshape(-1).to(weight.dtype).repeat(len(logits))
    mean = weight / weight.sum().clamp_min(1)
    return num_experts * ((mean @ picks) * (mean @ probability)).sum()


def discover_routers(model: nn.Module, trace: Trace, example: Tensor | Mapping[str, Any]) -> Routers | None:
    """Find the routers of a model that was traced with `config.output_router_logits`, and verify its auxiliary loss.

    Args:
        model: the model.
        trace: of its forward.
        example: the inputs of that forward.

    Returns:
        None for a model that returned no router logits, with a warning if its configuration asks for them, or whose
        coefficient is zero.

    Raises:
        ValueError: the router logits come from no module, or the auxiliary loss cannot be reproduced.
    """
    logits, expected = getattr(trace.output, "router_logits", None), getattr(trace.output, "aux_loss", None)
    if not logits or not isinstance(expected, Tensor):
        if getattr(getattr(model, "config", None), "output_router_logits", False):
            warnings.warn(
                "config.output_router_logits is set, and the model returned no router logits with an auxiliary loss: "
                "its routers are trained without one, as in the model's own training; another version of transformers "
                "may return them, or set config.output_router_logits=False",
                UserWarning,
                stacklevel=4,
            )
        return None
    coefficient = _coefficient(model, trace, example, float(expected))
    if coefficient == 0:
        return None
    return Routers(
        places=tuple(_place(trace, each) for each in logits),
        top_k=_top_k(logits, float(expected)),
        coefficient=coefficient,
    )


def _place(trace: Trace, logits: Tensor) -> RouterPlace:
    for call in trace.calls:
        if call.output is logits:
            return RouterPlace(module=call.module, index=None)
        if isinstance(call.output, tuple):
            for index, element in enumerate(call.output):
                if element is logits:
                    return RouterPlace(module=call.module, index=index)
    raise ValueError(
        "output_router_logits: the router logits that the model returns are the output of no module, so that their "
        "loss cannot be given to a unit; set config.output_router_logits=False"
    )


def _top_k(logits: Sequence[Tensor], expected: float) -> int:
    errors = {
        top_k: abs(float(load_balancing_loss(logits, top_k)) - expected) for top_k in range(1, logits[0].shape[-1] + 1)
    }
    best = min(errors, key=errors.__getitem__)
    # The model takes the probabilities in the logits' own dtype.
    if errors[best] <= max(1e-3, 4 * torch.finfo(logits[0].dtype).eps) * abs(expected):
        return best
    raise ValueError(
        f"output_router_logits: the model's auxiliary loss of {expected:.4g} is not the load-balancing loss of its "
        f"router logits for any number of experts a token, so that it cannot be computed unit by unit; set "
        f"config.output_router_logits=False"
    )


def _coefficient(model: nn.Module, trace: Trace, example: Tensor | Mapping[str, Any], auxiliary: float) -> float:
    """The factor of the auxiliary loss by its name, checked against what the model's own loss contains of it."""
    labels = trace.logits.argmax(dim=-1)
    with undisturbed(model):
        whole = run_model(model, example, labels=labels).loss
        rest = run_model(model, example, labels=labels, output_router_logits=False).loss
    measured = float(whole - rest) / auxiliary
    # What is left of the difference of two losses after rounding.
    tolerance = 0.01 * abs(measured) + 8 * torch.finfo(rest.dtype).eps * abs(float(rest)) / auxiliary
    config = getattr(model, "config", None)
    named = [getattr(place, name, None) for place in (model, config) for name in COEFFICIENTS]
    for value in (*named, 0.0):
        if isinstance(value, int | float) and abs(value - measured) <= tolerance:
            return float(value)
    raise ValueError(
        f"output_router_logits: the model's loss contains {measured:.3g} times its auxiliary loss, and none of "
        f"{', '.join(COEFFICIENTS)} says so; set config.output_router_logits=False"
    )
