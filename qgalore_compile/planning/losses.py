"""How a model is called for its loss, and with layers that are computed again in the backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Any, Tensor, Tensor], Tensor]
"""From a model, tokens and targets, (B, T) int64 each, to a loss."""


def loss_of(model: nn.Module) -> Loss:
    """How this model gives a loss: by ``labels`` as in transformers, by a second argument as ``Llama``, or by logits.

    Raises:
        ValueError: its forward takes nothing that tokens could be.
    """
    parameters = inspect.signature(model.forward).parameters
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if "labels" in parameters:
        return _by_labels
    if not positional:
        raise ValueError(
            f"plan: {type(model).__name__}'s forward takes no tokens; pass loss=, a function of model, "
            "tokens and targets"
        )
    return _by_targets if len(positional) > 1 and "target" in positional[1].name else _of_logits


def _by_labels(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    loss: Tensor = model(tokens, labels=targets, use_cache=False).loss
    return loss


def _by_targets(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    loss: Tensor = model(tokens, targets)
    return loss


def _of_logits(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    logits: Tensor = model(tokens)
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


def checkpointed(layers: Sequence[nn.Module]) -> None:
    """Let each layer's forward be computed again in the backward, in place."""
    for layer in layers:
        layer.forward = partial(_again, layer.forward)


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import checkpoint  # loads Dynamo

    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
