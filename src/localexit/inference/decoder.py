"""One text in a model whose blocks read it only as far as somebody asks: early exits, and exact catching up later."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from localexit import _values
from localexit.inference.architecture import longest_context, model_config
from localexit.inference.cache import TextCache
from localexit.local import LocalModel
from localexit.local.discover import TOLERANCE
from localexit.local.model import check_attached
from localexit.local.trace import accepts, cache_argument, random_ids


class Decoder:
    """A text, and how many of its tokens each unit has read.

    Asked for the logits of an exit, the units up to it read the tokens they have not read yet, in one batch; later
    units read nothing. What a unit hands on is kept until the next one reads it. So a token that left at an early exit
    costs the deeper blocks nothing until a later token needs them, and then they have exactly the keys and values of a
    model that always runs all of its blocks.

    An exit with a block of its own reads along with its unit from the first time that it is asked; if its unit has read
    before, the text is then read once more from the start.

    Args:
        local: the model, in eval mode.
        ids: the beginning of the text; what does not fit into `limit` is cut off at its front.
        limit: most tokens the model takes; by default what its configuration names.
        use_cache: keep keys and values. Off, every token is read again with each new one; so does a model whose forward
            takes no cache.

    Attributes:
        ids: the text.
        limit: most tokens the model takes.
        num_block_tokens: tokens read so far, counted once for each block that read them.

    Raises:
        TypeError: `local` is not attached, or `ids` are not integers.
    """

    def __init__(
        self, local: LocalModel, ids: Iterable[int], *, limit: int | None = None, use_cache: bool = True
    ) -> None:
        check_attached(local)
        self.local = local
        self.limit = limit or longest_context(model_config(local)) or sys.maxsize
        self.num_block_tokens = 0
        self._cache_argument = cache_argument(local.model) if use_cache else None
        self._takes_switch = accepts(local.model, "use_cache")
        self._cache: TextCache | None = None
        self._num_read: list[int] = []
        # Per unit the hidden states [1, n, D'] that the next unit has not read.
        self._waiting: list[list[Tensor]] = []
        # Exits with a block of their own that have been asked.
        self._reading: set[int] = set()
        self.restart(ids)

    @property
    def room(self) -> int:
        """How many tokens may still be added and read; negative when the text is too long to be read."""
        return self.limit - len(self.ids)

    def restart(self, ids: Iterable[int]) -> None:
        """Begin another text; a tensor of ids has one dimension."""
        tokens = ids.tolist() if isinstance(ids, Tensor) else ids
        self.ids = [_values.integer("ids", token) for token in tokens][-self.limit :]
        self._forget()

    def append(self, token: int) -> None:
        """Add a token to the text; nothing reads it yet."""
        self.ids.append(token)

    def truncate(self, length: int) -> None:
        """Take back all tokens but the first `length`."""
        del self.ids[length:]
        if self._cache is None:
            self._forget()
            return
        self._cache.truncate(length)
        for unit, num_read in enumerate(self._num_read):
            following = self._num_read[unit + 1] if unit + 1 < len(self._num_read) else num_read
            kept = max(min(num_read, length) - following, 0)
            self._waiting[unit] = [hidden[:, :kept] for hidden in _joined(self._waiting[unit])]
        self._num_read = [min(num_read, length) for num_read in self._num_read]

    def logits(self, exit_index: int, num_last: int = 1) -> Tensor:
        """Logits [num_last, V] that an exit gives for what follows the last tokens, among those it had not read yet.

        Args:
            exit_index: which exit; negative ones count from the last.
            num_last: how many tokens.

        Raises:
            ValueError: there is no such exit, or fewer than `num_last` tokens are new to it.
        """
        exit_index = self.local.exit_position(exit_index)
        if self.local.exits[exit_index].block is not None and exit_index not in self._reading:
            self._reading.add(exit_index)
            self._forget()
        hidden = self._read(exit_index)
        num_new = 0 if hidden is None else hidden.shape[1]
        if hidden is None or num_new < num_last:
            raise ValueError(
                f"num_last: expected at most the {num_new} tokens that are new to exit {exit_index}, got {num_last}; "
                f"ask once for all that are needed"
            )
        return self.local.logits_from(exit_index, hidden[:, -num_last:])[0]

    def _forget(self) -> None:
        num_units = self.local.num_exits
        self._cache = None if self._cache_argument is None else TextCache()
        self._num_read = [0] * num_units
        self._waiting = [[] for _ in range(num_units)]

    def _read(self, exit_index: int) -> Tensor | None:
        """What an exit reads, [1, n, D'], of the tokens that are new to it; None when none are."""
        if self._cache is None and self._num_read[0] < len(self.ids):
            self._forget()
        hidden, unit = None, 0
        while unit <= exit_index:
            last = unit
            while last < exit_index and self._num_read[last + 1] == self._num_read[unit]:
                last += 1
            if self._num_read[unit] < len(self.ids):
                hidden = self._run(unit, last)
            unit = last + 1
        return hidden

    def _run(self, first: int, last: int) -> Tensor | None:
        """Let units that have read equally far read the rest, in one forward; what the exit of the last one reads."""
        start = self._num_read[first]
        ids = torch.tensor([self.ids[start:]], device=self.local.unembedding.weight.device)
        before = _joined(self._waiting[first - 1])[0] if first else None
        reading = {last, *self._reading} if self.local.exits[last].block is None else self._reading
        states = self.local.run_units(first, last, ids, hidden=before, reading=reading, **self._inputs(start))
        if first:
            self._waiting[first - 1] = []
        if last + 1 < len(self._waiting):
            self._waiting[last].append(states.hidden)
        num_blocks = sum(len(unit.block_indices) for unit in self.local.units[first : last + 1])
        num_blocks += sum(first <= exit_index <= last for exit_index in self._reading)
        self.num_block_tokens += num_blocks * ids.shape[1]
        self._num_read[first : last + 1] = [len(self.ids)] * (last + 1 - first)
        return states.read

    def _inputs(self, start: int) -> dict[str, Any]:
        if self._cache is None:
            return {"use_cache": False} if self._takes_switch else {}
        self._cache.length = start
        return {str(self._cache_argument): self._cache, "use_cache": True}


def _joined(pieces: list[Tensor]) -> list[Tensor]:
    return [torch.cat(pieces, dim=1)] if pieces else []


def check_catching_up(local: LocalModel) -> None:
    """Verify on a few random tokens that units which read later give the logits of a model that reads at once.

    Raises:
        ValueError: they do not, or the model's blocks cannot be run by parts.
    """
    last = local.num_exits - 1
    if last == 0:
        return
    *ids, extra = random_ids(local.model, seed=0)[0].tolist()
    expected = Decoder(local, ids).logits(last, len(ids))
    try:
        found = _read_in_portions(local, ids, extra)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the model's blocks cannot read later than those before them ({error}); {_REMEDY}") from error
    difference = float((found - expected).abs().max() / expected.abs().max())
    if difference > TOLERANCE[expected.dtype]:
        raise ValueError(
            f"the model's blocks cannot read later than those before them: the logits then differ by {difference:.1e} "
            f"of the largest one; do blocks pass anything but the hidden on to others? {_REMEDY}"
        )


_REMEDY = "write with one exit alone, which needs no catching up"


def _read_in_portions(local: LocalModel, ids: list[int], extra: int) -> Tensor:
    """Logits [n, V] of the last exit, after exits that read at different times, and read something taken back."""
    last = local.num_exits - 1
    decoder = Decoder(local, [])
    found: list[Tensor] = []
    num_found = 0
    for position, token in enumerate(ids):
        if position % 2:
            decoder.append(extra)
            decoder.logits(position % last)
            decoder.truncate(position)
        decoder.append(token)
        decoder.logits(position % last)
        if position % 2 or position == len(ids) - 1:
            found.append(decoder.logits(last, position + 1 - num_found))
            num_found = position + 1
    return torch.cat(found)
