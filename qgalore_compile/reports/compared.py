"""One tensor of a compiled step beside the same one of several eager runs: what is compared, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qgalore_compile.reports.judgement import Rates, Sample, judge
from qgalore_compile.reports.reach import Entry
from qgalore_compile.reports.runs import Renewed, Run
from qgalore_compile.subspace.projection import Side
from qgalore_compile.subspace.scheduler import EXACT

_SHORT_FLOATS = (torch.float16, torch.bfloat16)
_SPARE = 0.002
"""Of 8-bit moments, codes one apart: the contract's."""
_UNEXPLAINED = {True: 0.05, False: 0.5}
"""Of a new value's size, of a moment's movement: the norm of what rounding does not explain of it."""
_SUBSPACE = 0.01
"""Of the gradient: how far apart projectors may always be."""
_ORTHONORMAL = 0.05
"""How much further from orthonormal, of √r, than eager's, which quantisation takes up to 0.1 away."""


@dataclass(frozen=True)
class TensorError:
    """How far one tensor of the compiled step is from the eager one's.

    Attributes:
        name: where the step reaches it: "model.blocks.0.weight", "model.blocks.0.weight/exp_avg", "result[0]".
        largest: largest absolute error of an element, of decoded values.
        moved: ‖expected - before‖, how far the eager step moved it.
        relative: ‖found - expected‖ / ‖expected - before‖; over ‖expected‖ where nothing moved or the value is new.
        tolerance: of ``relative``: what rounding explains, element by element.  Elements beyond it are counted.
        ok: rounding explains it.
        codes_differing, code_distance: fraction of integer codes that differ, and the largest distance; None for float.
        note: what is wrong, or what else there is to say.
        rounding: ``relative`` of the eager run that rounding took furthest.
        outside, allowed: elements that rounding does not explain, and how many of them a right tensor may have.
    """

    name: str
    largest: float
    moved: float
    relative: float
    tolerance: float
    ok: bool
    codes_differing: float | None = None
    code_distance: int | None = None
    note: str = ""
    rounding: float = 0.0
    outside: int = 0
    allowed: int = 0


@dataclass
class Compared:
    """An error as far as it is known before the rates of unexplained elements are, and what is still to be judged.

    Attributes:
        error: all but the verdict on ``samples``.
        samples: the tensor in one or more coordinates, by what to call them.
    """

    error: TensorError
    samples: dict[str, Sample]

    def judged(self, rates: Rates) -> TensorError:
        """The finished error."""
        error = self.error
        for coordinates, sample in self.samples.items():
            said, outside, allowed = judge(sample, rates)
            if not coordinates:
                error = replace(error, outside=outside, allowed=allowed)
            if said:
                return replace(error, ok=False, note=f"{coordinates}{said}")
        return error


