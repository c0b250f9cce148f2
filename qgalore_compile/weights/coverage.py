"""What ``quantize_`` and ``param_groups`` took of a model, in one line, and a warning where it is little."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable

from torch import Tensor, nn

from qgalore_compile.weights.tensor import QuantizedWeight
from qgalore_compile.words import listed

logger = logging.getLogger("qgalore_compile")


class CoverageWarning(UserWarning):
    """Less than half of a model's trainable elements are projected."""


def int8_line(model: nn.Module) -> str:
    """``INT8: 14 weights, 69 % of the parameters``, or the format in its place; shared weights count once."""
    parameters = list(model.parameters())
    quantised = [parameter for parameter in parameters if isinstance(parameter, QuantizedWeight)]
    names = dict.fromkeys(parameter.storage_name for parameter in quantised) or {"INT8": None}
    return f"{', '.join(names)}: {_amount(quantised, parameters)} of the parameters"


def tell_projected(model: nn.Module, projected: list[Tensor], rank: int | None, reasons: list[str]) -> None:
    """Log what is projected, and warn where it is less than half of the trainable elements.

    Args:
        model: all of it.
        projected: trainable parameters of the projected group.
        rank: as it was asked for; where it reaches the smaller side a projection spares nothing and does not count.
        reasons: why layers that were asked for are not among them, a clause each.

    Warns:
        CoverageWarning: with the largest trainable parameters that are not projected, and the reasons.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # what is no rank is the optimizer's to refuse, in words
    whole = {id(p) for p in projected if isinstance(rank, int) and rank >= min(p.shape)}
    low = [p for p in projected if id(p) not in whole]
    how = "by all of their gradients" if rank is None else f"rank {rank}"
    line = f"projected: {_amount(low, trainable.values())} of the trainable elements, {how}"
    logger.info("%s; %s", int8_line(model), line)
    total, taken = (sum(p.numel() for p in each) for each in (trainable.values(), low))
    if total == 0:
        reasons = [*reasons, "no parameter of the model is trainable"]
    elif 2 * taken >= total:
        return
    full = [name for name, p in trainable.items() if id(p) in whole]
    if full:
        reasons = [
            *reasons,
            f"rank {rank} reaches the smaller side of {listed(full, 4)}, where projecting spares nothing",
        ]
    ids = {id(p) for p in projected}
    rest = sorted((name for name in trainable if id(trainable[name]) not in ids), key=lambda n: -trainable[n].numel())
    if rest:
        reasons = [*reasons, f"not projected are {listed([f'{n} {tuple(trainable[n].shape)}' for n in rest], 4)}"]
    warnings.warn(f"{line}; {'; '.join(reasons)}", CoverageWarning, stacklevel=3)


def _amount(part: Iterable[Tensor], whole: Iterable[Tensor]) -> str:
    part = list(part)
    elements, of = sum(p.numel() for p in part), sum(p.numel() for p in whole)
    return f"{len(part)} weights, {100 * elements / of if of else 0:.0f} %"
