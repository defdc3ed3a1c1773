"""The optimiser's step of a unit as soon as its gradients are there, so that those of one unit live at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from localexit import _checks
from localexit.local.model import LocalModel, check_attached
from localexit.local.sharding import clip_grad_norm_


class StepInBackward:
    """Steps the parameters of each unit right after the unit's backward, in the middle of the forward.

    Their gradients are freed then: one unit's exist at a time, and those of what units share. The shared parameters
    collect gradients from every exit and are stepped by `step()`. A unit's parameters are not used again in the
    forward that steps them, so the numbers are those of the ordinary order of things.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from localexit import attach
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=12, n_layer=3, n_head=2))
    >>> local = attach(model.train(), backward="stream")
    >>> optimizer = StepInBackward(local, torch.optim.AdamW(local.parameters(), lr=1e-3), max_norm=1.0)
    >>> tokens = torch.randint(50, (2, 8))
    >>> output = local(tokens, labels=tokens)  # the units are stepped
    >>> norms = optimizer.step()  # what they share is stepped
    >>> local.update()

    Args:
        local: a model attached with backward="stream".
        optimizer: over all of its parameters that are not frozen; one that leaves parameters without a gradient alone,
            as torch's do.
        max_norm: largest gradient norm of each unit, and of what they share; None does not clip.

    Raises:
        ValueError: gradients are made in another way, or are not whole after a unit's backward; the optimiser lacks
            parameters that would get gradients, which nobody would free; or `max_norm` is not positive.
        TypeError: `local` is not attached.
    """

    def __init__(self, local: LocalModel, optimizer: torch.optim.Optimizer, *, max_norm: float | None = None) -> None:
        check_attached(local)
        if local.backward_mode != "stream":
            raise ValueError(
                f"steps in the backward need units whose backward runs one after the other: expected a model attached "
                f"with backward='stream', got {local.backward_mode!r}"
            )
        if local.data_parallel is not None or local.is_sharded:
            raise ValueError(
                "steps in the backward are for one process: a unit's gradients are averaged over ranks while the next "
                "unit computes, and are not whole before; use an ordinary optimiser"
            )
        _check_has_all(optimizer, local)
        self.optimizer = optimizer
        self.max_norm = float("inf") if max_norm is None else _checks.positive("max_norm", max_norm, or_infinite=True)
        self._local = local
        self._shared = local.shared_parameters()
        self._norms: dict[int, Tensor] = {}
        self._is_open = False
        local.in_backward = self

    def begin(self) -> None:
        """A training forward starts.

        Raises:
            RuntimeError: the one before it was not ended by `step()`.
        """
        if self._is_open:
            raise RuntimeError(
                "a second forward before step(): units are stepped in every forward, so gradients cannot be "
                "accumulated over several; call step() after each, or use an ordinary optimiser"
            )
        self._is_open = True

    def step_unit(self, index: int) -> None:
        """Clip and step the parameters of a unit whose gradients are whole, and free those."""
        self._norms[index] = clip_grad_norm_(self._local.units[index].parameters(), self.max_norm)
        # The optimiser steps whatever has a gradient: those that other exits will add to wait.
        waiting = [(parameter, parameter.grad) for parameter in self._shared]
        for parameter, _ in waiting:
            parameter.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        for parameter, grad in waiting:
            parameter.grad = grad

    def step(self) -> Tensor:
        """Clip and step what the units share, after the forward.

        Returns:
            [num_units + 1], the gradients' norms before clipping as `LocalModel.clip_grad_norm_` has them; 0 for a unit
            whose exit sat the step out.
        """
        shared_norm = clip_grad_norm_(self._shared, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._is_open = False
        norms, self._norms = self._norms, {}
        num_units = len(self._local.units)
        per_unit = [norms.get(index, torch.zeros_like(shared_norm)) for index in range(num_units)]
        return torch.stack([norm.to(shared_norm.device) for norm in (*per_unit, shared_norm)])


def left_out(optimizer: torch.optim.Optimizer, local: LocalModel) -> list[str]:
    """Names of the parameters that require a gradient and are not in the optimiser."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [name for name, p in local.named_parameters() if p.requires_grad and id(p) not in stepped]


def _check_has_all(optimizer: torch.optim.Optimizer, local: LocalModel) -> None:
    missing = left_out(optimizer, local)
    if missing:
        raise ValueError(
            f"optimizer must hold every parameter of the attached model that requires a gradient, but {len(missing)} "
            f"are not in it, the first is {missing[0]}; pass local.parameters(), or freeze what is not to be trained "
            f"with requires_grad_(False)"
        )
