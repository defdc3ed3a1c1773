"""Launching on the device that holds the tensors, which need not be the current one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")


def on_its_device(
    launch: Callable[Concatenate[Tensor, _Rest], _Result],
) -> Callable[Concatenate[Tensor, _Rest], _Result]:
    """`launch` with the device of its first argument as the current one, as PyTorch's own operations have it.

    Triton launches on the current device, whatever the pointers it gets.
    """

    @wraps(launch)
    def launched(first: Tensor, /, *args: _Rest.args, **kwargs: _Rest.kwargs) -> _Result:
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return launch(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return launch(first, *args, **kwargs)

    return launched
