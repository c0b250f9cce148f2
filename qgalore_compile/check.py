"""``qg.check(step, *args)``: a step in eager and the same step compiled, on copies of the same state, tensor by tensor.

Two whole steps may differ by the rounding of their GEMMs.  The lowest dtype that a GEMM of the eager step returns,
autocast included, or the tensor's own dtype if that is lower, decides what is allowed:

==========  ========  =======  ======================================================================================
GEMM dtype  movement  value    reason
==========  ========  =======  ======================================================================================
float32     0.01      0.001    gradients differ by about 1e-6; where an INT8 weight's stochastic rounding or an 8-bit
                               code is at a boundary, one code flips, and a flip is about 1 % of a small step's norm
float16     0.2       0.01     as bfloat16 with three more bits: √(1/8) of its share; also TF32 ("high" precision)
bfloat16    0.5       0.05     a gradient is rounded to 1/256 of its size, so a few per cent of N, which is close to
                               ±1 in the first steps, change sign: 2 √0.03 of the update's norm
==========  ========  =======  ======================================================================================

*movement*: ‖found - expected‖ over ‖expected - before‖, of state.  *value*: over ‖expected‖, of what each step computes
anew: results, gradients, ``grad_norm``.  1e-6 ‖expected‖, the contract of ``docs/architecture.md``, is always allowed,
and no more where eager moved nothing.  Integers, ``step`` and the schedules' clocks are exact; NaN must be in the same
places.  INT8 weights, 8-bit moments and projectors count as what they decode to; a projector refreshed in this step
counts as its subspace: ‖PᵀP - QᵀQ‖ / ‖PᵀP‖.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from qgalore_compile._torch import TorchDispatchMode
from qgalore_compile.copies import Copier, CopyError, alone
from qgalore_compile.plain_text import plain_text
from qgalore_compile.projection import Side
from qgalore_compile.reach import Entry, bound, entries
from qgalore_compile.scheduler import EXACT

__all__ = ["TOLERANCES", "CheckResult", "CopyError", "TensorError", "check"]

TOLERANCES = {torch.float32: (0.01, 0.001), torch.float16: (0.2, 0.01), torch.bfloat16: (0.5, 0.05)}
"""(movement, value) by the GEMMs' dtype, widest first; the module's docstring has the reasons."""

CONTRACT = 1e-6
"""Of a tensor's norm: what equal GEMM results may differ by."""

_GEMMS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "matmul", "convolution", "_scaled_mm"}


