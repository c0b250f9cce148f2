"""How a parameter's state is laid out: in which formats, under which names, and what is in it before the first step.

==========================================  =======================================================================
``step``                                    int64, 0-d: updates so far
``exp_avg``, ``exp_avg_<part>``             m, shaped like R, in the first of the moments' formats
``exp_avg_sq_root``, ``…_<part>``           √v in the second one; ``exp_avg_sq``, v itself, where that is float32
``projector``, ``projector_<part>``         P in the projector's format; projected parameters only
``schedule``                                float64 on the CPU (:mod:`qgalore_compile.subspace.scheduler`)
``limit``                                   float32, 0-d: of rules that limit a norm, the last one
``momentum``, ``momentum_<part>``           M, shaped like the weight, with groups along its rows: of rules that keep
                                            the whole gradient's
``exp_avg_sq_row``, ``exp_avg_sq_col``      float32 (m,), (n,): of rules with sketches, mean squares
==========================================  =======================================================================

A rule that draws its projectors keeps neither those nor a schedule, and one of a single moment m alone.

A part is one of the tensors that a format stores (:class:`qgalore_compile.formats.Format`): the first has the name of
the whole, a scale is ``projector_scale``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
from qgalore_compile.weights import QuantizedWeight

MIN_8BIT_ELEMENTS = 4096
"""Parameters that are not projected and smaller than this keep float32 moments, as in bitsandbytes."""


class GroupFormats(NamedTuple):
    """What the keys of a group say of formats.

    Attributes:
        projector: of projectors; of a group without rank float32.
        names: of a projector's parts in a parameter's state.
        moments: of moments.
        small: of the moments of small parameters that are not projected.
        momenta: of a momentum of the whole gradient, by elements in a group of the weight's; {} of other rules.
        dtypes: of the projector's, the moments' and the momentum's parts by name, those of small parameters apart.
    """

    projector: Format
    names: tuple[str, ...]
    moments: MomentFormats
    small: MomentFormats
    momenta: dict[int, Format]
    dtypes: dict[str, torch.dtype]

    @classmethod
    def of(cls, group: Mapping[str, Any], widths: Collection[int]) -> GroupFormats:
        """The formats of a checked group whose parameters have these :func:`width_of`."""
        form = Format.parse(projector_text(group))
        count = rule_of(group["rule"]).moments if "rank" in group else 2
        moments = MomentFormats.parse(group["moments"], count)
        whole = "rank" in group and rule_of(group["rule"]).whole
        momenta = {width: momentum_format(group["momentum_format"], width) for width in sorted(widths) if whole}
        for each in (form, moments.first, moments.second, *momenta.values()):
            _ = each.text  # Dynamo reads what is there
        names = ("projector", *(f"projector_{part.name}" for part in form.parts[1:]))
        dtypes = dict(zip(names, map(dtype_of, form.parts), strict=True)) | moments.dtypes
        for each in momenta.values():
            dtypes |= dict(zip(momentum_names(each), map(dtype_of, each.parts), strict=True))
        return cls(form, names, moments, MomentFormats.parse("32bit"), momenta, dtypes)

    def moments_of(self, group: Mapping[str, Any], parameter: Tensor) -> MomentFormats:
        """Of one of the group's parameters."""
        return self.moments if "rank" in group or parameter.numel() >= MIN_8BIT_ELEMENTS else self.small


SHORT_MOMENTUM = {"4bit": "moment4/{}+rows", "8bit": "e4m3/{}", "32bit": "float32"}
"""What the key ``momentum_format`` may say in place of a format's text: formats with as many elements in a group as
the weight has, so that one kernel reads and writes both."""


def width_of(parameter: Tensor) -> int:
    """Elements in a group of a momentum of that parameter: its own where it is quantised."""
    grouped = parameter.format.grouped if isinstance(parameter, QuantizedWeight) else None
    return 128 if grouped is None else grouped.width


