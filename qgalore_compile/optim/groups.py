"""Parameter groups: GaLore's keys, their defaults and their checks, what they mean, and ``param_groups``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from qgalore_compile.rng import SEEDS
from qgalore_compile.subspace.finder import METHODS
from qgalore_compile.subspace.moments import ON_REFRESH, stored_moments
from qgalore_compile.subspace.moments import zeros as zero_moments
from qgalore_compile.subspace.projection import projector_shape, side_of
from qgalore_compile.subspace.refresh import SIMILARITIES, TRIGGERS, Moments, ProjectorFormat
from qgalore_compile.subspace.scheduler import Rule, Schedule
from qgalore_compile.weights.coverage import tell_projected
from qgalore_compile.weights.targets import Targets, foreign, obstacle, other_layers, select_linears

PROJECTION_DEFAULTS: dict[str, Any] = {
    # GaLore's and Q-GaLore's own names
    "update_proj_gap": 200,
    "scale": 0.25,
    "proj_type": "std",
    "quant": True,
    "quant_n_bit": 4,
    "quant_group_size": 256,
    "cos_threshold": 0.4,
    "gamma_proj": 2,
    "queue_size": 5,
    # this project's
    "refresh": "randomized",
    "power_iterations": 1,
    "moments_on_refresh": "keep",
    "similarity": "subspace",
    "similarity_threshold": 0.4,
    "max_gap": None,
    "shrink_threshold": None,
    "stagger": True,
    "trigger": "similarity",
    "energy_threshold": 0.8,
}
"""Keys of a projected group beside ``rank``.  ``power_iterations`` belongs to the range finder, with which "power"
starts too; ``cos_threshold`` to similarity "official"; ``similarity_threshold``, ``shrink_threshold`` (None: half of
the former), ``stagger`` and ``trigger`` to "subspace"; ``energy_threshold`` to trigger "energy".  ``max_gap`` None: no
cap for "official", 16 × update_proj_gap else.

``update_proj_gap`` set between steps acts on what follows: a higher one is the least gap from the next refresh on; a
lower one is what gaps shrink to, and where ``max_gap`` is None the cap falls with it.  A gap that stands is what the
parameter's own similarities have earned, so it stays; ``group.update(update_proj_gap=50, max_gap=50)`` makes it 50 from
the next refresh on.  The turn that stands comes when it was to come."""

MIN_8BIT_ELEMENTS = 4096
"""Parameters that are not projected and smaller than this keep float32 moments, as in bitsandbytes."""

PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES_ALLOWED = (
    "cannot be trained: updates are computed in float32, for parameters of float32, bfloat16, float16 and for "
    "Int8Weight; convert the model, e.g. model.to(torch.float32), before the optimizer is built, or leave it out"
)

ADAM_KEYS = ("lr", "betas", "eps", "weight_decay", "moments", "rounding")
SCHEDULERS_KEYS = ("initial_lr", "max_lr", "min_lr", "swa_lr")
"""What ``torch.optim``'s schedulers write into a group for themselves."""
_OTHER_KEYS = ("params", "param_names", *SCHEDULERS_KEYS, "seed")


