"""Sizes of an exit: by name, or written NxDxV."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Tokens N, width D, vocabulary V."""

    num_tokens: int
    hidden_size: int
    vocab_size: int

    def __str__(self) -> str:
        return f"N={self.num_tokens} D={self.hidden_size} V={self.vocab_size}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """A name of `SHAPES`, or sizes.

        >>> Shape.parse("1024x256x8000")
        Shape(num_tokens=1024, hidden_size=256, vocab_size=8000)

        Raises:
            ValueError: neither.
        """
        if text in SHAPES:
            return SHAPES[text]
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
        if found is None:
            raise ValueError(f"shapes must be NxDxV or one of {', '.join(SHAPES)}, got {text!r}")
        num_tokens, hidden_size, vocab_size = map(int, found.groups())
        return cls(num_tokens=num_tokens, hidden_size=hidden_size, vocab_size=vocab_size)


# Named for the models that have them; "cpu" is what a CPU does in a second.
SHAPES = {
    "cpu": Shape(num_tokens=2048, hidden_size=512, vocab_size=32768),
    "llama": Shape(num_tokens=8192, hidden_size=4096, vocab_size=128256),
    "gemma": Shape(num_tokens=8192, hidden_size=2304, vocab_size=256000),
    "gpt2": Shape(num_tokens=16384, hidden_size=768, vocab_size=50304),
}
