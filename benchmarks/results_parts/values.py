"""Single numbers in the middle of a sentence."""

from __future__ import annotations

from results_parts.found import NOT_RUN, row_of
from results_parts.tables import told

_NOT_RUN = NOT_RUN.rstrip(".").lower()


def difference(setting: str, model: str, steps: str, method: str, *, to: str = "exact") -> str:
    """The last exit against exact local exits, or end-to-end backprop: `told`."""
    row = row_of(setting, model, int(steps), method)
    return (told(row.to_exact if to == "exact" else row.to_backprop) if row else "") or _NOT_RUN


def to_backprop(setting: str, model: str, steps: str, method: str) -> str:
    return difference(setting, model, steps, method, to="backprop")


def cosine(setting: str, model: str, steps: str, method: str) -> str:
    """The lowest cosine of a block's gradient with the exact one, over exits and diagnoses."""
    row = row_of(setting, model, int(steps), method)
    found = [
        exit_["gradient_cosine"]
        for cell in (row.cells if row else ())
        for one in cell.diagnostics
        for exit_ in one["exits"]
    ]
    return f"{min(found):.3f}" if found else _NOT_RUN
