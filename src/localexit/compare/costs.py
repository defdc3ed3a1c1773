"""What a method costs: FLOPs in matrix products, counted while they are made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from localexit.exits.backends import Backend
from localexit.exits.functional import exit_step
from localexit.feedback.base import accumulate_dtype
from localexit.local import LocalModel
from localexit.train.devices import autocast


def _addmm_flops(
    _total: Sequence[int], left: Sequence[int], right: Sequence[int], *_out_dtype: torch.dtype, **_options: Any
) -> int:
    return 2 * left[0] * left[1] * right[1]


# torch's counter does not know the first, and stumbles over the second with another dtype for the sum.
_ALSO_COUNTED: dict[Any, Any] = {torch.ops.aten.addmm_: _addmm_flops, torch.ops.aten.addmm: _addmm_flops}


@contextmanager
def counted_flops() -> Iterator[Callable[[], float]]:
    """Count the FLOPs of the matrix products inside; the yielded function tells how many.

    Compiled blocks run eagerly in there: the counter sees nothing of what is compiled.
    """
    counting = FlopCounterMode(display=False, custom_mapping=_ALSO_COUNTED)
    with torch.compiler.set_stance("force_eager"), counting as counter:
        yield lambda: float(counter.get_total_flops())


def exit_flops(
    local: LocalModel, num_tokens: int, precision: torch.dtype, *, num_exits: int = 1, backend: Backend = "torch"
) -> float:
    """FLOPs of one exit with `num_tokens` tokens, the rule's own learning included; on a copy of the rule.

    With `num_exits` the mean over those of a step, which may share what the first one measures.

    Plain PyTorch makes every product with an operator that is counted. "auto" counts what a training step's exits
    show of theirs: not what kernels of our own multiply.
    """
    rule = copy.deepcopy(local.feedback)
    rule.discard()
    weight = local.unembedding.weight.detach()
    hidden = torch.ones(num_tokens, weight.shape[1], device=weight.device)
    target = torch.zeros(num_tokens, dtype=torch.int64, device=weight.device)
    grad_weight = torch.zeros_like(weight, dtype=accumulate_dtype(weight.dtype))
    with counted_flops() as count:
        with autocast(weight.device, precision):
            for index in range(num_exits):
                exit_step(
                    hidden,
                    weight,
                    target,
                    feedback=rule,
                    grad_weight=grad_weight,
                    backend=backend,
                    exit_index=index,
                )
        rule.update()
    return count() / num_exits


def feedback_bytes(local: LocalModel) -> int:
    """Codes and state of the rule."""
    return sum(buffer.numel() * buffer.element_size() for buffer in local.feedback.buffers())
