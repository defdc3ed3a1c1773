"""Ways to train: gradients from end to end or unit by unit, and how they are stepped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from depth_parts.models import Decoder, Machine
from localexit import ExitSchedule, LocalModel, StepInBackward, attach, exit_cross_entropy, make_feedback

RULE = "anchors"
# Its optimisers are its own.
STEPPED_IN_HOOKS = "backprop, checkpoints, in backward"


def shifted(ids: Tensor) -> Tensor:
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)


def top_loss(hidden: Tensor, norm: nn.Module, weight: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of one exit by autograd."""
    logits = F.linear(norm(hidden), weight)
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())


def frugal_loss(model: Decoder) -> Callable[..., Tensor]:
    """The same loss and gradients without [N, V] logits: this library's exit with the exact gradient."""
    rule = make_feedback("transport", *reversed(model.unembed.weight.shape)).to(model.unembed.weight.device)

    def loss_of(hidden: Tensor, norm: nn.Module, weight: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = exit_cross_entropy(norm(hidden), weight, target, feedback=rule)
        return loss

    return loss_of


@dataclass(kw_only=True)
class Contender:
    """A way to train: makes all gradients of a step when called with token ids, and steps its optimiser."""

    model: Decoder
    gradients: Callable[[Tensor], object]
    optimizer: torch.optim.Optimizer | StepInBackward | None = None
    local: LocalModel | None = None

    def step(self, ids: Tensor) -> None:
        self.gradients(ids)
        if self.optimizer is not None:
            self.optimizer.step()
        if isinstance(self.optimizer, torch.optim.Optimizer):
            self.optimizer.zero_grad()
        if self.local is not None:
            self.local.update()


def backprop(
    machine: Machine,
    model: Decoder,
    *,
    at_every_block: bool = False,
    with_checkpoints: bool = False,
    is_frugal: bool = False,
) -> Callable[[Tensor], object]:
    """Gradients from end to end, of one loss at the top or of one at every block."""
    loss_of = torch.compile(top_loss, dynamic=False) if machine.is_fast else top_loss
    if is_frugal:
        loss_of = frugal_loss(model)

    def gradients(ids: Tensor) -> Tensor:
        with machine.autocast():
            hidden, target, losses = model.embed(ids), shifted(ids), []
            for block in model.blocks:
                hidden = checkpoint(block, hidden, use_reentrant=False) if with_checkpoints else block(hidden)
                if at_every_block:
                    losses.append(loss_of(hidden, model.norm, model.unembed.weight, target))
            losses = losses or [loss_of(hidden, model.norm, model.unembed.weight, target)]
            loss = torch.stack(losses).sum()
        loss.backward()
        return loss

    return gradients


def local_steps(machine: Machine, local: LocalModel) -> Callable[[Tensor], object]:
    """Gradients unit by unit, in the forward."""

    def gradients(ids: Tensor) -> object:
        with machine.autocast():
            return local(ids, ids)

    return gradients


def adamw(parameters: Iterable[nn.Parameter], *, has_state: bool = False) -> torch.optim.AdamW:
    """AdamW; with its state there before the first step, as that of a resumed run is, or made in it."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    for parameter in optimizer.param_groups[0]["params"] if has_state else ():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


@contextmanager
def contender(
    machine: Machine, model: Decoder, kind: str, *, optimizer: torch.optim.Optimizer | None = None, rule: str = RULE
) -> Iterator[Contender]:
    """A contender by its name, on a model that it leaves as it was but for what it learned."""
    if kind.startswith("backprop"):
        gradients = backprop(
            machine,
            model,
            at_every_block="every exit" in kind,
            with_checkpoints="checkpoints" in kind,
            is_frugal=kind == STEPPED_IN_HOOKS,
        )
        hooks = step_in_hooks(model) if kind == STEPPED_IN_HOOKS else []
        optimizer = None if hooks else optimizer
        try:
            yield Contender(model=model, gradients=gradients, optimizer=optimizer)
        finally:
            for hook in hooks:
                hook.remove()
        return
    num_blocks = len(model.blocks)
    options_of: dict[str, dict[str, Any]] = {
        "local, every block": {},
        "local, in backward": {},
        "local, one exit a step": {"schedule": ExitSchedule(exits_per_step=1)},
        "local, one exit's worth of tokens": {"schedule": ExitSchedule(token_share=1 / num_blocks)},
        "local, every:6": {"exits": f"every:{min(6, num_blocks)}"},
    }
    local = attach(model, feedback=rule, backward="stream", **options_of[kind])
    stepping = StepInBackward(local, optimizer) if "in backward" in kind and optimizer is not None else optimizer
    try:
        yield Contender(model=model, gradients=local_steps(machine, local), optimizer=stepping, local=local)
    finally:
        local.remove()


def step_in_hooks(model: Decoder) -> list[RemovableHandle]:
    """An AdamW for each block, which steps as soon as backprop has made the block's gradients, and then frees them.

    What is outside of the blocks has one more, for each parameter by itself. Their state is there from the start: made
    in the middle of a backward it would lie between activations, and the memory in between could not be used again.

    Returns:
        The hooks. A parameter whose hook holds it is never freed: remove them before the model goes.
    """
    outside = [p for module in (model.embed, model.norm, model.unembed) for p in module.parameters()]
    groups = (*(list(block.parameters()) for block in model.blocks), *([p] for p in outside))
    return [hook for group in groups for hook in _step_when_all_are_there(group)]


def _step_when_all_are_there(parameters: list[nn.Parameter]) -> list[RemovableHandle]:
    optimizer = adamw(parameters, has_state=True)

    def arrived(_: Tensor) -> None:
        if all(parameter.grad is not None for parameter in parameters):
            optimizer.step()
            optimizer.zero_grad()

    return [parameter.register_post_accumulate_grad_hook(arrived) for parameter in parameters]
