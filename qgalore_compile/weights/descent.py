"""A step of descent: W - lr U - lr λ W, from what a weight is stored in to what is stored then."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qgalore_compile.composites import composite, empties, stay
from qgalore_compile.formats import Format, Stored, encode, rounding


def descended(
    parts: Sequence[Tensor],
    update: Tensor,
    lr: Tensor,
    decay: Tensor | None,
    noise: Tensor | None,
    ok: Tensor,
    form: Format | None,
) -> list[Tensor]:
    """What is to be stored: the weight after the step where ``ok``, else what there is.

    Args:
        parts: what the weight is stored in: in a format; or itself, alone.
        update: U, float32, of the weight's shape.
        lr, decay: 0-d, float32; decay is decoupled, and of the weight behind the update; None for none.
        noise: 16 random bits an element; None rounds to nearest.
        ok: 0-d bool.
        form: the weight's; None for a plain tensor.
    """
    given = (list(parts), update, lr, decay, noise, ok)
    if stay():
        return _descended_op(*given, None if form is None else form.text)  # type: ignore[no-any-return]
    return _descended(*given, form)


def _descended(
    parts: list[Tensor],
    update: Tensor,
    lr: Tensor,
    decay: Tensor | None,
    noise: Tensor | None,
    ok: Tensor,
    form: Format | None,
) -> list[Tensor]:
    weight = parts[0].to(torch.float32) if form is None else Stored(form, parts, update.shape).load()
    weight = weight - lr * update
    if decay is not None:
        weight = weight - lr * decay * weight
    fresh = [rounding.round_to(weight, parts[0].dtype, noise)] if form is None else encode(weight, form, noise)
    return [torch.where(ok, new, part) for new, part in zip(fresh, parts, strict=True)]


@composite(
    "descended(Tensor[] parts, Tensor update, Tensor lr, Tensor? decay, Tensor? noise, Tensor ok, str? format) "
    "-> Tensor[]",
    lambda parts, *_: empties(parts),
)
def _descended_op(
    parts: list[Tensor],
    update: Tensor,
    lr: Tensor,
    decay: Tensor | None,
    noise: Tensor | None,
    ok: Tensor,
    format: str | None,
) -> list[Tensor]:
    return _descended(parts, update, lr, decay, noise, ok, None if format is None else Format.parse(format))