def compare(name: str, before: Entry | None, compiled: Run, runs: Sequence[Run]) -> Compared:
    """Prepare the comparison of tensor ``name``; the first of ``runs`` is unperturbed."""
    found, others = compiled.entries.get(name), [run.entries.get(name) for run in runs]
    expected = others[0]
    if found is None or expected is None:
        return wrong(name, "only in the eager step" if found is None else "only in the compiled step")
    for what in ("shape", "dtype"):
        mine, theirs = getattr(found.tensor, what), getattr(expected.tensor, what)
        if mine != theirs:
            return wrong(name, f"{what} {mine}, in eager {theirs}")
    if name in runs[0].renewed and expected.projector:
        return _compare_subspace(name, found, expected, [run.renewed[name] for run in runs if name in run.renewed])
    same = [x for x in others if x is not None and x.tensor.shape == found.tensor.shape]
    value, values = found.value(), [x.value() for x in same]
    known = before is not None and before.tensor.shape == expected.tensor.shape
    new = expected.key == "grad_norm" or name.endswith(".grad") or not (known or expected.key)
    start = before.value() if before is not None and known else torch.zeros_like(values[0])
    apart, moved, size = _apart(value, values[0]), _norm(_apart(values[0], start), finite=True), _norm(values[0], True)
    scale = (size if new else moved) or size
    error = TensorError(
        name,
        float(apart.max()) if apart.numel() else 0.0,
        moved,
        _over(_norm(apart), scale),
        0.0,
        True,
        *_codes(found, expected),
        rounding=max(_over(_norm(_apart(x, values[0])), scale) for x in values),
    )
    if expected.key == "schedule":  # clocks, then energies and similarities
        if not _among(value[:EXACT], [x[:EXACT] for x in values]):
            return Compared(replace(error, ok=False, note="must be exact"), {})
        value, values, start, new = value[EXACT:], [x[EXACT:] for x in values], torch.zeros_like(value[EXACT:]), True
    if not values[0].is_floating_point() or expected.key == "step":
        if _among(value, values):
            return Compared(error, {})
        if expected.key or all(map(values[0].equal, values)):
            return Compared(replace(error, ok=False, note="must be exact"), {})
    finite = torch.stack([x.isfinite() for x in (value, *values)]).all(0)
    if not any(bool((_apart(value, x)[~finite] == 0).all()) for x in values):
        return Compared(replace(error, ok=False, note="not finite in other places"), {})
    value, start = _only(value, finite), _only(start, finite & start.isfinite())
    stacked = torch.stack([_only(x, finite) for x in values])
    flip, spare = (None, 0) if new else _flip(expected, stacked[0])
    sample = Sample(
        value,
        stacked,
        start,
        new,
        flip,
        spare,
        f"{'new' if new else expected.key or 'value'} {expected.tensor.dtype} {flip is None}",
        2 * torch.finfo(expected.tensor.dtype).eps if expected.tensor.is_floating_point() else 0.0,
        bound=_UNEXPLAINED[new] * scale if new or expected.key.startswith("exp_avg") else math.inf,
    )
    samples = {"": sample}
    home = _projector_of(expected.tensor, runs[0])
    if home is not None and not new and float(sample.rounding()) > 20 * float(sample.floor.max()):
        samples |= _in_its_coordinates(sample, home, compiled)
    return Compared(replace(error, tolerance=_over(_norm(sample.explained), scale)), samples)


def wrong(name: str, note: str) -> Compared:
    """Of what needs no comparison of numbers."""
    return Compared(TensorError(name, math.inf, 0.0, math.inf, 0.0, False, note=note), {})


def _over(error: float, scale: float) -> float:
    return error / scale if error and scale else math.inf if error else 0.0


def _among(value: Tensor, values: Sequence[Tensor]) -> bool:
    """Whether each element is that of a run."""
    return bool(torch.stack([_apart(value, x) == 0 for x in values]).any(0).all())


def _only(x: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, x.to(torch.float64), 0.0)


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """|one - other| in float64; 0 where both are NaN or the same infinity, infinite where only one is."""
    one, other = one.double(), other.double()
    same = (one == other) | (one.isnan() & other.isnan())
    return torch.where(same, 0.0, (one - other).abs().nan_to_num(math.inf, math.inf))


def _norm(x: Tensor, finite: bool = False) -> float:
    x = x.double()
    return float(torch.linalg.vector_norm(torch.where(x.isfinite(), x, 0.0) if finite else x))


# -- codes ------------------------------------------------------------------------------------------------------------


def _codes(found: Entry, expected: Entry) -> tuple[float | None, int | None]:
    """The fraction of integer codes that differ, and the largest distance."""
    mine, theirs = found.codes(), expected.codes()
    if mine is None or theirs is None or not mine.numel():
        return None, None
    distance = (mine.to(torch.int16) - theirs.to(torch.int16)).abs()
    return float((distance > 0).double().mean()), int(distance.max())


def _flip(entry: Entry, value: Tensor) -> tuple[Tensor | None, int]:
    """How far one code, or one rounding to 16 bits, takes each element, and how many such flips are free."""
    few = int(value.numel() >= 8)
    steps = entry.code_step()
    if steps is not None:
        return steps, max(few, int(_SPARE * value.numel())) if entry.key else few
    if entry.tensor.dtype in _SHORT_FLOATS:
        return torch.finfo(entry.tensor.dtype).eps * value.abs(), few
    return None, 0


# -- projectors -------------------------------------------------------------------------------------------------------


