"""Products in terms of bf16: what is left out stays below its bound, in both memory orders, also when compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from localexit.feedback.products import fitting, left_terms, right_terms, terms


def operands(num_rows: int, length: int, width: int) -> tuple[Tensor, Tensor]:
    """Numbers of all sizes, and among them those that two terms miss most of."""
    generator = torch.Generator().manual_seed(0)
    exponents, signs = torch.randn(2, num_rows + width, length, generator=generator)
    a, b = ((8 * exponents).exp2() * signs.sign()).split([num_rows, width])
    # Rounded down as far as can be, and what is left of them too.
    a[0] = b[0] = 1 + 2**-8 - 2**-17 - 2**-22
    return a, b.T.contiguous()


def product(a: Tensor, b: Tensor) -> Tensor:
    """As tensor cores multiply: products of bf16 numbers exactly, their sum in fp32."""
    return left_terms(a).float() @ right_terms(b).float()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("num_rows", "length", "width"), [(1, 1, 1), (3, 1, 2), (7, 33, 5)])
def test_what_is_left_out_is_below_its_bound(num_rows: int, length: int, width: int, is_transposed: bool) -> None:
    a, b = operands(num_rows, length, width)
    given = a.T.contiguous().T if is_transposed else a
    left, right = left_terms(given), right_terms(b)
    assert left.dtype == right.dtype == torch.bfloat16
    # A column by itself lies both ways.
    assert (left.T if is_transposed or length == 1 else left).is_contiguous()
    exact = a.double() @ b.double()
    error = (left.double() @ right.double() - exact).abs() / (a.double().abs() @ b.double().abs())
    assert float(error.max()) <= 2**-15
    # The bound is nearly reached: it says no more than what is needed.
    assert float(error[0, 0]) > 0.9 * 2**-15
    rounded = (a.bfloat16().double() @ b.bfloat16().double() - exact).abs() / (a.double().abs() @ b.double().abs())
    assert float(rounded[0, 0]) > 2**-8


def test_the_terms_lie_as_the_product_takes_them() -> None:
    """Each second term meets a first one, and the firsts each other once."""
    a, b = operands(7, 33, 5)
    (a_1, a_2), (b_1, b_2) = ((first, (x - first.float()).bfloat16()) for x in (a, b) for first in [x.bfloat16()])
    assert torch.equal(left_terms(a), torch.cat([a_2, a_1, a_1], 1))
    assert torch.equal(right_terms(b), torch.cat([b_1, b_2, b_1]))


def test_zeros_and_numbers_of_bf16_are_exact() -> None:
    a, b = (each.bfloat16().float() for each in operands(7, 33, 5))
    a[2], b[:, 1] = 0, 0
    assert torch.equal(left_terms(a).double() @ right_terms(b).double(), a.double() @ b.double())


def test_a_compiler_does_not_leave_out_the_second_term() -> None:
    a, b = operands(7, 33, 5)
    compiled = torch.compile(product, fullgraph=True)(a, b)
    assert torch.allclose(compiled, product(a, b), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("second", "dim"), [(0, 1), (1, 0)])
def test_the_operator_is_registered_as_torch_wants_it(second: int, dim: int) -> None:
    torch.library.opcheck(terms, (operands(3, 4, 5)[0], second, dim))


@pytest.mark.parametrize(
    ("num_bytes", "num"), [(0, 1), (11, 1), (12, 1), (24, 2), (127 * 12, 127), (128 * 12, 128), (400 * 12, 384)]
)
def test_rows_that_fit_are_whole_tiles_if_there_is_one(num_bytes: int, num: int) -> None:
    assert fitting(num_bytes, 12) == num
