"""Which exit writes the next token: always the same, the first one that is sure, or an early one under supervision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from localexit import _values
from localexit.inference.sampling import Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from localexit.inference.decoder import Decoder
    from localexit.local import LocalModel

# From logits [V] to a token id.
Choose = Callable[["Tensor"], int]


class Token(NamedTuple):
    """A token, and the exit whose choice it was.

    Attributes:
        id: the token.
        exit_index: the exit.
    """

    id: int
    exit_index: int


class Strategy(Protocol):
    """How the next tokens of a text come about."""

    def check(self, local: LocalModel, sampling: Sampling) -> None:
        """Refuse a model or a way of choosing that this does not go with.

        Raises:
            ValueError: so it is.
        """

    def write(self, decoder: Decoder, choose: Choose) -> list[Token]:
        """Add at least one token to a text that has room to be read, the last of them unread by any unit."""


@dataclass(frozen=True, kw_only=True)
class FixedExit:
    """One exit writes everything; the blocks after it are never run.

    Attributes:
        exit_index: which; negative ones count from the last.
    """

    exit_index: int = -1

    def __post_init__(self) -> None:
        _values.integer("exit_index", self.exit_index)

    def check(self, local: LocalModel, sampling: Sampling) -> None:  # noqa: ARG002
        """Refuse an exit that there is not."""
        local.exit_position(self.exit_index)

    def write(self, decoder: Decoder, choose: Choose) -> list[Token]:
        """Add one token."""
        exit_index = decoder.local.exit_position(self.exit_index)
        token = choose(decoder.logits(exit_index)[-1])
        decoder.append(token)
        return [Token(token, exit_index)]


@dataclass(frozen=True, kw_only=True)
class ConfidentExit:
    """The first exit that is sure writes the token; what no exit is sure of, the last one writes.

    An exit is sure when the probability of its most likely token, at temperature 1, reaches the threshold.

    Every exit that is asked costs its product with the unembedding and a forward of its own; fewer exits ask less.

    Attributes:
        threshold: in (0, 1].
        exits: which exits are asked; negative ones count from the last. None for all. The last one always writes what
            no other does.
    """

    threshold: float = 0.9
    exits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _values.fraction("threshold", self.threshold)
        if self.exits is None:
            return
        if not self.exits:
            raise ValueError("exits: expected at least one exit to ask, got none; pass some, or None for all")
        for exit_index in self.exits:
            _values.integer("exits", exit_index)

    def check(self, local: LocalModel, sampling: Sampling) -> None:  # noqa: ARG002
        """Refuse exits that there are not, and a model whose deeper blocks cannot catch up."""
        self._asked(local)
        _check_catching_up(local)

    def write(self, decoder: Decoder, choose: Choose) -> list[Token]:
        """Add one token."""
        *asked, last = self._asked(decoder.local)
        for exit_index in asked:
            logits = decoder.logits(exit_index)[-1]
            if float(logits.float().softmax(-1).max()) >= self.threshold:
                break
        else:
            exit_index, logits = last, decoder.logits(last)[-1]
        token = choose(logits)
        decoder.append(token)
        return [Token(token, exit_index)]

    def _asked(self, local: LocalModel) -> list[int]:
        """The exits that are asked in their order, and the last one."""
        exits = range(local.num_exits) if self.exits is None else map(local.exit_position, self.exits)
        return sorted({*exits, local.num_exits - 1})


@dataclass(frozen=True, kw_only=True)
class SelfSpeculative:
    """An early exit drafts tokens one by one; the last exit reads them in one forward and keeps what it agrees with.

    What is written is what the last exit alone would write greedily (up to ties and rounding: a product over several
    tokens is not bitwise that over one). The hidden states of the draft are kept, so the blocks up to the draft exit
    are not run again to verify it. The idea is that of Zhang et al. 2024 and LayerSkip (Elhoushi et al. 2024).

    Attributes:
        draft_exit: which exit drafts; negative ones count from the last.
        draft_tokens: most tokens it drafts at a time.
    """

    draft_exit: int = 0
    draft_tokens: int = 4

    def __post_init__(self) -> None:
        _values.integer("draft_exit", self.draft_exit)
        _values.count("draft_tokens", self.draft_tokens, minimum=1)

    def check(self, local: LocalModel, sampling: Sampling) -> None:
        """Refuse the last exit as the one that drafts, and any choice that is not greedy."""
        if local.exit_position(self.draft_exit) == local.num_exits - 1:
            raise ValueError(
                f"draft_exit: expected an exit before the last, got {self.draft_exit} of {local.num_exits}; the last "
                f"one verifies the draft"
            )
        if sampling.temperature != 0:
            raise ValueError(
                f"temperature: expected 0, got {sampling.temperature}; a draft is compared with the most likely token"
            )
        _check_catching_up(local)

    def write(self, decoder: Decoder, choose: Choose) -> list[Token]:
        """Add the part of a draft that the last exit agrees with, and one token of its own."""
        draft_exit, last = decoder.local.exit_position(self.draft_exit), decoder.local.num_exits - 1
        start = len(decoder.ids)
        for _ in range(min(self.draft_tokens, decoder.room)):
            decoder.append(choose(decoder.logits(draft_exit)[-1]))
        draft = decoder.ids[start:]
        verified = [choose(logits) for logits in decoder.logits(last, len(draft) + 1)]
        num_agreed = next((i for i, token in enumerate(draft) if token != verified[i]), len(draft))
        decoder.truncate(start + num_agreed)
        decoder.append(verified[num_agreed])
        return [*(Token(token, draft_exit) for token in draft[:num_agreed]), Token(verified[num_agreed], last)]


def _check_catching_up(local: LocalModel) -> None:
    # Imported here: options are checked before torch is.
    from localexit.inference.decoder import check_catching_up

    check_catching_up(local)