@dataclass(frozen=True)
class TensorError:
    """How far one tensor of the compiled step is from the eager one's.

    Attributes:
        name: where the step reaches it: "model.blocks.0.weight", "model.blocks.0.weight/exp_avg", "result[0]".
        largest: largest absolute error of an element, of decoded values.
        moved: ‖expected - before‖, how far the eager step moved it.
        relative: ‖found - expected‖ / ‖expected - before‖; over ‖expected‖ where nothing moved or the value is new.
        tolerance: of ``relative``.
        ok: within it.
        codes_differing, code_distance: fraction of integer codes that differ, and the largest distance; None for float.
        note: what else there is to say.
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


@dataclass(frozen=True)
class CheckResult:
    """What :func:`check` found.

    Attributes:
        errors: one record a tensor, worst first.
        precision: the GEMMs' dtype, which chose the tolerances.
    """

    errors: tuple[TensorError, ...]
    precision: str

    @property
    def ok(self) -> bool:
        """Whether every tensor is within its tolerance."""
        return all(error.ok for error in self.errors)

    @property
    def worst(self) -> TensorError:
        """The tensor that is furthest from its tolerance, or nearest to it."""
        return self.errors[0]

    def __str__(self) -> str:
        wrong = sum(not error.ok for error in self.errors)
        verdict = f"{wrong} wrong" if wrong else "all within tolerance"
        table = Table("", "tensor", "largest", "relative", "allowed", "codes", "note", box=box.SIMPLE_HEAD)
        for error in self.errors[: max(20, wrong)]:
            differ = error.codes_differing
            codes = "" if differ is None else f"{differ:.2%} by {error.code_distance}"
            numbers = (f"{value:.2g}" for value in (error.largest, error.relative, error.tolerance))
            cells = ("ok" if error.ok else "WRONG", error.name, *numbers, codes, error.note)
            table.add_row(*(Text(cell, overflow="fold") for cell in cells))  # Text: a name's brackets are no markup
        return plain_text([f"{len(self.errors)} tensors, {verdict}; GEMMs in {self.precision}", table], 120)

    def to_json(self) -> str:
        """All of it as JSON; numbers that are not finite as strings."""
        records = [
            {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(error).items()}
            for error in self.errors
        ]
        return json.dumps({"ok": self.ok, "precision": self.precision, "errors": records})


def check(
    step: Callable[..., Any],
    *args: Any,
    options: dict[str, Any] | None = None,
    backend: str | Callable[..., Any] = "qgalore",
    **kwargs: Any,
) -> CheckResult:
    """Run ``step(*args, **kwargs)`` in eager and compiled, on copies of all it reaches, and compare every tensor.

    Args:
        step: a function, bound method, module, callable object or partial, compiled or not.  What is copied: closure
            variables, defaults, ``self``, and globals that it reads, its own functions' included.
        *args, **kwargs: of the step; copied too.
        options, backend: of ``torch.compile``.  Compiling is done with ``fullgraph=True`` and for this call only.

    Model, optimizer, gradients, arguments and generators are as before afterwards, and so is what Dynamo has compiled.
    Effects outside tensors (printing, files) happen twice.  A step that draws random numbers is compiled with
    Inductor's ``fallback_random``, so that both draw the same.  Whatever either run raises is raised.

    Raises:
        ValueError: the step reaches no tensor.
        CopyError: it reaches something that has no copy.
    """
    import qgalore_compile.backend  # noqa: F401  # here: it loads Inductor, and lets Dynamo trace backward()
    from qgalore_compile._torch import inductor_config as config
    from qgalore_compile.tracing import traced_as_step

    roots = {"": step, **bound(step, args, kwargs)}
    before = entries(roots)
    if not before:
        raise ValueError(
            "check compares tensors, and this step reaches none; pass a step that has model and optimizer as closure "
            "variables, globals, attributes of its object, or arguments"
        )
    with closing(Copier(roots)) as mine, closing(Copier(roots)) as twin:
        eager, eager_args, eager_kwargs = mine.copy(step), mine.copy(args), mine.copy(kwargs)
        other, other_args, other_kwargs = twin.copy(step), twin.copy(args), twin.copy(kwargs)
        generators = _generators()
        try:
            with torch.compiler.set_stance("force_eager"), _Watch() as watch:
                expected = eager(*eager_args, **eager_kwargs)
            drew = not all(map(torch.equal, generators, _generators()))
            _generators(generators)
            compiled = torch.compile(alone(other), backend=traced_as_step(backend), options=options, fullgraph=True)
            with config.patch(fallback_random=drew or config.fallback_random):
                found = compiled(*other_args, **other_kwargs)
        finally:
            _generators(generators)
        expected_entries = entries({**{name: mine.copy(x) for name, x in roots.items()}, "result": expected})
        found_entries = entries({**{name: twin.copy(x) for name, x in roots.items()}, "result": found})
    names = dict.fromkeys((*expected_entries, *found_entries))
    precision = watch.precision()
    errors = [
        _compare(name, before.get(name), found_entries.get(name), expected_entries.get(name), precision)
        for name in names
    ]
    errors.sort(key=lambda error: (error.ok, -error.relative / max(error.tolerance, 1e-6)))
    return CheckResult(tuple(errors), str(precision).removeprefix("torch."))


class _Watch(TorchDispatchMode):
    """Sees the dtypes that GEMMs return."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes = {torch.float32}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).split(".")[1:2]
        if name and (name[0] in _GEMMS or "attention" in name[0]):
            first = result[0] if isinstance(result, (tuple, list)) else result
            self.dtypes.add(first.dtype)
        return result

    def precision(self) -> torch.dtype:
        """The lowest that rounded, by PyTorch's setting for float32 too."""
        setting = {"high": torch.float16, "medium": torch.bfloat16}.get(torch.get_float32_matmul_precision())
        return _lowest({setting or torch.float32, *self.dtypes})


