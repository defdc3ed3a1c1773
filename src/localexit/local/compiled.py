"""Units compiled module by module: what happens at an exit stays outside of the compiled graphs."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from localexit.local.model import LocalModel, check_attached


def compile_units(local: LocalModel, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile what units are trained through: the blocks, and the exits' norms and bodies, each by itself.

    Only training is compiled: in eval mode and without gradients every module runs as it did, bitwise. Modules of one
    class and shape share their compilations, most often two: for inputs with a graph, and without. What parameters are
    called and what is saved stay as they are; `LocalModel.remove()` leaves the modules compiled.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from localexit import attach, compile_units
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=12, n_layer=3, n_head=2))
    >>> local = attach(model.train(), backward="stream")
    >>> compile_units(local, backend="eager")
    >>> optimizer = torch.optim.AdamW(local.parameters())

    Args:
        local: the model with its exits, on the device where it is trained.
        backend: of `torch.compile`.

    Raises:
        ValueError: the backend does not work on this machine (it needs a C++ compiler, on a GPU Triton too), or the
            forward of a module has been replaced, by an earlier call of this function for one.
        TypeError: `local` is not attached.
    """
    check_attached(local)
    _check_works(backend, local.unembedding.weight.device)
    modules = dict.fromkeys(map(_inner, (*local.blocks, *(m for exit_ in local.exits for m in exit_.modules))))
    for module in modules:
        if "forward" in module.__dict__:
            raise ValueError(
                f"compile: expected modules with the forward of their class, got a {type(module).__name__} whose "
                f"forward was replaced (compiled already?); compile once, and before anything else replaces it"
            )
    # One function for all modules of a class, so that those that are alike share what is compiled.
    forwards = {kind: _CompiledInTraining(kind.forward, backend) for kind in {type(module) for module in modules}}
    for module in modules:
        # A bound method, so that the deep copy of a module has its own.
        module.__dict__["forward"] = types.MethodType(forwards[type(module)], module)


class _CompiledInTraining:
    """The forward of a class of modules, compiled where it makes a graph for a backward.

    Not a function of its own for each module, and not compiled elsewhere: with a cache of keys and values every length
    and every block would be compiled anew.
    """

    def __init__(self, forward: Callable[..., Any], backend: str | Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)
        self._eager, self._compiled = forward, torch.compile(forward, backend=backend)

    def __call__(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        is_training = module.training and torch.is_grad_enabled()
        return (self._compiled if is_training else self._eager)(module, *args, **kwargs)


def _inner(module: nn.Module) -> nn.Module:
    """The module itself, without a wrapper whose forward communicates."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def _check_works(backend: str | Callable[..., Any], device: torch.device) -> None:
    try:
        torch.compile(_double, backend=backend)(torch.ones(1, device=device))
    except RuntimeError as error:
        # The first line says which backend failed, the second one why.
        reason = " ".join(str(error).strip().splitlines()[:2])
        raise ValueError(
            f"compile: expected a platform where torch.compile works on {device.type!r}, got: {reason}; install a C++ "
            f"compiler (on a GPU Triton, too), or leave compile out"
        ) from error


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return 2 * tensor
