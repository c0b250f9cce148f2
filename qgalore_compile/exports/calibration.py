"""Second moments of what linear layers are given, over batches of calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qgalore_compile.exports.tensors import identity

Batch: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""What a model is called with: one argument, positional ones, or named ones."""


@torch.no_grad()
def second_moments(
    model: nn.Module, layers: Sequence[tuple[str, nn.Linear]], batches: Iterable[Batch]
) -> dict[object, Tensor]:
    """Mean of x xᵀ over the inputs x of each layer, n × n in float32 on the layer's device, by the weight's identity.

    The model runs in evaluation mode, without gradients, and is in the modes that it was in afterwards.  Layers that
    share a weight share a moment.  All moments are kept at once: 4 n² bytes a layer of n inputs.

    Args:
        model: called once a batch.
        layers: names, for messages, and layers.
        batches: on the model's device.

    Raises:
        ValueError: there is no batch, a layer was not called, or its inputs are not finite.
    """
    sums: dict[object, Tensor] = {}
    rows: dict[object, int] = {}

    def observe(layer: nn.Linear) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given: Tensor = args[0] if args else kwargs["input"]
            x, key = given.detach().reshape(-1, given.shape[-1]).float(), identity(layer.weight)
            sums[key] = sums[key].addmm_(x.mT, x) if key in sums else x.mT @ x
            rows[key] = rows.get(key, 0) + len(x)

        return hook

    seen = 0
    hooks = [layer.register_forward_pre_hook(observe(layer), with_kwargs=True) for _, layer in layers]
    try:
        with _evaluating(model):
            for batch in batches:
                _call(model, batch)
                seen += 1
    finally:
        for each in hooks:
            each.remove()
    if not seen:
        raise ValueError("calibration has no batch; give some text, in batches that the model takes")
    for name, layer in layers:
        key = identity(layer.weight)
        if not rows.get(key):
            raise ValueError(
                f"{name} was not called by the calibration batches, so its inputs are unknown; "
                "give batches that reach it, or leave it out of targets"
            )
        if not bool(torch.isfinite(sums[key]).all()):
            raise ValueError(f"{name}: its inputs on the calibration batches hold NaN or Inf, or overflow float32")
    return {key: total / rows[key] for key, total in sums.items()}


def _call(model: nn.Module, batch: Batch) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
