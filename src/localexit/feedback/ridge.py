"""The linear algebra behind logit anchors and the mirror's delta rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Apart:
    """Other measurements of the span of some hidden states: differences orthogonal to their mean, and the mean.

    All are linear combinations of the M rows given, the same ones of hidden states and of logits.

    Attributes:
        hidden: [M, D], M - 1 differences and then the mean, as long as the others together.
        axis: [M], the rows' reflection is along it.
        scaled: [M], `axis / |axis|²`.
        along: [M - 1], how much of the mean is taken from each difference.
        length: 0-dim, of the mean.
        rest: 0-dim, what it becomes.
    """

    hidden: Tensor
    axis: Tensor
    scaled: Tensor
    along: Tensor
    length: Tensor
    rest: Tensor

    def logits(self, logits: Tensor) -> Tensor:
        """What W would make of `hidden`, from what it made [M, n] of the rows given; any n columns of the logits."""
        logits = torch.addr(logits, self.scaled, self.axis @ logits, alpha=-2)
        mean = logits[-1] / self.length
        logits[:-1].addr_(self.along, mean, alpha=-1)
        torch.mul(mean, self.rest, out=logits[-1])
        return logits

    def summed(self, logits: Sequence[Tensor]) -> Tensor:
        """`axis @ torch.cat(logits)`: [n]."""
        parts = self.axis.split([len(part) for part in logits])
        total = parts[0] @ logits[0]
        for part, others in zip(parts[1:], logits[1:], strict=True):
            total = torch.addmv(total, others.T, part)
        return total


def apart_from_mean(hidden: Tensor) -> Apart:
    """Differences and mean of hidden [M, D], whose rows that do not count are zero.

    Hidden states have much in common: early in training all but a thousandth of their squared length. A ridge that is
    small against the length is large against the differences, and a product in bf16 rounds them away.
    """
    tiny = torch.finfo(hidden.dtype).tiny
    # What is shorter than this may be rounding errors of what is longer: made no longer, it has no weight.
    rounding = hidden.norm() * torch.finfo(hidden.dtype).eps ** 0.5
    is_counted = hidden.any(dim=1).to(hidden.dtype)
    # A reflection of the rows that takes the mean to the last place and leaves differences at the others.
    axis = is_counted / is_counted.norm().clamp_min(1)
    axis[-1].sub_(1)
    scaled = axis / axis.square().sum().clamp_min(tiny)
    hidden = torch.addr(hidden, scaled, axis @ hidden, alpha=-2)
    length = hidden[-1].norm().maximum(rounding).clamp_min(tiny)
    mean = hidden[-1] / length
    along = hidden[:-1] @ mean
    hidden[:-1].addr_(along, mean, alpha=-1)
    rest = hidden[:-1].norm().maximum(rounding)
    torch.mul(mean, rest, out=hidden[-1])
    return Apart(hidden=hidden, axis=axis, scaled=scaled, along=along, length=length, rest=rest)


def principal_axes(hidden: Tensor, rank: int) -> Tensor:
    """The directions that hold most of the rows' squared length, nearly: three steps of block power iteration.

    Args:
        hidden: [M, D], fp32 or fp64.
        rank: R, at most D.

    Returns:
        [D, R] with orthonormal columns.
    """
    spread = hidden.double().T @ hidden.double()
    # An eigendecomposition would make a GPU wait for its own failure check.
    axes = torch.linalg.qr(spread[:, :rank]).Q
    for _ in range(2):
        axes = torch.linalg.qr(spread @ axes).Q
    return axes.to(hidden.dtype)


def ridge_rows(hidden: Tensor, count: Tensor, ridge: float) -> Tensor:
    """`(H Hᵀ + λI)⁻¹ H` for H [M, D], with λ = `ridge` times the mean diagonal of `H Hᵀ` over the rows that count.

    Equal to `H (Hᵀ H + λI)⁻¹`; the smaller of the two systems is solved, by Cholesky. In fp64: its condition is up to
    M / `ridge`, which leaves fp32 no digits.

    Args:
        hidden: [M, D], fp32 or fp64; rows that do not count are zero.
        count: 0-dim, how many rows count.
        ridge: λ relative to the mean diagonal, at least 0.

    Returns:
        [M, D]; zero where `hidden` is all zero.
    """
    dtype, hidden = hidden.dtype, hidden.double()
    num_rows, width = hidden.shape
    mean_diagonal = hidden.square().sum() / count.clamp_min(1)
    # Without any row the system is 0 x = 0: any positive shift makes it solvable, with solution zero.
    shift = (ridge * mean_diagonal).clamp_min(torch.finfo(hidden.dtype).tiny)
    if num_rows <= width:
        return torch.cholesky_solve(hidden, _factor(hidden @ hidden.T, shift)).to(dtype)
    return torch.cholesky_solve(hidden.T, _factor(hidden.T @ hidden, shift)).T.to(dtype)


def _factor(gram: Tensor, shift: Tensor) -> Tensor:
    """The Cholesky factor of `gram + shift * I`; gram is overwritten."""
    gram.diagonal().add_(shift)
    # cholesky_ex: no copy to the host to look for a failure; a failed factor shows as NaN in the feedback.
    return torch.linalg.cholesky_ex(gram).L