def _generators(states: list[Tensor] | None = None) -> list[Tensor]:
    """The states of torch's generators, set to ``states`` where given."""
    cuda = torch.cuda.is_initialized()
    if states is not None:
        torch.set_rng_state(states[0])
        if cuda and states[1:]:
            torch.cuda.set_rng_state_all(states[1:])
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if cuda else ())]


# -- comparing --------------------------------------------------------------------------------------------------------


def _compare(
    name: str, before: Entry | None, found: Entry | None, expected: Entry | None, precision: torch.dtype
) -> TensorError:
    if found is None or expected is None:
        return _wrong(name, "only in the eager step" if found is None else "only in the compiled step")
    for what in ("shape", "dtype"):
        mine, theirs = getattr(found.tensor, what), getattr(expected.tensor, what)
        if mine != theirs:
            return _wrong(name, f"{what} {mine}, in eager {theirs}")
    value, eager = found.value(), expected.value()
    known = before is not None and before.tensor.shape == expected.tensor.shape
    start = before.value() if before is not None and known else torch.zeros_like(eager)
    apart, moved, note = _apart(value, eager), _norm(_apart(eager, start), finite=True), ""
    largest = float(apart.max()) if apart.numel() else 0.0
    clocks = apart[:EXACT] if expected.key == "schedule" else apart
    if (not eager.is_floating_point() or expected.key in ("step", "schedule")) and bool(clocks.any()):
        return TensorError(name, largest, moved, _norm(clocks) / (moved or 1.0), 0.0, False, note="must be exact")
    movement, anew = TOLERANCES[_lowest({precision, expected.tensor.dtype})]
    error, size = _norm(apart), _norm(eager, finite=True)
    tolerance, scale = movement, moved
    if expected.key == "grad_norm" or name.endswith(".grad") or not (known or expected.key):
        tolerance, scale = anew, size
    elif expected.key == "schedule":  # its similarities and energies
        scale = _norm(eager[EXACT:], finite=True)
    elif expected.projector and expected.turn != (before.turn if before else 0):
        error, scale = _subspaces_apart(value, eager, expected.projector) * size, size
        note = "refreshed: its subspace"
    if not scale or tolerance * scale < error <= CONTRACT * size:
        tolerance, scale = CONTRACT, size
    relative = error / scale if error and scale else math.inf if error else 0.0
    return TensorError(name, largest, moved, relative, tolerance, relative <= tolerance, *_codes(found, expected), note)


def _wrong(name: str, note: str) -> TensorError:
    return TensorError(name, math.inf, 0.0, math.inf, 0.0, False, note=note)


def _lowest(dtypes: set[torch.dtype]) -> torch.dtype:
    return max(dtypes & TOLERANCES.keys() or {torch.float32}, key=list(TOLERANCES).index)


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """|one - other| in float64; 0 where both are NaN or the same infinity, infinite where only one is."""
    one, other = one.double(), other.double()
    same = (one == other) | (one.isnan() & other.isnan())
    return torch.where(same, 0.0, (one - other).abs().nan_to_num(math.inf, math.inf))


def _norm(x: Tensor, *, finite: bool = False) -> float:
    x = x.double()
    return float(torch.linalg.vector_norm(torch.where(x.isfinite(), x, 0.0) if finite else x))


def _subspaces_apart(one: Tensor, other: Tensor, side: Side) -> float:
    """‖QᵀQ - PᵀP‖ / ‖PᵀP‖ for projectors Q and P, (r, n) on the right, from products r × r; blind to the basis."""
    if side == "left":
        one, other = one.t(), other.t()
    mine, theirs, both = (float((a @ b.t()).square().sum()) for a, b in ((one, one), (other, other), (one, other)))
    square = mine + theirs - 2 * both
    return math.sqrt(max(square, 0.0) / theirs) if math.isfinite(square) and theirs else math.inf


def _codes(found: Entry, expected: Entry) -> tuple[float | None, int | None]:
    """The fraction of integer codes that differ, and the largest distance."""
    mine, theirs = found.codes(), expected.codes()
    if mine is None or theirs is None or not mine.numel():
        return None, None
    distance = (mine.to(torch.int16) - theirs.to(torch.int16)).abs()
    return float((distance > 0).double().mean()), int(distance.max())
