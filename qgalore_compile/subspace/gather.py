"""Gathering a gradient over micro-batches, for a refresh that is due, and for nothing otherwise.

A compiled step with accumulation calls :func:`gather_gradient <_gather>` once a micro-batch.  When it is not the
parameter's turn it returns at once.  When it is, for a refresh or for a look at the captured energy, it adds the
micro-batch's product to a buffer that the first call of the step allocates, and that goes with the last reader.  So the
buffer exists for due parameters in due steps alone, and no micro-batch's factors are kept for the refresh.

The op's result must have one shape whether or not a buffer exists, or the graph could not be compiled once.  So the
result, the *carrier*, has no elements, and the buffer is the storage behind it: reference counting frees it, no
registry holds it, and nothing that a compiler does to a tensor without elements can touch it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qgalore_compile._ops import define
from qgalore_compile.subspace.scheduler import is_due
from qgalore_compile.subspace.timing import timed


def is_carrier(factor: Tensor) -> bool:
    """Whether a refresh op's factor is a carrier rather than a matrix."""
    return factor.dim() == 1


def gathered(carrier: Tensor, shape: Sequence[int]) -> Tensor:
    """The gathered gradient (m, n), float32.

    Raises:
        RuntimeError: nothing was gathered: the schedule was not due when the micro-batches ran.
    """
    m, n = shape
    if carrier.untyped_storage().nbytes() < 4 * m * n:
        raise RuntimeError(
            f"a refresh of a ({m}, {n}) weight is due, but no gradient was gathered for it: its schedule was changed "
            "between the backward and the update of one compiled step; change it between steps"
        )
    return _empty(carrier).set_(carrier.untyped_storage(), 0, (m, n), (n, 1))


def _empty(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=like.device)


def _gather(
    carried: Tensor | None, schedule: Tensor, grad_output: Tensor, inputs: Tensor, scale: Tensor | None
) -> Tensor:
    """A carrier of Σ dYᵀ X so far; ``carried`` is the one before, None at the first micro-batch."""
    carrier = _empty(grad_output)
    if not is_due(schedule):
        return carrier
    with timed(schedule, carrier.device):
        product = grad_output.to(torch.float32).t() @ inputs.to(torch.float32)
        if scale is not None:
            product *= scale
        if carried is not None:
            product += gathered(carried, product.shape)
        return carrier.set_(product.untyped_storage(), 0, (0,), (1,))


_gather_op = define(
    "gather_gradient(Tensor? carried, Tensor schedule, Tensor grad_output, Tensor inputs, Tensor? scale) -> Tensor",
    _gather,
    lambda carried, schedule, grad_output, inputs, scale: _empty(grad_output),
    torch.Tag.cudagraph_unsafe,  # it decides on the host
)