def _projector_of(parameter: Tensor, run: Run) -> str | None:
    """The name of this parameter's projector."""
    return next((name for name, x in run.entries.items() if x.projector and x.parameter is parameter), None)


def _in_its_coordinates(sample: Sample, projector: str, compiled: Run) -> dict[str, Sample]:
    """A projected weight's movement in the directions of its projector, and what is in none of them."""
    entry = compiled.entries[projector]
    p, side = entry.value(), entry.projector
    if not bool(p.isfinite().all()):
        return {}
    inverse = torch.linalg.pinv(p)
    flip = 0.0 if sample.flip is None else 2 * float(sample.flip.max()) * float(inverse.abs().max())

    def down(x: Tensor) -> Tensor:
        return torch.matmul(x, inverse) if side == "right" else torch.matmul(inverse, x)

    def beside(x: Tensor) -> Tensor:
        return x - (down(x) @ p if side == "right" else p @ down(x))

    moved, runs = sample.found - sample.start, sample.runs - sample.start
    low, lows = down(moved), torch.stack([down(x) for x in runs])
    found = {"in its projector's directions: ": _plain(low, lows, sample.kind + " low", flip)}
    if sample.flip is None:
        rest, rests = beside(moved), torch.stack([beside(x) for x in runs])
        found["beside its projector: "] = _plain(rest, rests, sample.kind + " beside", float(sample.floor.max()))
    return found


def _plain(found: Tensor, runs: Tensor, kind: str, floor: float) -> Sample:
    return Sample(found, runs, torch.zeros_like(found), False, None, 0, kind, least=floor)


def _compare_subspace(name: str, found: Entry, expected: Entry, own: Sequence[Renewed]) -> Compared:
    """A projector that the step has computed anew, by what it does to the gradient.

    Args:
        own: what each eager run found, which may have gone on with the compiled step's.
    """
    side = expected.projector
    assert side is not None
    value, values = found.value(), [_with(expected, x).value() for x in own]
    gradient = own[0].gradient.double()
    apart, size = _apart(value, values[0]), _norm(gradient)
    codes = _codes(found, _with(expected, own[0]))
    note = "refreshed: its subspace"
    if not bool(value.isfinite().all()):
        return Compared(TensorError(name, math.inf, 0.0, math.inf, 0.0, False, *codes, note="not finite"), {})

    def error(one: Tensor) -> float:
        return _subspaces_apart(one, values[0], side, gradient) if size else 0.0

    def skew(one: Tensor) -> float:
        gram = one @ one.t() if side == "right" else one.t() @ one
        return _norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)) / math.sqrt(len(gram))

    relative, rounding = error(value), max(map(error, values))
    tolerance, skewed = 2 * rounding + _SUBSPACE, max(map(skew, values))
    few = codes[1] is not None and codes[1] <= 1 and (codes[0] or 0.0) * value.numel() <= max(1, _SPARE * value.numel())
    ok = relative <= tolerance or few
    if skew(value) > 2 * skewed + _ORTHONORMAL:
        ok, note = False, f"refreshed: {skew(value):.2g} from orthonormal, in eager {skewed:.2g} at most"
    elif not ok:
        note = f"refreshed: what it does to the gradient is {relative:.2g} off"
    return Compared(
        TensorError(name, float(apart.max()), _norm(values[0]), relative, tolerance, ok, *codes, note, rounding), {}
    )


def _with(entry: Entry, own: Renewed) -> Entry:
    """The entry as if this projector were stored."""
    state = entry.state | dict(zip(entry.projector_names, own.stored, strict=False))
    return entry._replace(tensor=own.stored[0], state=state)


def _subspaces_apart(one: Tensor, other: Tensor, side: Side, gradient: Tensor) -> float:
    """‖G (Π - Π')‖ / ‖G‖, Π the orthogonal projection on the rows of a projector; on the left ‖(Π - Π') G‖."""
    if side == "left":
        one, other, gradient = one.t(), other.t(), gradient.t()
    apart = gradient @ torch.linalg.pinv(one) @ one - gradient @ torch.linalg.pinv(other) @ other
    return _norm(apart) / _norm(gradient)
