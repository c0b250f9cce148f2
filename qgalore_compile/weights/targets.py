"""Which linear layers of a model are meant, and which of those can be converted or projected."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from qgalore_compile._torch import is_traceable_wrapper_subclass
from qgalore_compile.weights.tensor import QuantizedWeight

Targets = str | re.Pattern[str] | Iterable[str] | Callable[[str, nn.Linear], bool]
"""What is turned into INT8 or projected: name endings, a regular expression, or ``predicate(name, linear)``."""

BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a LLaMA block: those that Q-GaLore keeps in INT8 and projects."""


def select_linears(model: nn.Module, targets: Targets | None = None) -> list[tuple[str, nn.Linear]]:
    """The linear layers that ``targets`` names, in the model's order.

    Args:
        model: any module.
        targets: None for the linear layers of the blocks: those inside an ``nn.ModuleList`` or ``nn.Sequential``,
            so not the head, and without adapters (what stands beside the ``base_layer`` of a wrapped layer); a name,
            or several, matched against the last parts of a layer's dotted name; a compiled regular expression,
            searched in the whole name; or ``predicate(name, linear) -> bool``.

    Raises:
        ValueError: no layer matches, or one of the names matches none.
    """
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if targets is None:
        chosen = [(name, linear) for name, linear in linears if _in_a_block(model, name)]
    elif callable(targets):
        chosen = [(name, linear) for name, linear in linears if targets(name, linear)]
    elif isinstance(targets, re.Pattern):
        chosen = [(name, linear) for name, linear in linears if targets.search(name)]
    else:
        names = [targets] if isinstance(targets, str) else list(targets)
        for wanted in names:
            if not any(_ends_with(name, wanted) for name, _ in linears):
                raise ValueError(_no_match(model, f"{wanted!r} names none", linears))
        chosen = [(name, linear) for name, linear in linears if any(_ends_with(name, wanted) for wanted in names)]
    if not chosen:
        raise ValueError(_no_match(model, f"targets={targets!r} select none", linears))
    return chosen


def obstacle(linear: nn.Linear) -> str | None:
    """Why the layer's weight can be neither converted nor projected; None if it can."""
    weight = linear._parameters.get("weight")
    if weight is None:
        parts = [name for name, _ in linear.named_parameters() if "weight" in name]
        return (
            f"its weight is parametrised, computed from {', '.join(parts) or 'other tensors'} (weight_norm, "
            "spectral_norm, pruning); remove the parametrisation first, or leave the layer out of targets"
        )
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialised yet; run the model once first"
    return foreign(weight) or (
        None if weight.is_floating_point() else f"its weight of dtype {weight.dtype} is quantised by another library"
    )


def foreign(parameter: Tensor) -> str | None:
    """Why a parameter of another library's kind is not supported; None for an ordinary or an INT8 one."""
    kind = type(parameter).__name__
    if kind == "DTensor" or kind == "FlatParameter" or getattr(parameter, "_fsdp_flattened", False):
        return (
            f"a {kind if kind != 'Parameter' else 'parameter of FSDP'} is sharded over processes (FSDP, tensor "
            "parallel), which is not supported: a shard's projector and INT8 groups would not be those of the whole "
            "weight; replicate the model (DistributedDataParallel) and keep its parameters whole"
        )
    if is_traceable_wrapper_subclass(parameter) and not isinstance(parameter, QuantizedWeight):
        return f"a {kind} is another library's tensor, which is not supported; use ordinary parameters"
    return None


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _in_a_block(model: nn.Module, name: str) -> bool:
    """Whether a ModuleList or Sequential *below* the model holds it; a model that is one itself has blocks only."""
    parts = name.split(".")
    ancestors = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    if any(
        "base_layer" in ancestor._modules and part != "base_layer"
        for ancestor, part in zip(ancestors, parts, strict=True)
    ):
        return False
    return any(isinstance(ancestor, (nn.ModuleList, nn.Sequential)) for ancestor in ancestors)


def _no_match(model: nn.Module, what: str, linears: list[tuple[str, nn.Linear]]) -> str:
    others = other_layers(model)
    if linears:
        have = ", ".join(name for name, _ in linears[:12]) + (", …" if len(linears) > 12 else "")
        if others:
            return f"{what} of the model's linear layers ({have}). {others}"
        return f"{what} of the model's linear layers ({have}); pass targets= with names that exist"
    if others:
        return f"{what} of the model's layers, for it has no nn.Linear. {others}"
    return f"{what} of the model's layers, for it has no nn.Linear: there is nothing to quantise or to project"


def other_layers(model: nn.Module) -> str:
    """A sentence on matrices that stand in other layers than nn.Linear and Embedding, "" where there are none."""
    kinds: dict[str, str] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or isinstance(module, (nn.Linear, nn.Embedding)) or parameter.dim() not in (2, 3):
                continue
            if min(parameter.shape) > 1 and not isinstance(module, nn.modules.conv._ConvNd):
                kinds.setdefault(f"{type(module).__name__}, {parameter.dim()}-D", f"{name}.{key}".lstrip("."))
    if not kinds:
        return ""
    seen = "; ".join(f"{first} ({kind})" for kind, first in list(kinds.items())[:4])
    return (
        f"Its other matrices are not in nn.Linear layers, so no targets reach them: {seen}. quantize_ leaves those in "
        "float; of two dimensions, they can be projected in a group of your own: "
        "QGaLoreAdamW([{'params': [...], 'rank': r}, {'params': the others}])"
    )
