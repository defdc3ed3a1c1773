"""Loss and accuracy of every exit on the validation text, and how good its feedback is there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from localexit.exits import DataParallel
from localexit.local import LocalModel
from localexit.measure import Diagnosis, Diagnostician
from localexit.train.batches import valid_batches
from localexit.train.config import DIAGNOSE_TOKENS
from localexit.train.devices import autocast
from localexit.train.tokens import TokenStream


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Every exit on the validation text, first exit first.

    Attributes:
        loss: nats/token.
        bits_per_byte: the same in a unit that does not depend on the vocabulary.
        accuracy: share of tokens predicted right.
        num_tokens: how many tokens were predicted.
    """

    loss: tuple[float, ...]
    bits_per_byte: tuple[float, ...]
    accuracy: tuple[float, ...]
    num_tokens: int


def validate(
    local: LocalModel,
    stream: TokenStream,
    *,
    batch_size: int,
    context: int,
    max_tokens: int,
    precision: torch.dtype = torch.float32,
    data_parallel: DataParallel | None = None,
) -> Validation:
    """Mean over at most `max_tokens` validation tokens; always the same ones.

    Args:
        local: the model.
        stream: validation tokens.
        batch_size: windows at a time.
        context: tokens a window; the first one of each is not predicted.
        max_tokens: cap, spread evenly over the text.
        precision: bf16 runs under autocast.
        data_parallel: ranks that share the tokens among them; the result is that of all.
    """
    device = local.unembedding.weight.device
    total = torch.zeros(2, local.num_exits, dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    rank, size = (0, 1) if data_parallel is None else (data_parallel.rank, data_parallel.size)
    for ids in valid_batches(
        stream, batch_size=batch_size, context=context, max_tokens=max_tokens, rank=rank, world_size=size
    ):
        with autocast(device, precision):
            batch = local.evaluate(ids.to(device), ids.to(device))
        total += batch.num_tokens * torch.stack([batch.loss, batch.accuracy]).double()
        count += batch.num_tokens
    if data_parallel is not None:
        total, count = data_parallel.total(total), data_parallel.total(count)
    loss, accuracy = (total / count).tolist()
    return Validation(
        loss=tuple(loss),
        bits_per_byte=tuple(stream.bits_per_byte(value) for value in loss),
        accuracy=tuple(accuracy),
        num_tokens=int(count),
    )


def diagnose_feedback(
    local: LocalModel,
    stream: TokenStream,
    *,
    batch_size: int,
    context: int,
    max_tokens: int = DIAGNOSE_TOKENS,
    precision: torch.dtype = torch.float32,
) -> Diagnosis:
    """Feedback against the exact gradient over at most `max_tokens` validation tokens; always the same ones.

    Args:
        local: the model, not a control.
        stream: validation tokens.
        batch_size: windows at a time; a training batch, for what a rule does with a whole batch.
        context: tokens a window.
        max_tokens: cap, spread evenly over the text.
        precision: bf16 runs under autocast.
    """
    device, diagnostician = local.unembedding.weight.device, Diagnostician(local)
    for ids in valid_batches(stream, batch_size=batch_size, context=context, max_tokens=max_tokens):
        with autocast(device, precision):
            diagnostician.add(ids.to(device))
    return diagnostician.result()
