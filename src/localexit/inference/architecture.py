"""What the configuration of a model says about texts; models without one have no limits and no end."""

from __future__ import annotations

from typing import Any

from localexit.local import LocalModel


def model_config(local: LocalModel) -> Any:
    """The configuration that `transformers` keeps with a model, or None."""
    return getattr(local.model, "config", None)


def longest_context(architecture: Any) -> int | None:
    """How many tokens a model takes at once; None where its configuration names no limit."""
    return getattr(architecture, "max_position_embeddings", None)


def end_ids(architecture: Any) -> list[int]:
    """The ids that end a text; configurations have one, several or none."""
    ids = getattr(architecture, "eos_token_id", None)
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
