"""How a parameter's state is laid out: in which formats, under which names, and what is in it before the first step.

==========================================  =======================================================================
``step``                                    int64, 0-d: updates so far
``exp_avg``, ``exp_avg_<part>``             m, shaped like R, in the first of the moments' formats
``exp_avg_sq_root``, ``…_<part>``           √v in the second one; ``exp_avg_sq``, v itself, where that is float32
``projector``, ``projector_<part>``         P in the projector's format; projected parameters only
``schedule``                                float64 on the CPU (:mod:`qgalore_compile.subspace.scheduler`)
``limit``                                   float32, 0-d: of rules that limit a norm, the last one
==========================================  =======================================================================

A rule that draws its projectors keeps neither those nor a schedule, and one of a single moment m alone.

A part is one of the tensors that a format stores (:class:`qgalore_compile.formats.Format`): the first has the name of
the whole, a scale is ``projector_scale``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgalore_compile.formats import Format, FormatError, Stored, decode
from qgalore_compile.formats.base import dtype_of
from qgalore_compile.optim.rules.base import Rule
from qgalore_compile.optim.rules.registry import rule_of
from qgalore_compile.subspace.moments import SHORT, MomentFormats
from qgalore_compile.subspace.projection import projector_shape, side_of
from qgalore_compile.subspace.scheduler import Schedule

MIN_8BIT_ELEMENTS = 4096
"""Parameters that are not projected and smaller than this keep float32 moments, as in bitsandbytes."""


class GroupFormats(NamedTuple):
    """What the keys of a group say of formats.

    Attributes:
        projector: of projectors; of a group without rank float32.
        names: of a projector's parts in a parameter's state.
        moments: of moments.
        small: of the moments of small parameters that are not projected.
        dtypes: of the projector's and the moments' parts by name, those of small parameters apart.
    """

    projector: Format
    names: tuple[str, ...]
    moments: MomentFormats
    small: MomentFormats
    dtypes: dict[str, torch.dtype]

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> GroupFormats:
        """The formats of a checked group."""
        form = Format.parse(projector_text(group))
        count = rule_of(group["rule"]).moments if "rank" in group else 2
        moments = MomentFormats.parse(group["moments"], count)
        for each in (form, moments.first, moments.second):
            _ = each.text  # Dynamo reads what is there
        names = ("projector", *(f"projector_{part.name}" for part in form.parts[1:]))
        dtypes = dict(zip(names, map(dtype_of, form.parts), strict=True)) | moments.dtypes
        return cls(form, names, moments, MomentFormats.parse("32bit"), dtypes)

    def moments_of(self, group: Mapping[str, Any], parameter: Tensor) -> MomentFormats:
        """Of one of the group's parameters."""
        return self.moments if "rank" in group or parameter.numel() >= MIN_8BIT_ELEMENTS else self.small


def projector_text(group: Mapping[str, Any]) -> str:
    """The text of a group's projector format: ``projector_format``, or what GaLore's keys say in its place."""
    if group.get("projector_format") is not None:
        return str(group["projector_format"])
    if not group.get("quant", False):
        return "float32"
    width = group["quant_group_size"]
    return f"int4/{width}+planar" if group["quant_n_bit"] == 4 else f"int8/{width}"


def bad_projector_format(value: Any) -> str | None:
    """What is wrong with a value of ``projector_format``, for a table of keys; None for a format."""
    return _problem(lambda: Format.parse(value), value)


def bad_moments(value: Any) -> str | None:
    """Likewise of ``moments``."""
    if isinstance(value, str) and value in SHORT:
        return None
    short = ", ".join(map(repr, SHORT))
    problem = _problem(lambda: MomentFormats.parse(value), value)
    return problem and f"must be one of {short}, or a format's text: {problem}"


def _problem(parse: Any, value: Any) -> str | None:
    try:
        parse()
    except FormatError as error:
        return str(error)
    return None if isinstance(value, (str, Format)) else f"must be a text or a Format, got {value!r}"


# Called while Dynamo traces a step that sets a key of a group, not traced: both return constants.
for _check in (bad_projector_format, bad_moments):
    _check._dynamo_marked_constant = True  # type: ignore[attr-defined]


def texts(group: dict[str, Any]) -> dict[str, Any]:
    """A group's values with the texts of formats and the names of rules in their place, as a state dict has them."""
    return {key: _text(value) for key, value in group.items()}


def _text(value: Any) -> Any:
    if isinstance(value, Rule):
        return rule_of(value).name
    return str(value) if isinstance(value, Format) else value


# -- one parameter's state ------------------------------------------------------------------------------------------


def rank_of(group: Mapping[str, Any], parameter: Tensor) -> int:
    """The group's rank, clipped to the parameter's smaller side."""
    rank: int = min(group["rank"], *parameter.shape)
    return rank


def has_projector(group: Any) -> bool:
    """Whether its parameters have a projector in their state, and with it a schedule."""
    return group.rule is not None and not group.rule.drawn


def low_shape(group: Mapping[str, Any], parameter: Tensor) -> tuple[int, ...]:
    """Shape of R, and of the moments: of the parameter itself where it is not projected."""
    if "rank" not in group:
        return tuple(parameter.shape)
    (m, n), rank = parameter.shape, rank_of(group, parameter)
    return (m, rank) if side_of(parameter.shape) == "right" else (rank, n)


def parts_in(state: Mapping[str, Tensor], formats: GroupFormats | MomentFormats) -> list[Tensor]:
    """The tensors that a parameter's projector, or its moments, are stored in."""
    return [state[name] for name in formats.names]


def stored(p: Tensor, group: Any, state: Mapping[str, Tensor], name: str) -> Stored | None:
    """The projector, m or √v by its name in a parameter's state; None for what is no tensor in a format."""
    formats: GroupFormats = group.formats
    own = formats.moments_of(group, p)
    if name == "projector":
        return Stored(formats.projector, parts_in(state, formats), projector_shape(p.shape, rank_of(group, p)))
    if name not in own.names or not own.root:
        return None
    count = len(own.first.parts)
    parts = parts_in(state, own)
    if name == own.names[0]:
        return Stored(own.first, parts[:count], low_shape(group, p))
    second = count < len(own.names) and name == own.names[count]
    return Stored(own.second, parts[count:], low_shape(group, p)) if second else None


def projector(p: Tensor, group: Any, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """P, decoded, as the two GEMMs take it."""
    shape: Sequence[int] = projector_shape(p.shape, rank_of(group, p))
    return decode(parts_in(state, group.formats), shape, group.formats.projector, dtype)


def new_state(p: Tensor, group: Any, slot: int = -1) -> dict[str, Tensor]:
    """State before the first step: moments of zero, and a projector of zeros, which that step replaces."""
    state = {"step": torch.zeros((), dtype=torch.int64, device=p.device)}
    formats: GroupFormats = group.formats
    if has_projector(group):
        shape = projector_shape(p.shape, rank_of(group, p))
        state.update(zip(formats.names, formats.projector.zeros(shape, p.device), strict=True))
        state["schedule"] = Schedule.first(group["update_proj_gap"], group["queue_size"], slot).to_tensor()
    if group.rule is not None and group.rule.limits:
        state["limit"] = torch.zeros((), dtype=torch.float32, device=p.device)
    state.update(formats.moments_of(group, p).zeros(low_shape(group, p), p.device))
    return state