def param_groups(model: nn.Module, *, rank: int, targets: Targets | None = None, **keys: Any) -> list[dict[str, Any]]:
    """Groups for :class:`~qgalore_compile.QGaLoreAdamW`, with parameter names.

    What they take is one line in the log (``qgalore_compile``, INFO).

    Args:
        model: its trainable parameters are taken; shared ones once.
        rank: of the projected group.
        targets: the linear layers whose weights are projected, as for ``quantize_``: those of the blocks by default.
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
    check_keys({"rank": rank, **keys}, "param_groups")
    _check_model(model)
    reasons = []
    projected_ids = set()
    frozen = []
    for name, linear in select_linears(model, targets):
        if why := obstacle(linear):
            reasons.append(f"{name} is not projected: {why}")
            continue
        if not linear.weight.requires_grad:
            frozen.append(f"{name}.weight")
        projected_ids.add(id(linear.weight))
    if frozen:
        reasons.append(f"{len(frozen)} targets are frozen ({frozen[0]}{', …' if len(frozen) > 1 else ''}): they train "
                       "with requires_grad_(True) before param_groups, and not as the base of adapters")  # fmt: skip
    if others := other_layers(model):
        reasons.append(others)
    common = {key: value for key, value in keys.items() if key in ADAM_KEYS}
    projected: dict[str, Any] = {"params": [], "param_names": [], "rank": rank, **keys}
    plain: dict[str, Any] = {"params": [], "param_names": [], **common}
    undecayed: dict[str, Any] = {"params": [], "param_names": [], **common, "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in projected_ids:
            group = projected
        elif parameter.dim() < 2 and "weight_decay" in keys:
            group = undecayed
        else:
            group = plain
        group["params"].append(parameter)
        group["param_names"].append(name)
    tell_projected(model, projected["params"], rank, reasons)
    return [group for group in (projected, plain, undecayed) if group["params"]]


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


def check_keys(group: dict[str, Any], where: str) -> None:
    """Raise ValueError for a key that no group knows, or that means nothing without ``rank``."""
    known = [*_OTHER_KEYS, *ADAM_KEYS, "rank", *PROJECTION_DEFAULTS]
    for key in group:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; known keys: {', '.join(known[len(_OTHER_KEYS) :])}")
        if key in PROJECTION_DEFAULTS and "rank" not in group:
            raise ValueError(
                f"{where}: {key!r} has a meaning only in a projected group; give it a rank, or drop {key!r}"
            )


def check_adam(group: dict[str, Any], names: Sequence[str], where: str) -> None:
    """Raise ValueError for a value of Adam's keys out of its range, or a parameter that cannot be trained."""
    if len(names) != len(group["params"]):
        raise ValueError(f"{where}: {len(names)} param_names for {len(group['params'])} parameters; give one each")
    _check_adam_values(group, where)
    for name, parameter in zip(names, group["params"], strict=True):
        if why := foreign(parameter):
            raise ValueError(f"{where}: {name}: {why}")
        if parameter.dtype not in PARAMETER_DTYPES:
            raise ValueError(f"{where}: {name} of dtype {parameter.dtype} {_DTYPES_ALLOWED}")
    if names:
        check_device(group, names, where, group["params"][0].device)


def check_values(group: dict[str, Any], where: str) -> None:
    """Raise ValueError for a value that cannot be; of parameters nothing is asked."""
    _check_adam_values(group, where)
    if "rank" in group:
        _check_projection_values(group, where)


