"""``qg.check(step, *args)``: a step in eager and the same step compiled, on copies of one state, tensor by tensor.

Two whole steps differ by rounding, and what becomes of a rounding error no dtype tells: Adam makes ±1 of a gradient
that is zero but for rounding (the bias of a key projection), a subspace has arbitrary directions where the gradient's
rank is below r, a code at a boundary flips.  A tolerance wide enough for these would find no wrong kernel, so the
tolerance is measured: the step runs in eager again, a few times, its results off by their rounding
(``perturbed.py``).  A compiled tensor is right if it could be one more of these runs, told element by
element (``judgement.py``), so that an element which rounding decides excuses no other.  Where a tensor
fails, more such runs are made before it is called wrong: a wrong kernel stays outside however many there are.

Three things are looked at in coordinates of their own:

- A projector computed anew counts as what it does to the gradient, ‖G (Π - Π')‖ over ‖G‖ with Π the projection on its
  rows, and has to be as orthonormal as eager's: directions without gradient are arbitrary.  Where it differs, the eager
  runs go on with the compiled step's, so what follows from it is compared exactly.
- A projected weight is also compared in its projector's coordinates, and beside them, where rounding decides some of
  these: a direction without gradient is in every element.
- INT8 weights, 8-bit moments and 16-bit weights count as what they decode to, and a flip or two need no explanation.

Integers, ``step`` and the schedules' clocks are exact; NaN must be in the same places.  Differences below 1e-3 of a
movement's rms, or 1e-6 of a tensor's largest element (the contract of ``docs/architecture.md``), nobody looks at; where
eager moved nothing the latter alone.  What no comparison can tell is the sign of an update that is rounding noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from qgalore_compile.reports.compared import Compared, TensorError, compare, wrong
from qgalore_compile.reports.copies import Copier, CopyError, alone
from qgalore_compile.reports.judgement import Rates
from qgalore_compile.reports.perturbed import Perturbed, Products
from qgalore_compile.reports.plain_text import plain_text
from qgalore_compile.reports.reach import Entry, bound, entries
from qgalore_compile.reports.runs import Run, eager, generators

__all__ = ["CheckResult", "CopyError", "TensorError", "check"]

_ROUNDS = (3, 5, 8)
"""Perturbed eager runs: at first, and more, twice, while a tensor seems wrong."""


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
    Effects outside tensors (printing, files) happen once a run: five times, or up to eighteen where a tensor seems
    wrong, and so many copies of what the step reaches are in memory at once.  A step that draws random numbers is
    compiled with Inductor's ``fallback_random``, so that all draw the same.  Whatever a run raises is raised.

    Raises:
        ValueError: the step reaches no tensor.
        CopyError: it reaches something that has no copy.
    """
    import qgalore_compile.backend.entry  # noqa: F401  # here: it loads Inductor, and lets Dynamo trace backward()
    from qgalore_compile._torch import inductor_config as config

    roots = {"": step, **bound(step, args, kwargs)}
    before = _reached(roots)
    call = (step, args, kwargs)
    states = generators()
    try:
        watch = Products()
        plain = eager(roots, call, watch, {})
        drawn = generators()
        drew = not all(map(torch.equal, states, drawn))
        generators(states)
        with config.patch(fallback_random=drew or config.fallback_random):
            compiled = _compiled(roots, call, backend, options)
        draws_alike = all(map(torch.equal, drawn, generators()))
        follow = _to_follow(plain, compiled)
        products = _lowest({_OF_SETTING.get(torch.get_float32_matmul_precision()), _gemm(options)} - {None})

        def run(seed: int) -> Run:
            if seed == 0 and not follow:
                return plain
            generators(states)
            return eager(roots, call, Perturbed(seed, products) if seed else nullcontext(), follow)

        errors = judged(before, compiled, run)
    finally:
        generators(states)
    if not draws_alike:
        errors.insert(0, wrong("torch's generator", "it goes on elsewhere than behind the eager step").error)
    precision = _lowest({products, *watch.dtypes})
    return CheckResult(tuple(errors), str(precision).removeprefix("torch."))


def _reached(roots: dict[str, Any]) -> dict[str, Entry]:
    """The tensors that a step reaches, by name; ValueError where there is none."""
    if not (found := entries(roots)):
        raise ValueError(
            "check compares tensors, and this step reaches none; pass a step that has model and optimizer as closure "
            "variables, globals, attributes of its object, or arguments"
        )
    return found


_PRECISION = (torch.float32, torch.float16, torch.bfloat16)
_OF_SETTING = {"high": torch.float16, "medium": torch.bfloat16}
"""What rounds as products of float32 do, by ``torch.get_float32_matmul_precision()``; TF32 has float16's fraction."""


def _gemm(options: dict[str, Any] | None) -> torch.dtype | None:
    return torch.bfloat16 if (options or {}).get("gemm") == "bf16" else None


def _lowest(dtypes: set[torch.dtype | None]) -> torch.dtype | None:
    """That rounds most; None of nothing."""
    return max(dtypes & {*_PRECISION}, key=_PRECISION.index, default=None)


def _compiled(
    roots: dict[str, Any],
    call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]],
    backend: str | Callable[..., Any],
    options: dict[str, Any] | None,
) -> Run:
    from qgalore_compile.backend.tracing import traced_as_step  # loads Dynamo

    with closing(Copier(roots)) as copier:
        step, args, kwargs = map(copier.copy, call)
        compiled = torch.compile(alone(step), backend=traced_as_step(backend), options=options, fullgraph=True)
        result = compiled(*args, **kwargs)
        return Run(entries({**{name: copier.copy(x) for name, x in roots.items()}, "result": result}))


def _to_follow(plain: Run, compiled: Run) -> dict[str, Sequence[Tensor]]:
    """Projectors that the eager runs shall go on with: the compiled step's, where both have one anew, not the same."""
    follow: dict[str, Sequence[Tensor]] = {}
    for name, own in plain.renewed.items():
        entry = compiled.entries.get(name)
        stored = entry.projector_parts() if entry is not None and name not in plain.again else []
        alike = len(stored) == len(own.stored) and all(
            (x.shape, x.dtype) == (y.shape, y.dtype) for x, y in zip(stored, own.stored, strict=True)
        )
        if alike and not all(map(torch.equal, stored, own.stored)):
            follow[name] = [x.clone() for x in stored]
    return follow


def judged(before: dict[str, Entry], compiled: Run, run: Callable[[int], Run]) -> list[TensorError]:
    """Every tensor, the worst first.

    Args:
        run: gives the eager run of this seed, 0 the unperturbed one; asked for more while a tensor seems wrong.
    """
    runs = [run(0)]
    names = dict.fromkeys((*runs[0].entries, *compiled.entries))

    def compared() -> Iterator[Compared]:  # one at a time: each is (2 + K) float64 copies of its tensor and more
        return (compare(name, before.get(name), compiled, runs) for name in names)

    for more in _ROUNDS:
        runs += [run(len(runs) + one) for one in range(more)]
        rates = Rates(sample for each in compared() for sample in each.samples.values())
        errors = [each.judged(rates) for each in compared()]
        if all(error.ok for error in errors):
            break
    return sorted(errors, key=lambda error: (error.ok, -error.relative / max(error.tolerance, 1e-6)))
