"""How many operations an exit asks of the device: with small batches, launching them is what a GPU waits for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from localexit import exit_step, make_feedback

VOCAB, HIDDEN, TOKENS = 300, 24, 16
# What reads or makes a tensor without computing anything.
FREE = {
    "alias", "as_strided", "detach", "diagonal", "empty", "expand", "new_empty", "permute", "promote_types", "reshape",
    "select", "slice", "split", "squeeze", "squeeze_", "t", "transpose", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip


class Counted(TorchDispatchMode):
    """Names of the operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "most"), [("dense", 45), ("anchors", 143), ("mirror", 102)])
def test_an_exit_launches_no_more_than_it_did(name: str, most: int) -> None:
    """A limit that only a change of the exit reaches: who has to raise it says in docs/log.md what for."""
    rule = make_feedback(name, HIDDEN, VOCAB)
    hidden, weight = torch.randn(TOKENS, HIDDEN), torch.randn(VOCAB, HIDDEN)
    target, total = torch.randint(VOCAB, (TOKENS,)), torch.zeros(VOCAB, HIDDEN)
    with Counted() as counted:
        exit_step(hidden, weight, target, feedback=rule, grad_weight=total)
    assert len(counted.names) <= most, counted.names


@pytest.mark.parametrize(
    ("name", "most"),
    [("anchors", 18), ("dense", 18), ("sketch", 18), ("hybrid", 56), ("mirror", 26), ("transport", 17)],
)
def test_a_chunk_launches_no_more_than_it_did(name: str, most: int) -> None:
    """What a large batch adds in the memory preset, whose first pass has many chunks."""
    rule = make_feedback(name, HIDDEN, VOCAB)
    hidden, weight = torch.randn(TOKENS, HIDDEN), torch.randn(VOCAB, HIDDEN)
    target, numbers = torch.randint(VOCAB, (TOKENS,)), []
    for num_chunks in (2, 4):
        with Counted() as counted:
            chunk_bytes = TOKENS // num_chunks * VOCAB * 4
            exit_step(hidden, weight, target, feedback=rule, preset="memory", chunk_bytes=chunk_bytes)
        numbers.append(len(counted.names))
    assert numbers[1] - numbers[0] <= 2 * most, (numbers, counted.names)
