"""`eval.json`, read into arrays: every exit on a text, and early exits by threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .records import Floats

EXIT_COLUMNS = ("num_blocks", "loss", "accuracy", "confidence", "calibration_error", "agreement")
EARLY_COLUMNS = ("threshold", "average_blocks", "loss", "accuracy", "agreement")


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What `localexit eval` measured.

    Attributes:
        data: name of the text.
        step: optimiser step of the model, or None.
        num_tokens: how many tokens were predicted.
        num_blocks: blocks of the model.
        exits: [L] columns by name, one row an exit: `EXIT_COLUMNS`.
        early: [T] columns by name, one row a threshold: `EARLY_COLUMNS`.
    """

    data: str
    step: int | None
    num_tokens: int
    num_blocks: int
    exits: Mapping[str, Floats]
    early: Mapping[str, Floats]


def evaluation_of(content: Mapping[str, Any], path: Path) -> Evaluation:
    """The evaluation in the content of the file `path`.

    Raises:
        ValueError: something is missing or no number; the message names it.
    """
    try:
        step = content["step"]
        return Evaluation(
            data=str(content["data"]),
            step=None if step is None else int(step),
            num_tokens=int(content["num_tokens"]),
            num_blocks=int(content["num_blocks"]),
            exits=_columns(content["exits"], EXIT_COLUMNS),
            early=_columns(content["early"], EARLY_COLUMNS),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not an evaluation ({error!r}); write it again with `localexit eval`") from None


def _columns(rows: Any, names: tuple[str, ...]) -> Mapping[str, Floats]:
    return {name: np.array([float(row[name]) for row in rows]) for name in names}
