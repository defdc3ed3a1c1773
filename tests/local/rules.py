"""Feedback rules with a state worth testing."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from local.decoders import VOCAB, WIDTH
from localexit.feedback import Feedback, feedback_names, make_feedback
from localexit.local import LocalModel, attach

RULES = feedback_names()


def rule(name: str, *, width: int = WIDTH) -> Feedback:
    """A rule by name; a mirror gets rows as if it had learned something, where its zeros would feed nothing back."""
    made = make_feedback(name, width, VOCAB, seed=5)
    if "mirror" in name:
        made.rows.normal_(generator=torch.Generator().manual_seed(3))
    return made


def attached(
    model: nn.Module, name: str = "transport", *, dtype: torch.dtype = torch.float32, **options: object
) -> LocalModel:
    """attach() with a rule in `dtype`, without the warning about norms, which has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="feedback 'parallel", category=UserWarning)
        return attach(model, feedback=rule(name).to(dtype), **options)  # type: ignore[arg-type]
