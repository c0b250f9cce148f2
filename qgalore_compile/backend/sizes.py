"""Sizes that vary from call to call: of batches, never of state.

Dynamo compiles a step for the sizes that it sees, and again when one differs, with a symbol in its place; from then on
any value of two and more is the same graph.  A size of 0 or 1 stays a number, as one that broadcasts: such a batch is a
graph of its own.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def mark_dynamic(batch: Any, dims: int | Sequence[int], *, min: int = 2, max: int | None = None) -> None:
    """Say before the first step which sizes of a batch will vary, so that there is one compilation ever.

    ``qg.mark_dynamic(tokens, (0, 1))`` for a batch and a length that vary, ``qg.mark_dynamic(tokens, 0)`` for a last
    short batch alone.  Only the tensors that the *first* call is given need it; marking every batch does no harm.
    Without it the first batch of another size costs one more compilation.

    It is torch's ``torch._dynamo.mark_dynamic``, for whole batches, and with what that leaves to an error in the middle
    of tracing, or to silence, refused here.  Dimensions are numbers, as there: which one is the batch and which the
    sequence differs from model to model, and accumulated micro-batches may be in front of both.

    Args:
        batch: a tensor, or lists, tuples and mappings of tensors (what a transformers tokenizer returns): all of them
            are marked.  What is no tensor in it is left alone.
        dims: dimensions, from 0, or from -1 backwards, that every tensor has.
        min, max: the least and the largest size that will come.  Dynamo takes 0 and 1 for constants, so ``min`` is at
            least 2; None for no largest.  Where they are given, a step that cannot take all sizes between them in one
            graph is an error of Dynamo's that names the place.

    Raises:
        ValueError: no tensor; a dimension that a tensor lacks; a size that is 0 or 1, or outside ``min`` … ``max``; a
            parameter or weight, whose sizes are constants.  Nothing is marked then.
    """
    if min < 2:
        raise ValueError(
            f"mark_dynamic: min must be at least 2, got {min}: Dynamo takes sizes 0 and 1 for constants; such a batch "
            "is compiled apart, once"
        )
    if max is not None and max < min:
        raise ValueError(f"mark_dynamic: max must be None or at least min={min}, got {max}")
    tensors = list(_tensors(batch))
    if not tensors:
        raise ValueError(f"mark_dynamic: no tensor in what was given, {type(batch).__name__}")
    wanted = [operator.index(dim) for dim in (dims if isinstance(dims, Iterable) else (dims,))]
    # all are checked before any is marked
    places = [[_place(tensor, dim, min, max) for dim in wanted] for tensor in tensors]
    from qgalore_compile._torch import mark_dynamic as mark  # here: it loads Dynamo

    # torch 2.13 fails on one bound without the other; without both it does not hold guards against them
    bounds = {} if (min, max) == (2, None) else {"min": min, "max": sys.maxsize if max is None else max}
    for tensor, found in zip(tensors, places, strict=True):
        for dim in found:
            mark(tensor, dim, **bounds)


def _tensors(batch: Any) -> Iterator[Tensor]:
    """Also of mappings that are no dicts (``BatchEncoding``), into which PyTorch's trees do not look."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for each in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(each)


def _place(tensor: Tensor, dim: int, least: int, most: int | None) -> int:
    """``dim`` counted from the front, where it can be marked."""
    shape = f"a tensor of shape {tuple(tensor.shape)}"
    if isinstance(tensor, nn.Parameter):
        raise ValueError(f"mark_dynamic: {shape} is a parameter, and sizes of weights are constants; mark the batch")
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(
            f"mark_dynamic: {shape} has no dimension {dim}; allowed are {-tensor.dim()} … {tensor.dim() - 1}"
            if tensor.dim()
            else f"mark_dynamic: {shape} has no dimension; take numbers out of what is marked"
        )
    dim %= tensor.dim()
    size = tensor.shape[dim]
    if size < 2:
        raise ValueError(
            f"mark_dynamic: {shape} has size {size} in dimension {dim}, which Dynamo takes for a constant; let the "
            "first batch have a size of 2 or more there, or leave that dimension out"
        )
    if size < least or (most is not None and size > most):
        raise ValueError(
            f"mark_dynamic: {shape} has size {size} in dimension {dim}, outside min={least} … max={most}; widen them"
        )
    return dim


def together(original: Any, tx: Any, name: str, tensor: Tensor) -> Any:
    """Around Dynamo's memory of which sizes of an input have varied: tokens' sizes vary together.

    Dynamo makes a symbol of the one size that differed, and compiles a third time where the batch differs today and the
    length tomorrow.  Integers are tokens and masks, whose sizes reach products as numbers of rows alone, so they all
    become symbols at once; of floats, a batch of images, say, one would not want width and height for symbols.
    """
    from qgalore_compile._torch import FrameStateSizeEntry, auto_dynamic

    entry = original(tx, name, tensor)
    count = tensor.dim()
    if not (tensor.is_floating_point() or tensor.is_complex()) and any(map(entry.is_size_dynamic, range(count))):
        entry |= FrameStateSizeEntry.make_size((auto_dynamic,) * count)  # type: ignore[arg-type]
    return entry