def momentum_format(text: str | Format, width: int) -> Format:
    """The format that a value of ``momentum_format`` means for groups of so many elements; FormatError for one that
    cannot be written by a step, or whose groups are not along rows."""
    given = Format.parse(SHORT_MOMENTUM.get(str(text), str(text)).format(width))
    in_rows = given.trains and given.grouped is not None and given.grouped is given and given.grouped.axis == "rows"
    if not in_rows and str(given) != "float32":
        raise FormatError(f"momentum_format={str(text)!r} has no groups along rows that a step can write")
    return given


def momentum_names(form: Format) -> list[str]:
    """Of its parts in a parameter's state."""
    return ["momentum", *(f"momentum_{part.name}" for part in form.parts[1:])]


def bad_momentum(value: Any) -> str | None:
    """What is wrong with a value of the key ``momentum_format``."""
    if isinstance(value, str) and value in SHORT_MOMENTUM:
        return None
    short = ", ".join(map(repr, SHORT_MOMENTUM))
    problem = _problem(lambda: momentum_format(value, 128), value)
    return problem and f"must be one of {short}, or a format's text such as 'e4m3/128': {problem}"


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
for _check in (bad_projector_format, bad_moments, bad_momentum):
    _check._dynamo_marked_constant = True  # type: ignore[attr-defined]


def texts(group: dict[str, Any]) -> dict[str, Any]:
    """A group's values with the texts of formats and the names of rules in their place, as a state dict has them."""
    return {key: _text(value) for key, value in group.items()}


def _text(value: Any) -> Any:
    if isinstance(value, Rule):
        return rule_of(value).name
    return str(value) if isinstance(value, Format) else value


# -- one parameter's state ------------------------------------------------------------------------------------------


def projects(group: Mapping[str, Any]) -> bool:
    """Whether R is a projection of the gradient: the group has a rule and, for it, a rank that is not None."""
    return group.get("rank") is not None


def rank_of(group: Mapping[str, Any], parameter: Tensor) -> int:
    """The group's rank, clipped to the parameter's smaller side; that side where nothing is projected."""
    rank: int = min(parameter.shape)
    return min(group["rank"], rank) if projects(group) else rank


def has_projector(group: Any) -> bool:
    """Whether its parameters have a projector in their state, and with it a schedule."""
    return projects(group) and not group.rule.drawn


def low_shape(group: Mapping[str, Any], parameter: Tensor) -> tuple[int, ...]:
    """Shape of R, and of the moments: of the parameter itself where it is not projected."""
    if not projects(group):
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
    if name == "momentum":
        form = formats.momenta[width_of(p)]
        return Stored(form, [state[part] for part in momentum_names(form)], tuple(p.shape))
    if name not in own.names or not own.root:
        return None
    count = len(own.first.parts)
    parts = parts_in(state, own)
    if name == own.names[0]:
        return Stored(own.first, parts[:count], low_shape(group, p))
    second = count < len(own.names) and name == own.names[count]
    return Stored(own.second, parts[count:], low_shape(group, p)) if second else None


def names_of_parts(p: Tensor, group: Any) -> list[Sequence[str]]:
    """The names of the parts of a parameter's projector, moments and momentum, as far as there may be such."""
    formats: GroupFormats = group.formats
    own = formats.moments_of(group, p)
    count = len(own.first.parts)
    momentum = [momentum_names(form) for form in formats.momenta.values()]
    return [formats.names, own.names[:count], own.names[count:], *momentum]


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
    if group.rule is not None and group.rule.whole:
        form = formats.momenta[width_of(p)]
        state.update(zip(momentum_names(form), form.zeros(p.shape, p.device), strict=True))
    if group.rule is not None and group.rule.sketches:
        for name, size in zip(("exp_avg_sq_row", "exp_avg_sq_col"), p.shape, strict=True):
            state[name] = torch.zeros(size, dtype=torch.float32, device=p.device)
    state.update(formats.moments_of(group, p).zeros(low_shape(group, p), p.device))
    return state
