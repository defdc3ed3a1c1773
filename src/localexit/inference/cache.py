"""Keys and values of one text, of which every block may have read another number of tokens."""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache


class TextCache(DynamicCache):
    """A cache whose length is that of the blocks that run next.

    `transformers` asks a cache once per forward how many tokens it holds, and takes the answer of one layer for all.
    Here the first blocks may have read more than the deeper ones, so the answer is set from outside.

    An exit with a block of its own has another cache for that block, a branch of this one.

    Attributes:
        length: tokens that the blocks of the next forward have read.
    """

    def __init__(self) -> None:
        # Without a configuration every layer keeps all tokens, those with a sliding window too: so it can be shortened.
        super().__init__()
        self.length = 0
        self._branches: dict[int, TextCache] = {}

    def branch(self, exit_index: int) -> TextCache:
        """The cache of the block that belongs to an exit alone; it has read what the exit's unit has read."""
        branch = self._branches.setdefault(exit_index, TextCache())
        branch.length = self.length
        return branch

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Tokens before those of the running forward."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Position of the running forward's first token."""
        return self.length

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        """How many keys the queries see, and the position of the first one."""
        # The first versions of transformers 5 give the positions of the queries in place of their number.
        num_queries = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.length + num_queries, 0

    def truncate(self, length: int) -> None:
        """Forget what comes after the first `length` tokens."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
        for branch in self._branches.values():
            branch.truncate(length)
