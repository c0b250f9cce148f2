"""Parameter groups: ``param_groups``, and what a checked group means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qgalore_compile.optim import checks, settings
from qgalore_compile.optim.layout import parts_in
from qgalore_compile.subspace.refresh import Moments
from qgalore_compile.subspace.scheduler import Rule
from qgalore_compile.weights.coverage import tell_projected
from qgalore_compile.weights.targets import Targets, foreign, obstacle, other_layers, select_linears


def param_groups(
    model: nn.Module,
    *,
    rank: int | None,
    targets: Targets | None = None,
    plain: Mapping[str, Any] | None = None,
    **keys: Any,
) -> list[dict[str, Any]]:
    """Groups for :class:`~qgalore_compile.QGaLoreAdamW`, with parameter names.

    What they take is one line in the log (``qgalore_compile``, INFO).

    Args:
        model: its trainable parameters are taken; shared ones once.
        rank: of the projected group; None where its rule is to have the whole gradient.
        targets: the linear layers whose weights are projected, as for ``quantize_``: those of the blocks by default.
        plain: keys of what is not projected (embedding, head, norms) where they differ, as ``plain=dict(lr=0.005)``.
        **keys: any other group key; lr, betas, eps, weight_decay, moments and rounding go to every group, the rest to
            the projected one.

    Returns:
        The projected group, the group of all others and, where ``weight_decay`` is given, a third group of what is
        not decayed: biases, norms and other parameters of fewer than two dimensions.

    Raises:
        ValueError: no layer matches; a key is unknown; a parameter is sharded, or its gradient is sparse.

    Warns:
        CoverageWarning: nothing, or less than half of the trainable elements, is projected to a rank below a weight's
            smaller side; the message says why.
    """
    checks.check_keys({"rank": rank, **keys}, "param_groups")
    checks.check_keys(dict(plain or {}), "param_groups: plain")
    _check_model(model)
    projected_ids, reasons = _projected(model, targets)
    if not_linear := other_layers(model):
        reasons.append(not_linear)
    shared = settings.defaults(projected=False).keys() - {"seed"}
    common = {key: value for key, value in keys.items() if key in shared}
    common |= plain or {}
    projected: dict[str, Any] = {"params": [], "param_names": [], "rank": rank, **keys}
    others: dict[str, Any] = {"params": [], "param_names": [], **common}
    undecayed: dict[str, Any] = {"params": [], "param_names": [], **common, "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in projected_ids:
            group = projected
        elif parameter.dim() < 2 and "weight_decay" in common:
            group = undecayed
        else:
            group = others
        group["params"].append(parameter)
        group["param_names"].append(name)
    tell_projected(model, projected["params"], rank, reasons)
    return [group for group in (projected, others, undecayed) if group["params"]]


def _projected(model: nn.Module, targets: Targets | None) -> tuple[set[int], list[str]]:
    """Ids of the weights to project, and why others of ``targets`` are not or do not train."""
    chosen, frozen, reasons = set(), [], []
    for name, linear in select_linears(model, targets):
        if why := obstacle(linear):
            reasons.append(f"{name} is not projected: {why}")
            continue
        if not linear.weight.requires_grad:
            frozen.append(f"{name}.weight")
        chosen.add(id(linear.weight))
    if frozen:
        reasons.append(
            f"{len(frozen)} targets are frozen ({frozen[0]}{', …' if len(frozen) > 1 else ''}): they train with "
            "requires_grad_(True) before param_groups, and not as the base of adapters"
        )
    return chosen, reasons


def _check_model(model: nn.Module) -> None:
    """Raise ValueError for a trainable parameter that the optimizer would refuse, naming the layer."""
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            where = f"{name}.{key}".lstrip(".")
            if why := foreign(parameter):
                raise ValueError(f"param_groups: {where}: {why}")
            if getattr(module, "sparse", False) and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                raise ValueError(
                    f"param_groups: {where} has a sparse gradient (sparse=True), which is not supported; build "
                    "the layer with sparse=False"
                )


def check_gradients(group: dict[str, Any], position: int) -> None:
    """Raise ValueError for a gradient that is no dense tensor; nothing has been updated then."""
    for index, parameter in enumerate(group["params"]):
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise ValueError(
                f"{names_of(group, position)[index]} of shape {tuple(parameter.shape)} has a sparse gradient, which is "
                "not supported; build its layer with sparse=False"
            )


# -- what a checked group means -------------------------------------------------------------------------------------


def names_of(group: Mapping[str, Any], position: int) -> list[str]:
    """Names of the group's parameters for messages and reports: its ``param_names``, or their places."""
    places = [f"parameter {index} of group {position}" for index in range(len(group["params"]))]
    return list(group.get("param_names", places))


def refresh_rule(group: Mapping[str, Any]) -> Rule:
    """When the group's parameters are refreshed."""
    gap, max_gap = group["update_proj_gap"], group["max_gap"]
    rule = partial(Rule, gamma=group["gamma_proj"], min_gap=gap)
    if group["similarity"] == "official":
        return rule(official=True, threshold=group["cos_threshold"], max_gap=max_gap)
    threshold, shrink = group["similarity_threshold"], group["shrink_threshold"]
    rule = partial(rule, official=False, threshold=threshold, max_gap=max_gap or 16 * gap)
    if group["trigger"] == "energy":
        return rule(energy=group["energy_threshold"])
    return rule(shrink=threshold / 2 if shrink is None else shrink)


def moments_that_follow(group: Any, state: dict[str, Tensor], betas: Tensor) -> Moments | None:
    """What a refresh changes beside the projector; None where moments are kept.  ``betas``: float64 (2,)."""
    if group["moments_on_refresh"] == "keep":
        return None
    own = group.formats.moments
    return Moments(parts_in(state, own), state["step"], group["moments_on_refresh"], betas, own.text)


def layer_of(name: str) -> str:
    """The layer that a weight of this name belongs to: the innermost numbered module around the one that holds it.

    "model.layers.3" of "model.layers.3.mlp.up_proj.weight" and of "model.layers.3.mlp.fc.0.weight", whose 0 is the
    linear layer itself.  "" where there is none.  Innermost, so that a layer is rather too small (an expert of many)
    than too large (a stage of twenty blocks): what falls due together should be little.
    """
    modules = name.split(".")[:-2]
    while modules and not modules[-1].isdecimal():
        modules.pop()
    return ".".join(modules)


def layer_numbers(param_groups: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """For each group, the number of each projected parameter's layer, in the order in which layers come; of a group
    that is not projected none.

    Counted over groups, so that groups of the same gap share the steps of a round, and a layer whose weights are in
    several groups is one.  A parameter without a name, or outside of numbered modules, is a layer of its own.
    """
    numbers: dict[Any, int] = {}
    return [
        [
            numbers.setdefault(layer_of(name) or (position, index), len(numbers))
            for index, name in enumerate(names_of(group, position) if "rank" in group else ())
        ]
        for position, group in enumerate(param_groups)
    ]


def slot_of(group: Mapping[str, Any], layer: int) -> int:
    """The slot of the parameters of the optimizer's ``layer``-th layer, -1 where the group's refreshes are not
    staggered."""
    staggered = group["stagger"] and group["similarity"] != "official"
    return layer % group["update_proj_gap"] if staggered else -1
