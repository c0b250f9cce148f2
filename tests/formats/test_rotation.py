"""The randomised Hadamard rotation, against the dense matrix."""

from __future__ import annotations

import math

import pytest
import torch
from formats_support import grouped
from torch import Tensor

from qgalore_compile.formats import FormatError
from qgalore_compile.formats.rotation import is_size, rotated, signs

WIDTHS = pytest.mark.parametrize("width", [2, 4, 32, 128, 256])


def hadamard(width: int) -> Tensor:
    """Sylvester's, by Kronecker products, in float64."""
    found, two = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    while len(found) < width:
        found = torch.kron(two, found)
    return found


@WIDTHS
def test_a_group_is_multiplied_by_signs_and_the_dense_matrix(width: int) -> None:
    x = torch.randn(3, 5, width)
    matrix = hadamard(width) * torch.tensor(signs(width), dtype=torch.float64) / math.sqrt(width)  # H D
    torch.testing.assert_close(rotated(x).double(), x.double() @ matrix.t(), rtol=0, atol=2e-6)
    torch.testing.assert_close(rotated(x, back=True).double(), x.double() @ matrix, rtol=0, atol=2e-6)


@WIDTHS
def test_it_is_orthogonal_and_back_is_its_inverse(width: int) -> None:
    matrix = rotated(torch.eye(width))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(width), rtol=0, atol=2e-6)
    x = torch.randn(7, width)
    torch.testing.assert_close(rotated(rotated(x), back=True), x, rtol=0, atol=3e-6)
    torch.testing.assert_close(rotated(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)


@WIDTHS
def test_an_outlier_is_spread_over_the_whole_group(width: int) -> None:
    x = torch.zeros(width)
    x[width // 2] = 100.0
    torch.testing.assert_close(rotated(x).abs(), torch.full((width,), 100 / math.sqrt(width)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [64, 256])
def test_signs_are_as_good_as_random_so_that_a_constant_group_is_no_outlier_afterwards(width: int) -> None:
    """Without them all of it would be one element, √W times as large."""
    assert set(signs(width)) == {-1.0, 1.0}
    assert abs(sum(signs(width))) < 3 * math.sqrt(width)
    assert float(rotated(torch.ones(width)).abs().max()) < 5


def test_an_outlier_costs_less_where_groups_are_rotated() -> None:
    x = torch.randn(16, 128)
    x[:, 3] = 50.0
    plain, spread = (
        float((form.decode(form.encode(x), x.shape) - x)[:, 4:].norm())
        for form in map(grouped, ("int4/128", "int4/128+rotated"))
    )
    assert spread < 0.8 * plain


@pytest.mark.parametrize("text", ["int8/32", "e4m3/32", "nf4/32"])
def test_short_groups_are_left_as_they_are(text: str) -> None:
    """A whole row shorter than a group, and the end of a longer one."""
    form, plain = grouped(f"{text}+rotated"), grouped(text)
    short, long = torch.randn(3, 17), torch.randn(3, 49)
    assert torch.equal(form.decode(form.encode(short), (3, 17)), plain.decode(plain.encode(short), (3, 17)))
    tail, other = (each.decode(each.encode(long), (3, 49))[:, 32:] for each in (form, plain))
    assert torch.equal(tail, other)
    whole, other = (each.codes(each.encode(long), (3, 49))[:, :32] for each in (form, plain))
    assert not torch.equal(whole, other)


@pytest.mark.parametrize("width", [0, 1, 3, 48, 96])
def test_other_sizes_have_none(width: int) -> None:
    assert not is_size(width)
    with pytest.raises(FormatError, match=r"power of two|at least 1"):
        grouped(f"int8/{width}+rotated")
