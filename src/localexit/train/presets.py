"""Models by name: the presets' shapes, and what a name stands for. Without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Shape of a Llama-type decoder with random weights and an unembedding of its own.

    Attributes:
        num_blocks, hidden_size, num_heads: of the decoder; its MLP is 8/3 as wide as the hidden.
        vocab_size: tokens learned from the text unless the configuration says otherwise.
    """

    num_blocks: int
    hidden_size: int
    num_heads: int
    vocab_size: int


PRESETS: dict[str, Preset] = {
    "tiny": Preset(num_blocks=2, hidden_size=64, num_heads=2, vocab_size=512),
    "mini": Preset(num_blocks=3, hidden_size=128, num_heads=4, vocab_size=2048),
    "demo": Preset(num_blocks=4, hidden_size=192, num_heads=6, vocab_size=2048),
    "small-256": Preset(num_blocks=6, hidden_size=256, num_heads=4, vocab_size=16384),
    "small": Preset(num_blocks=6, hidden_size=512, num_heads=8, vocab_size=16384),
    "small-768": Preset(num_blocks=6, hidden_size=768, num_heads=12, vocab_size=16384),
    "small-1024": Preset(num_blocks=6, hidden_size=1024, num_heads=16, vocab_size=16384),
    "medium": Preset(num_blocks=12, hidden_size=768, num_heads=12, vocab_size=32768),
}


def resolve_name(name: str) -> str:
    """A model's name as everything that loads it takes it: a preset, the path of a folder without `~`, or a hub name.

    Raises:
        ValueError: it is none of them, or the folder of a run, whose model is in a folder of its own.
    """
    if name in PRESETS:
        return name
    # Not `Path.expanduser`, which raises for an unknown user.
    path = os.path.expanduser(name)  # noqa: PTH111
    if (Path(path) / "metrics.jsonl").is_file():
        raise ValueError(
            f"model: expected the folder of a model, got {name!r}, which is a run; its model is in "
            f"{str(Path(path) / 'model')!r}"
        )
    if Path(path).is_dir():
        return path
    if name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~")):
        return name
    raise ValueError(
        f"model must be a preset ({', '.join(PRESETS)}), a local folder or a hub name OWNER/NAME, got {name!r}; "
        f"check the spelling"
    )
