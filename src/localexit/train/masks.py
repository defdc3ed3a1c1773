"""What masks of transformers ask about a batch, answered for steps that are recorded, where nothing may be asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import masking_utils

from localexit.train.errors import RunFailedError


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Refuse a model whose positions tell transformers of several sequences in a row: a recorded step cannot look.

    Raises:
        RunFailedError: inside, it does.
    """

    def checked(find: Callable[..., Any]) -> Callable[..., None]:
        def find_none(*args: Any) -> None:
            if find(*args) is not None:
                raise RunFailedError(
                    "cuda_graph: expected one sequence in each row of a batch, got position ids that begin anew in the "
                    "middle; pass --no-cuda-graph"
                )

        return find_none

    with _replaced({"find_packed_sequence_indices": checked}):
        yield


@contextmanager
def masks_left_to_attention() -> Iterator[None]:
    """Let transformers leave causal masks to the attention where it may not look at numbers, as where it may.

    While a graph is recorded it may not. It would make a [B, T, T] mask, in case there are several sequences in a row,
    and attention with a mask takes other kernels, and longer. `one_sequence_a_row` has looked before.
    """
    with _replaced({"find_packed_sequence_indices": lambda _: _nothing, "is_tracing": lambda _: _nothing}):
        yield


def _nothing(*_args: Any) -> None:
    return None


@contextmanager
def _replaced(changes: Mapping[str, Callable[[Callable[..., Any]], Callable[..., Any]]]) -> Iterator[None]:
    """Functions of transformers' masks made into others; versions have not all of them."""
    before = {name: getattr(masking_utils, name) for name in changes if hasattr(masking_utils, name)}
    for name, function in before.items():
        setattr(masking_utils, name, changes[name](function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(masking_utils, name, function)
