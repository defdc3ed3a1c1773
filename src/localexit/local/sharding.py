"""Blocks that `fully_shard` has spread over ranks, one by one: what local training must know of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(value: object) -> bool:
    """Whether it is a `DTensor`, or a module that `fully_shard` was called on."""
    # Importing these is half of what importing localexit takes. Where nobody has, there is nothing of their kind.
    classes = [("torch.distributed.tensor", "DTensor"), ("torch.distributed.fsdp", "FSDPModule")]
    return any(
        isinstance(value, getattr(sys.modules[module], name)) for module, name in classes if module in sys.modules
    )


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules of a model that `fully_shard` was called on."""
    return [module for module in model.modules() if is_sharded(module)]


def shard_of(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, any other tensor as it is."""
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor


def reshard(modules: Iterable[Any]) -> None:
    """Give up the whole parameters of sharded modules, and put the sharded ones in their place.

    `fully_shard` keeps those of a block that was sharded by itself after a forward, for the backward to come. Where
    none comes, an optimiser step would leave them behind.
    """
    for module in modules:
        module.reshard()


def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """`nn.utils.clip_grad_norm_` for parameters of which some may be sharded: one norm over all of them, 0-dim."""
    with_grad = [p for p in parameters if p.grad is not None]
    sharded: list[Any] = [p.grad for p in with_grad if is_sharded(p.grad)]
    if not sharded:
        return nn.utils.clip_grad_norm_(with_grad, max_norm)
    whole = [p.grad for p in with_grad if p.grad is not None and not is_sharded(p.grad)]
    norm_of_sharded: Any = nn.utils.get_total_norm(sharded)
    norm = torch.linalg.vector_norm(torch.stack([norm_of_sharded.full_tensor(), nn.utils.get_total_norm(whole)]))
    # As torch does: a tiny summand, and no comparison that a GPU would have to wait for.
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([*whole, *map(shard_of, sharded)], factor)
    return norm
