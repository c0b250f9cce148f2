"""``quantize_`` and ``dequantize_``: a model's linear weights between float and INT8, in place."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from qgalore_compile.formats import Format
from qgalore_compile.weights.coverage import int8_line
from qgalore_compile.weights.targets import Targets, obstacle, select_linears
from qgalore_compile.weights.tensor import NO_INT8_FORM, QuantizedWeight, has_int8_form, weight_format
from qgalore_compile.words import listed

logger = logging.getLogger("qgalore_compile")


def quantize_(
    model: nn.Module, *, group_size: int = 256, targets: Targets | None = None, format: Format | str | None = None
) -> nn.Module:
    """Turn matching ``nn.Linear`` weights into :class:`Int8Weight` parameters, in place, or into those of a format.

    What was taken is one line in the log (``qgalore_compile``, INFO); default targets that had to be left in float are
    a warning there.  From then on ``load_state_dict`` keeps the weights quantised, with ``assign=True`` too.

    Args:
        model: changed in place, one weight at a time, so that no second copy of the model is needed.
        group_size: elements of a row that share a scale and an offset, of INT8.
        targets: as for :func:`~qgalore_compile.weights.targets.select_linears`.
        format: another one than INT8, or its text: "e4m3", "nf4/64+double", "int4/128" (``docs/formats.md``).

    Returns:
        The model.

    Raises:
        ValueError: no format of weights; nothing matches; a layer that ``targets`` names has no weight of its own
            (weight_norm and other parametrisations), or one that is sharded or another library's; a weight holds NaN or
            Inf; a matching weight is shared with a module that is no matching linear layer (a tied embedding).  The
            model is then as it was.
    """
    if format is not None and group_size != 256:
        raise ValueError(f"group_size={group_size} and format={str(format)!r}: give the group in the format's text")
    form = weight_format(group_size if format is None else format)
    chosen, obstacles = _chosen(model, targets)
    _refuse_shared(model, chosen)
    converted: dict[int, nn.Parameter] = {}  # layers may share one weight: they share it afterwards too
    for name, linear in chosen:
        old = linear.weight
        if isinstance(old, QuantizedWeight):
            continue
        if id(old) not in converted:
            quantised = QuantizedWeight.from_float(old, form)
            quantised.label = f"{name}.weight"
            converted[id(old)] = nn.Parameter(quantised, requires_grad=old.requires_grad)
        linear.weight = converted[id(old)]
        if _quantise_assigned not in [
            getattr(hook, "hook", None) for hook in linear._load_state_dict_pre_hooks.values()
        ]:
            linear.register_load_state_dict_pre_hook(_quantise_assigned)
    logger.info("%s", int8_line(model))
    if obstacles:
        logger.warning("left in float: %s", "; ".join(obstacles))
    return model


def _chosen(model: nn.Module, targets: Targets | None) -> tuple[list[tuple[str, nn.Linear]], list[str]]:
    """(the layers to be quantised by name, why others among the targets are left in float)."""
    selected = select_linears(model, targets)
    chosen, obstacles = [], []
    for name, linear in selected:
        why = obstacle(linear)
        if why is None:
            chosen.append((name, linear))
        else:
            obstacles.append(f"{name}: {why}")
    if obstacles and (targets is not None or not chosen or "sharded" in " ".join(obstacles)):
        raise ValueError(listed(obstacles, between="; "))
    return chosen, obstacles


def _refuse_shared(model: nn.Module, chosen: list[tuple[str, nn.Linear]]) -> None:
    """Raise ValueError for a weight that another kind of module has too, and for one that cannot be quantised."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    names = {name for name, _ in chosen}
    for name, linear in chosen:
        others = [owner for owner in owners[id(linear.weight)] if owner not in names]
        if others:
            raise ValueError(
                f"{name}.weight of shape {tuple(linear.weight.shape)} is shared with {', '.join(others)}; "
                "leave it out of targets, or untie it"
            )
        if not has_int8_form(linear.weight):
            raise ValueError(f"{name}.weight of shape {tuple(linear.weight.shape)} {NO_INT8_FORM}")


def dequantize_(model: nn.Module) -> nn.Module:
    """Turn every :class:`Int8Weight` of a model into a float parameter of the dtype it dequantises to, in place.

    For merging adapters, averages, export, generation at full speed, and other libraries' optimizers.  Weights that
    were shared are shared afterwards, frozen ones stay frozen, and gradients stay.  The float parameters are new
    objects: an optimizer that was built before holds the INT8 ones and would train those, so build it anew; a warning
    in the log (``qgalore_compile``) says so where a weight requires grad.

    Args:
        model: changed in place, one weight at a time; one without INT8 weights stays as it is.

    Returns:
        The model.
    """
    converted: dict[int, nn.Parameter] = {}
    kept: list[QuantizedWeight] = []  # an identity must not be given to another object meanwhile
    for module in model.modules():
        for key, old in list(module._parameters.items()):
            if not isinstance(old, QuantizedWeight):
                continue
            if id(old) not in converted:
                kept.append(old)
                new = converted[id(old)] = nn.Parameter(old.dequantize(), requires_grad=old.requires_grad)
                new.grad = old.grad
            module._parameters[key] = converted[id(old)]
            for number, hook in list(module._load_state_dict_pre_hooks.items()):
                if getattr(hook, "hook", None) is _quantise_assigned:
                    del module._load_state_dict_pre_hooks[number]
    if any(old.requires_grad for old in kept):
        logger.warning(
            "dequantize_: %d trainable weights are new float parameters; an optimizer that holds the INT8 ones would "
            "go on training those and not the model: build it anew from the model", len(kept)
        )  # fmt: skip
    return model


def _quantise_assigned(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    """Before ``load_state_dict(assign=True)`` puts a float tensor in the place of an INT8 weight: quantise it."""
    if not local_metadata.get("assign_to_params_buffers", False):
        return
    for key, own in module.named_parameters(remove_duplicate=False):  # a parametrisation's original lies deeper
        given = state_dict.get(prefix + key)
        if isinstance(own, QuantizedWeight) and isinstance(given, Tensor) and not isinstance(given, QuantizedWeight):
            if given.shape != own.shape or not given.is_floating_point():
                continue  # load_state_dict's own error
            quantised = QuantizedWeight.from_float(given, own.format)
            quantised.label = own.label
            state_dict[prefix + key] = quantised
