"""What happens at the exits outside of training: predictions of every exit, and the hidden states after a unit."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from localexit.feedback.base import accumulate_dtype
from localexit.local.batch import IGNORE_INDEX
from localexit.local.bodies import BlockCall
from localexit.local.discover import capped, whole_linear
from localexit.local.exits import Exit
from localexit.local.steps import Step

# Most memory for logits at a time.
_CHUNK_BYTES = 64 * 2**20


class ExitPredictions(NamedTuple):
    """What every exit predicts on one batch.

    Attributes:
        token: int64 [num_exits, B, T], the most likely successor of each token.
        confidence: [num_exits, B, T], its probability.
        log_prob: [num_exits, B, T], log-probability of the right successor; 0 where none counts.
        target: int64 [B, T], the right successor, -100 where none counts.
        is_counted: bool [B, T], whether there is one.
    """

    token: Tensor
    confidence: Tensor
    log_prob: Tensor
    target: Tensor
    is_counted: Tensor


@dataclass(kw_only=True)
class PredictionStep(Step):
    """What every exit predicts, from chunks of logits.

    Attributes:
        target: int64 [B, T], as in training.
    """

    target: Tensor
    rows: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def at_exit(self, exit_: Exit, call: BlockCall) -> None:
        """Predict the successor of every token."""
        readout = self.settings.readout
        normed = readout.normed(exit_, exit_.reads(call)).flatten(0, -2)
        num_rows = max(1, _CHUNK_BYTES // (4 * readout.weight.shape[0]))
        chunks = zip(normed.split(num_rows), self.target.flatten().split(num_rows), strict=True)
        found = [self._predict(*chunk) for chunk in chunks]
        token, confidence, log_prob = (torch.cat(part).view(self.target.shape) for part in zip(*found, strict=True))
        self.rows.append((token, confidence, log_prob))

    def output(self) -> ExitPredictions:
        """The result, after the last exit."""
        token, confidence, log_prob = (torch.stack(part) for part in zip(*self.rows, strict=True))
        return ExitPredictions(
            token=token,
            confidence=confidence,
            log_prob=log_prob,
            target=self.target,
            is_counted=self.target != IGNORE_INDEX,
        )

    def _predict(self, normed: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        readout = self.settings.readout
        logits = whole_linear(normed, readout.weight, readout.bias())
        log_prob = torch.log_softmax(capped(logits, readout.softcap).to(accumulate_dtype(logits.dtype)), 1)
        best = log_prob.max(1)
        is_counted = target != IGNORE_INDEX
        of_target = log_prob.gather(1, torch.where(is_counted, target, 0)[:, None].long())[:, 0]
        return best.indices, best.values.exp(), torch.where(is_counted, of_target, 0)


class UnitStates(NamedTuple):
    """What a run of units makes of some tokens.

    Attributes:
        hidden: [B, T, D'], after the last of them, for the units that follow.
        read: [B, T, D'], what the exit there reads, for its logits; None when it was not asked for.
    """

    hidden: Tensor
    read: Tensor | None


@dataclass(kw_only=True)
class HiddenStep(Step):
    """The hidden states at one exit; the blocks after it are not run.

    Attributes:
        reading: the exits that read these tokens; one with a block of its own fills its part of a cache.
    """

    reading: Collection[int]
    states: UnitStates | None = None

    def at_exit(self, exit_: Exit, call: BlockCall) -> None:
        """Let the exit read, and keep the hidden at the wanted exit."""
        read = exit_.reads(call) if exit_.index in self.reading else None
        if exit_.index == self.last_exit:
            self.states = UnitStates(hidden=call.hidden, read=read)
