"""What rounding can do to a step: the same step in eager, its results off by their rounding.

A compiled step takes sums in another order, keeps float32 where eager rounds to bfloat16, and has its own ``exp``.
Each is an error of the dtype's rounding, at any operation, and no formula says what becomes of it ten layers and one
Adam later.  So :class:`Perturbed` makes such errors at random, and how far a step moves under them is seen.

Products and sums get them at their operands too: where terms cancel, an error is small beside the terms and not beside
the sum, and a zero whose terms are zero stays one.  What computes nothing (views, copies, selections, clamps, whole
numbers) stays exact, so counts, masks and indices do.  Random numbers come from a generator of the mode's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qgalore_compile._torch import TorchDispatchMode

__all__ = ["AMPLITUDE", "PRODUCTS", "Perturbed", "Products"]

AMPLITUDE = {torch.float64: 8.0, torch.float32: 8.0, torch.float16: 2.0, torch.bfloat16: 1.0}
"""Largest error in units of the dtype's eps, uniform.  A sum of n terms in another order is off by a few eps, so eight
for the wide types; an operation in the narrow ones rounds once, from sums in float32, by half an eps."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PRODUCTS = _words("""
    mm addmm bmm baddbmm mv addmv dot linear matmul convolution convolution_backward _scaled_mm _grouped_mm einsum
""")
_SUMS = _words("""
    sum mean var std norm softmax logsumexp cumsum prod loss avg_pool upsample fft embedding_dense_backward
    index_add scatter_add scatter_reduce index_put gelu silu grid_sampler linalg cdist rnn lstm gru refresh_
    sum_rows trace glu
""")
_EXACT = _words("""
    abs neg relu where clamp clamp_min clamp_max maximum minimum fmax fmin sign sgn floor ceil round trunc
    masked_fill threshold threshold_backward hardtanh hardtanh_backward clone copy positive heaviside copysign
    nan_to_num ldexp frexp frac real imag conj bernoulli native_dropout leaky_relu
""")


def _name(func: Any) -> str:
    return str(func._schema.name).partition("::")[2] if hasattr(func, "_schema") else str(func)


def _is_product(name: str) -> bool:
    return name in PRODUCTS or "attention" in name or "flex" in name


class Products(TorchDispatchMode):
    """Sees which dtypes products return.

    Attributes:
        dtypes: of the products so far, and float32.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes = {torch.float32}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_product(_name(func)):
            first = result[0] if isinstance(result, (tuple, list)) else result
            self.dtypes |= {first.dtype} if isinstance(first, Tensor) else set()
        return result


class Perturbed(TorchDispatchMode):
    """Every operation's results are off by their rounding.

    Args:
        seed: of the errors.
        products: the dtype whose rounding products of a wider one have: TF32's (float16 stands for it, their fractions
            have ten bits) or bfloat16's, where the compiled step takes them so; None for their own.
    """

    supports_higher_order_operators = True

    def __init__(self, seed: int, products: torch.dtype | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed, self._products = seed, products
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not hasattr(func, "_schema"):  # a higher-order operator
            return func(*args, **kwargs)
        name = _name(func)
        product, refreshes = _is_product(name), name == "refresh_"
        sums = product or (any(part in name for part in _SUMS) and "normal" not in name)
        if refreshes:  # R is its result, in its first argument
            result = func(*args, **kwargs)
            args[0].copy_(self._off(args[0], self._products))
            return result
        if func._schema.is_mutable or getattr(func, "is_view", False):
            return func(*args, **kwargs)
        if sums and "batch_norm" not in name:  # which writes running statistics into its operands
            args = [self._operand(x, product) for x in args]
        result = func(*args, **kwargs)
        narrows = name == "_to_copy" and isinstance(result, Tensor) and _narrower(result, args[0])
        if sums or narrows or (torch.Tag.pointwise in func.tags and name not in _EXACT and name != "_to_copy"):
            products = self._products if product else None
            if isinstance(result, (tuple, list)):
                return type(result)([self._off(x, products) for x in result])
            return self._off(result, products)
        return result

    def _operand(self, x: Any, product: bool) -> Any:
        """An operand of a sum: in half precision sums are float32's, and the operand's own rounding has been made."""
        if isinstance(x, (list, tuple)) and x and all(isinstance(each, Tensor) for each in x):
            return type(x)([self._operand(each, product) for each in x])
        if type(x) is not Tensor or x.dtype not in (torch.float32, torch.float64):
            return x
        return self._off(x, self._products if product else None)

    def _off(self, x: Any, products: torch.dtype | None = None) -> Any:
        """x with relative errors; as it is where it is no float or holds whole numbers, such as counts."""
        if not isinstance(x, Tensor) or x.dtype not in AMPLITUDE or not x.numel() or type(x) is not Tensor:
            return x
        if bool((x == x.round()).all()):
            return x
        if x.device not in self._generators:
            self._generators[x.device] = torch.Generator(x.device).manual_seed(self._seed)
        size = max(_size(x.dtype), _size(products) if products else 0.0)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        draw = torch.rand(x.shape, generator=self._generators[x.device], device=x.device, dtype=wide.dtype)
        return torch.where(x.isfinite(), wide * (1 + size * (2 * draw - 1)), wide).to(x.dtype)


def _size(dtype: torch.dtype) -> float:
    return AMPLITUDE[dtype] * torch.finfo(dtype).eps


def _narrower(result: Tensor, x: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and result.is_floating_point()
        and torch.finfo(result.dtype).eps > torch.finfo(x.dtype).eps
    )
