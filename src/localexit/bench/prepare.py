"""From a case to inputs and contenders."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .contenders import Contender, product_contenders, rule_contenders
from .inputs import Inputs, make_inputs
from .peers import original_contenders, peer_contenders
from .plans import Case


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A case with its inputs: contenders by name, and why some are not there."""

    inputs: Inputs
    contenders: dict[str, Contender]
    not_available: dict[str, str]


def prepare(case: Case, *, dtype: torch.dtype, device: torch.device) -> Prepared:
    """Make inputs and contenders."""
    inputs = make_inputs(case.shape, dtype=dtype, device=device)
    found, reasons = peer_contenders(case.peers, device)
    everything = [
        *rule_contenders(case.plans, inputs),
        *product_contenders(),
        *found,
        *original_contenders(case.original, inputs),
    ]
    return Prepared(inputs=inputs, contenders={c.name: c for c in everything}, not_available=reasons)