def _check_adam_values(group: dict[str, Any], where: str) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"{where}: lr must be one number, got a tensor of shape {tuple(lr.shape)}")
    pair = group["betas"]
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(_is_number, pair)):
        raise ValueError(f"{where}: betas must be two numbers in [0, 1), got {group['betas']!r}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"{where}: both betas must be in [0, 1), got {group['betas']}")
    for key in ("lr", "eps", "weight_decay"):
        if not _is_number(group[key]) and not (key == "lr" and isinstance(group[key], Tensor)):
            raise ValueError(f"{where}: {key} must be a number, got {group[key]!r}")
        if not 0 <= float(group[key]) < math.inf:
            raise ValueError(f"{where}: {key} must not be negative, NaN or infinite, got {float(group[key])}")
    if not _is_int(group["seed"]) or group["seed"] not in SEEDS:
        raise ValueError(f"{where}: seed must be an integer that fits into 64 bits, got {group['seed']!r}")
    _one_of(group, "moments", ("8bit", "32bit"), where)
    _one_of(group, "rounding", ("stochastic", "nearest"), where)


def check_device(group: dict[str, Any], names: Sequence[str], where: str, device: torch.device) -> None:
    """Raise ValueError for a parameter on another device than ``device``, that of the optimizer's others."""
    for name, parameter in zip(names, group["params"], strict=True):
        if parameter.device != device:
            raise ValueError(
                f"{where}: {name} is on {parameter.device}, other parameters on {device}; all parameters of an "
                "optimizer must be on one device: move them, or build an optimizer for each device"
            )


def check_projection(group: dict[str, Any], names: Sequence[str], where: str) -> None:
    """Raise ValueError for a projected group that cannot be: the message names the parameter, its shape, the remedy."""
    shapes = [f"{name} {tuple(p.shape)}" for name, p in zip(names, group["params"], strict=True)]
    where = f"{where} ({', '.join(shapes[:3])}{', …' if len(shapes) > 3 else ''})"
    _check_projection_values(group, where)
    for name, parameter in zip(names, group["params"], strict=True):
        if parameter.dim() != 2:
            raise ValueError(
                f"{where}: {name} of shape {tuple(parameter.shape)} cannot be projected, for it has {parameter.dim()} "
                "dimension(s) and not two; move it to a group without rank"
            )
        if 0 in parameter.shape:
            raise ValueError(f"{where}: {name} of shape {tuple(parameter.shape)} is empty; leave it out")


def _check_projection_values(group: dict[str, Any], where: str) -> None:
    if not _is_int(group["rank"]) or group["rank"] < 1:
        raise ValueError(f"{where}: rank must be an integer of at least 1, got {group['rank']!r}")
    if group["proj_type"] != "std":
        raise ValueError(
            f"{where}: proj_type {group['proj_type']!r} is not supported; use 'std', which projects the smaller side"
        )
    for key in ("update_proj_gap", "quant_group_size", "queue_size", "power_iterations"):
        if not _is_int(group[key]) or group[key] < 1:
            raise ValueError(f"{where}: {key} must be an integer of at least 1, got {group[key]!r}")
    if group["max_gap"] is not None and (not _is_int(group["max_gap"]) or group["max_gap"] < group["update_proj_gap"]):
        raise ValueError(
            f"{where}: max_gap must be None or an integer of at least update_proj_gap={group['update_proj_gap']}, "
            f"got {group['max_gap']!r}"
        )
    for key, least in (("scale", -math.inf), ("gamma_proj", 1), ("cos_threshold", -math.inf),
                       ("similarity_threshold", -math.inf), ("shrink_threshold", -math.inf),
                       ("energy_threshold", 0)):  # fmt: skip
        value = group[key]
        if key == "shrink_threshold" and value is None:
            continue
        if not isinstance(value, (int, float)) or not least <= value < math.inf:
            bound = "" if least == -math.inf else f" of at least {least}"
            raise ValueError(f"{where}: {key} must be a finite number{bound}, got {value!r}")
    if group["shrink_threshold"] is not None and group["shrink_threshold"] > group["similarity_threshold"]:
        raise ValueError(
            f"{where}: shrink_threshold must not be above similarity_threshold={group['similarity_threshold']!r}, or "
            f"one similarity asked for a longer gap and a shorter one, got {group['shrink_threshold']!r}"
        )
    if not isinstance(group["stagger"], bool):
        raise ValueError(f"{where}: stagger must be True or False, got {group['stagger']!r}")
    if not _is_int(group["quant_n_bit"]):
        raise ValueError(f"{where}: quant_n_bit must be one of 4, 8, got {group['quant_n_bit']!r}")
    _one_of(group, "quant_n_bit", (4, 8), where)
    _one_of(group, "refresh", METHODS, where)
    _one_of(group, "similarity", SIMILARITIES, where)
    _one_of(group, "moments_on_refresh", ON_REFRESH, where)
    _one_of(group, "trigger", TRIGGERS, where)
    if group["trigger"] == "energy" and group["similarity"] == "official":
        raise ValueError(
            f"{where}: trigger 'energy' is no part of the published rule, similarity 'official'; use 'subspace'"
        )


def check_max_grad_norm(value: Any) -> None:
    """Raise ValueError for what is no norm to clip to; a float32 that is 0 would stop the training."""
    if value is None:
        return
    if not _is_number(value) or not torch.tensor(float(value), dtype=torch.float32, device="cpu") > 0:
        raise ValueError(f"max_grad_norm must be None or a number above 0 in float32, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(group: dict[str, Any], key: str, allowed: Sequence[object], where: str) -> None:
    if group[key] not in allowed:
        raise ValueError(f"{where}: {key} must be one of {', '.join(map(repr, allowed))}, got {group[key]!r}")


# -- what a checked group means -------------------------------------------------------------------------------------


def names_of(group: dict[str, Any], position: int) -> list[str]:
    """Names of the group's parameters for messages and reports: its ``param_names``, or their places."""
    places = [f"parameter {index} of group {position}" for index in range(len(group["params"]))]
    return list(group.get("param_names", places))


def rank_of(group: dict[str, Any], parameter: Tensor) -> int:
    """The group's rank, clipped to the parameter's smaller side."""
    rank: int = min(group["rank"], *parameter.shape)
    return rank


def projector_columns(group: dict[str, Any], parameter: Tensor) -> int:
    """Columns of the parameter's projector: n on the right side, the rank on the left."""
    return projector_shape(parameter.shape, rank_of(group, parameter))[1]


def projector_format(group: dict[str, Any]) -> ProjectorFormat:
    """How the group's projectors are stored."""
    return ProjectorFormat(group["quant_n_bit"] if group["quant"] else 0, group["quant_group_size"])


PROJECTOR = ("projector", "projector_scale", "projector_offset")
"""Where a state holds a projector; the first alone where it is not quantised."""


def stored_projector(state: dict[str, Tensor]) -> list[Tensor]:
    """The tensors that a parameter's projector is stored in."""
    return [state[name] for name in PROJECTOR if name in state]


def projector(p: Tensor, group: dict[str, Any], state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """P, decoded, as the two GEMMs take it."""
    return projector_format(group).decode(stored_projector(state), projector_columns(group, p), dtype)


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


def moments_that_follow(group: dict[str, Any], state: dict[str, Tensor], betas: Tensor) -> Moments | None:
    """What a refresh changes beside the projector; None where moments are kept.  ``betas``: float64 (2,)."""
    if group["moments_on_refresh"] == "keep":
        return None
    return Moments(stored_moments(state), state["step"], group["moments_on_refresh"], betas)


def slot_of(group: dict[str, Any], index: int) -> int:
    """The slot of the optimizer's ``index``-th projected parameter, -1 where the group's refreshes are not staggered.

    Counted over groups, so that groups of the same gap share the steps of a round.
    """
    staggered = group["stagger"] and group["similarity"] != "official"
    return index % group["update_proj_gap"] if staggered else -1


def new_state(p: Tensor, group: dict[str, Any], slot: int = -1) -> dict[str, Tensor]:
    """State before the first step: moments of zero, and a projector of zeros, which that step replaces."""
    state = {"step": torch.zeros((), dtype=torch.int64, device=p.device)}
    shape, eight_bit = tuple(p.shape), group["moments"] == "8bit"
    if "rank" in group:
        rank = rank_of(group, p)
        (m, n), side = p.shape, side_of(p.shape)
        shape = (m, rank) if side == "right" else (rank, n)
        zeros = torch.zeros(projector_shape(p.shape, rank), dtype=torch.float32, device=p.device)
        state.update(zip(PROJECTOR, projector_format(group).encode(zeros), strict=False))
        state["schedule"] = Schedule.first(group["update_proj_gap"], group["queue_size"], slot).to_tensor()
    else:
        eight_bit = eight_bit and p.numel() >= MIN_8BIT_ELEMENTS
    state.update(zero_moments(shape, eight_bit, p.device))
    return state
