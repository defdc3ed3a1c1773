"""How far a result may be from the truth: by a number in fp64, by a budget in lower precision.

A budget does not guess: plain PyTorch does the same in the same dtype, and twice its error plus one unit of rounding is
what a result may have.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(actual: Tensor, expected: Tensor, *, tolerance: float = 1e-10) -> None:
    """The largest difference is at most `tolerance` times the largest expected number; zeros are exactly zero."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    difference = float((actual.double() - expected.double()).abs().max())
    allowed = tolerance * float(expected.double().abs().max())
    assert difference <= allowed, f"differs by {difference:.3g}, {allowed:.3g} allowed"


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖ over the whole tensor."""
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def assert_within_budget(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the error of plain PyTorch in the same dtype, plus one rounding; zero rows are exactly zero.

    Args:
        actual: the result.
        plain: what plain PyTorch gives in the dtype that counts.
        exact: the truth, fp64.
    """
    assert actual.shape == plain.shape == exact.shape
    assert not actual[exact == 0].any(), "not zero where it must be"
    error, plain_error = relative_error(actual, exact), relative_error(plain, exact)
    budget = 2 * plain_error + torch.finfo(plain.dtype).eps
    assert error <= budget, f"off by {error:.3g}, budget {budget:.3g} (plain PyTorch: {plain_error:.3g})"
