"""Where a run computes, and in which precision."""

from __future__ import annotations

import torch


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" takes a GPU where there is one.

    Raises:
        ValueError: unknown, or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        # What follows a first sentence are lists of everything that torch was built with.
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device must be 'auto' or a device torch can use here, got {name!r}: {reason}") from error
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """fp32 or bf16; "auto" takes bf16 on a GPU that has it."""
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """A region whose products run in `precision`; plain for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)


def device_name(device: torch.device) -> str:
    """The device for people: `cuda (NVIDIA H100)`, `cpu (2 threads)`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"
