"""What a computation makes, by size: how large a model may be tried without its memory, on tensors without numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made inside; views, and what is written in place, are not made."""

    num_bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and look at its results."""
        result = func(*args, **(kwargs or {}))
        given = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor) and _storage(each) not in given]
        self.num_bytes = max([self.num_bytes, *(tensor.nbytes for tensor in made)])
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
