"""Small helpers for the nested values that modules take and return: where the hidden is, and how to detach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def first_tensor(value: Any, *, what: str) -> Tensor:
    """The hidden in what a module returned: the tensor itself, or the first element of a tuple or list.

    Args:
        value: the module's output.
        what: name of the module, for the message.

    Raises:
        TypeError: there is no tensor at that place.
    """
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    if not isinstance(first, Tensor):
        raise TypeError(
            f"{what} returned {type(first).__name__}, expected a tensor, or a tuple whose first element is "
            f"the hidden; wrap the module so that it returns one"
        )
    return first


def replace_tensors(value: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor t replaced by `replace(t)`.

    Lists and dicts are changed in place: blocks hand state to later blocks through them (a dict of shared keys and
    values, for one), and a copy would cut that connection.
    """
    if isinstance(value, Tensor):
        return replace(value)
    if isinstance(value, tuple):
        items = [replace_tensors(item, replace) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        value[:] = [replace_tensors(item, replace) for item in value]
    elif isinstance(value, dict):
        for key, item in value.items():
            value[key] = replace_tensors(item, replace)
    return value


def detach_tensor(tensor: Tensor) -> Tensor:
    """The tensor outside the graph; itself when it is not part of one."""
    return tensor.detach() if tensor.requires_grad else tensor


def tensors_requiring_grad(value: Any) -> list[Tensor]:
    """Every tensor in a nested value that is part of an autograd graph."""
    found: list[Tensor] = []

    def visit(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            found.append(tensor)
        return tensor

    replace_tensors(value, visit)
    return found
