"""FLOPs of matrix products, those that a GPU makes with another dtype for the sum included."""

from __future__ import annotations

import torch

from localexit.compare.costs import counted_flops


def test_products_are_counted_in_every_form() -> None:
    left, right = (torch.empty(*shape, device="meta", dtype=torch.bfloat16) for shape in ((3, 4), (4, 5)))
    total = torch.empty(3, 5, device="meta")
    with counted_flops() as count:
        left @ right
        torch.mm(left, right, out_dtype=torch.float32)
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
        total.addmm_(left.float(), right.float())
    assert count() == 4 * 2 * 3 * 4 * 5
