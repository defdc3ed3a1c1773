"""Parameters that are spread over ranks: blocks by `fully_shard`, one by one, and the unembedding by rows."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from localexit import _checks


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


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, put together from all ranks; any other tensor as it is."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


@contextmanager
def replicating() -> Iterator[None]:
    """Plain tensors inside that meet a `DTensor` in an operation are taken as the same on all its ranks."""
    if "torch.distributed.tensor" not in sys.modules:
        yield
        return
    from torch.distributed.tensor.experimental import implicit_replication

    with implicit_replication():
        yield


def parameters_of_blocks(model: nn.Module) -> set[int]:
    """`id` of every parameter that `fully_shard` sees to."""
    return {id(parameter) for module in sharded_modules(model) for parameter in module.parameters()}


def reshard(modules: Iterable[Any]) -> None:
    """Give up the whole parameters of sharded modules, and put the sharded ones in their place.

    `fully_shard` keeps those of a block that was sharded by itself after a forward, for the backward to come. Where
    none comes, an optimiser step would leave them behind.
    """
    for module in modules:
        module.reshard()


def clip_grad_norm_(
    parameters: Iterable[nn.Parameter], max_norm: float, *, device: torch.device | None = None
) -> Tensor:
    """`nn.utils.clip_grad_norm_` for parameters of which some may be sharded: one norm over all of them, 0-dim.

    Args:
        parameters: those without a gradient are left out.
        max_norm: largest norm allowed.
        device: of the norm where there is no gradient at all; it is zero then.

    Raises:
        ValueError: `max_norm` is not positive; torch's own would turn the gradients round. Infinity does not clip.
    """
    _checks.positive("max_norm", max_norm, or_infinite=True)
    with_grad = [p for p in parameters if p.grad is not None]
    if not with_grad:
        return torch.zeros((), device=device)
    sharded: list[Any] = [p.grad for p in with_grad if is_sharded(p.grad)]
    if not sharded:
        return nn.utils.clip_grad_norm_(with_grad, max_norm)
    plain = [p.grad for p in with_grad if p.grad is not None and not is_sharded(p.grad)]
    # Those of one mesh together: the unembedding's ranks need not be those of the blocks.
    meshes: dict[Any, list[Any]] = {}
    for grad in sharded:
        meshes.setdefault(grad.device_mesh, []).append(grad)
    norms: list[Any] = [nn.utils.get_total_norm(grads) for grads in meshes.values()]
    norm = torch.linalg.vector_norm(
        torch.stack([*(norm.full_tensor() for norm in norms), nn.utils.get_total_norm(plain)])
    )
    # As torch does: a tiny summand, and no comparison that a GPU would have to wait for.
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([*plain, *map(shard_of, sharded)], factor)
    return norm
