"""The one linear solve behind logit anchors and the mirror's delta rule."""

from __future__ import annotations

import torch
from torch import Tensor


def ridge_rows(hidden: Tensor, count: Tensor, ridge: float) -> Tensor:
    """`(H Hᵀ + λI)⁻¹ H` for H [M, D], with λ = `ridge` times the mean diagonal of `H Hᵀ` over the rows that count.

    Equal to `H (Hᵀ H + λI)⁻¹`; the smaller of the two systems is solved, by Cholesky.

    Args:
        hidden: [M, D], fp32 or fp64; rows that do not count are zero.
        count: 0-dim, how many rows count.
        ridge: λ relative to the mean diagonal, at least 0.

    Returns:
        [M, D]; zero where `hidden` is all zero.
    """
    num_rows, width = hidden.shape
    mean_diagonal = hidden.square().sum() / count.clamp_min(1)
    # Without any row the system is 0 x = 0: any positive shift makes it solvable, with solution zero.
    shift = torch.where(mean_diagonal > 0, ridge * mean_diagonal, 1.0)
    if num_rows <= width:
        return torch.cholesky_solve(hidden, _factor(hidden @ hidden.T, shift, hidden))
    return torch.cholesky_solve(hidden.T, _factor(hidden.T @ hidden, shift, hidden)).T


def _factor(gram: Tensor, shift: Tensor, like: Tensor) -> Tensor:
    identity = torch.eye(gram.shape[0], dtype=like.dtype, device=like.device)
    # cholesky_ex: no copy to the host to look for a failure; a failed factor shows as NaN in the feedback.
    return torch.linalg.cholesky_ex(gram + shift * identity).L
