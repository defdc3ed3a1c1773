"""Which backend runs an exit: a named one runs or raises its reason, "auto" takes the first that supports the call."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from localexit import _checks
from localexit.exits.chunked import PLAIN, Stages
from localexit.exits.loss import LossOptions
from localexit.feedback.base import Feedback
from localexit.feedback.draws import HAS_TRITON

Backend = Literal["auto", "torch", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

# Beyond this a soft-capped logit could be further above its gold logit than the kernel's one pass allows.
_MOST_SOFTCAP = 30.0


def triton_refusal(
    *, device: torch.device, compute_dtype: torch.dtype, rule: Feedback, options: LossOptions
) -> str | None:
    """Why the Triton kernels do not run a call, or None when they do. Looks at nothing but its arguments."""
    if device.type != "cuda":
        return f"it needs a CUDA device and input is on {device}"
    if compute_dtype not in (torch.bfloat16, torch.float32):
        return f"it computes in bfloat16 or float32, and the products here are in {compute_dtype}"
    if rule.needs_logits:
        return f"feedback {rule.name!r} reads the raw logits, which the kernels overwrite"
    if options.label_smoothing and (rule.selects or options.softcap):
        return "label_smoothing together with softcap, or with a rule that selects tokens, is not in the kernels"
    if options.softcap is not None and options.softcap > _MOST_SOFTCAP:
        return f"softcap={options.softcap} is above {_MOST_SOFTCAP}, the most the one pass allows"
    if not HAS_TRITON:
        return "the package triton is not installed; install localexit[gpu]"
    return None


def choose_backend(
    backend: Backend, *, device: torch.device, compute_dtype: torch.dtype, rule: Feedback, options: LossOptions
) -> str:
    """The backend that runs: "torch" or "triton".

    Raises:
        ValueError: an unknown backend, or a named one that cannot run the call.
    """
    _checks.choice("backend", backend, BACKENDS)
    if backend == "torch":
        return "torch"
    refusal = triton_refusal(device=device, compute_dtype=compute_dtype, rule=rule, options=options)
    if refusal is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend='triton' does not run this call: {refusal}; pass backend='auto' or 'torch'")
    return "torch"


def stages_of(backend: str) -> Stages:
    """The steps of a backend that `choose_backend` returned."""
    if backend == "torch":
        return PLAIN
    # Triton is optional, and slow to import.
    from localexit.kernels.stages import TRITON

    return TRITON
