"""How good every exit is on a text, and what leaving at the first one that is sure would cost and save."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localexit import _values
from localexit.inference.sampling import THRESHOLDS
from localexit.local import LocalModel
from localexit.local.predict import ExitPredictions

NUM_BINS = 15


@dataclass(frozen=True, kw_only=True)
class ExitQuality:
    """One exit on a text.

    Attributes:
        num_blocks: blocks that are run for it, one of its own included.
        loss: nats/token.
        accuracy: share of tokens predicted right.
        confidence: mean probability of the most likely token.
        calibration_error: expected calibration error, Σ over bins of confidence of (share of tokens) · |accuracy −
            confidence| in the bin, 15 bins of equal width (Guo et al. 2017).
        agreement: share of tokens for which its most likely token is the last exit's.
    """

    num_blocks: int
    loss: float
    accuracy: float
    confidence: float
    calibration_error: float
    agreement: float


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """Every token predicted by the first exit whose confidence reaches a threshold, else by the last one.

    The text so far is read in full by all blocks, as it is by a decoder whose skipped blocks catch up.

    Attributes:
        threshold: the threshold.
        average_blocks: mean number of blocks up to the exit that predicts, those of the exits asked included.
        loss, accuracy, agreement: as for an exit.
    """

    threshold: float
    average_blocks: float
    loss: float
    accuracy: float
    agreement: float


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What `measure_quality` found.

    Attributes:
        exits: first exit first.
        early: by threshold.
        num_tokens: how many tokens were predicted.
    """

    exits: tuple[ExitQuality, ...]
    early: tuple[EarlyExit, ...]
    num_tokens: int


def measure_quality(
    local: LocalModel, batches: Iterable[Tensor], *, thresholds: Sequence[float] = THRESHOLDS
) -> Quality:
    """Every exit, and early exits by threshold, on batches of token ids.

    Args:
        local: the model.
        batches: int64 [B, T] each; the first token of every row is not predicted.
        thresholds: of the confidence, in (0, 1].

    Raises:
        ValueError: a threshold is out of range, or there is no token to predict.
    """
    for threshold in thresholds:
        _values.fraction("thresholds", threshold)
    sums = _Sums(local, thresholds)
    for ids in batches:
        sums.add(local.predictions(ids, ids))
    return sums.means()


class _Sums:
    """Sums over tokens, in fp64: [num_exits] or [num_thresholds] each."""

    def __init__(self, local: LocalModel, thresholds: Sequence[float]) -> None:
        device = local.unembedding.weight.device
        self.thresholds = thresholds
        depth = torch.tensor([exit_.block_index + 1 for exit_ in local.exits], device=device)
        own = torch.tensor([exit_.num_own_blocks for exit_ in local.exits], device=device)
        self.num_blocks = depth + own
        # Who leaves at an exit has asked all exits before it.
        self.num_blocks_asked = depth + own.cumsum(0)
        self.num_tokens = 0
        self.exits = torch.zeros(4, local.num_exits, dtype=torch.float64, device=device)
        self.early = torch.zeros(4, len(thresholds), dtype=torch.float64, device=device)
        # Per exit and bin of confidence, the sum of (is right) − confidence.
        self.gaps = torch.zeros(local.num_exits * NUM_BINS, dtype=torch.float64, device=device)

    def add(self, found: ExitPredictions) -> None:
        """Add the tokens of a batch."""
        token, confidence, log_prob = (values[:, found.is_counted] for values in found[:3])  # [L, N] each
        is_right = token == found.target[found.is_counted]
        per_token = torch.stack([-log_prob, is_right, token == token[-1], confidence]).double()  # [4, L, N]
        self.num_tokens += token.shape[1]
        self.exits += per_token.sum(-1)
        self._add_bins(confidence, is_right)
        for column, threshold in enumerate(self.thresholds):
            is_sure = confidence >= threshold
            is_sure[-1] = True
            leaves_at = is_sure.int().argmax(0)  # [N], the first exit that is sure
            self.early[:3, column] += per_token[:3].gather(1, leaves_at.expand(3, 1, -1))[:, 0].sum(-1)
            self.early[3, column] += self.num_blocks_asked[leaves_at].sum()

    def means(self) -> Quality:
        """The sums over the number of tokens."""
        if self.num_tokens == 0:
            raise ValueError("batches: expected tokens to predict, got none; pass rows of at least two tokens")
        errors = self.gaps.view(-1, NUM_BINS).abs().sum(-1) / self.num_tokens
        exits = zip(self.num_blocks.tolist(), *self._mean(self.exits), errors.tolist(), strict=True)
        early = zip(self.thresholds, *self._mean(self.early), strict=True)
        return Quality(
            exits=tuple(
                ExitQuality(
                    num_blocks=num_blocks,
                    loss=loss,
                    accuracy=accuracy,
                    agreement=agreement,
                    confidence=confidence,
                    calibration_error=error,
                )
                for num_blocks, loss, accuracy, agreement, confidence, error in exits
            ),
            early=tuple(
                EarlyExit(
                    threshold=threshold,
                    loss=loss,
                    accuracy=accuracy,
                    agreement=agreement,
                    average_blocks=average_blocks,
                )
                for threshold, loss, accuracy, agreement, average_blocks in early
            ),
            num_tokens=self.num_tokens,
        )

    def _mean(self, sums: Tensor) -> list[list[float]]:
        means: list[list[float]] = (sums / self.num_tokens).tolist()
        return means

    def _add_bins(self, confidence: Tensor, is_right: Tensor) -> None:
        bins = (confidence * NUM_BINS).long().clamp_max(NUM_BINS - 1)
        bins += NUM_BINS * torch.arange(len(bins), device=bins.device)[:, None]
        gap = is_right.double() - confidence.double()
        self.gaps.index_add_(0, bins.flatten(), gap.flatten())
