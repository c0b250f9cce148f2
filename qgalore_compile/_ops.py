"""Registration of the project's operators: what stays one node in a traced program.

Bulky elementary pieces (Philox, the dynamic 8-bit code) are one op each, since spelled out they multiply the nodes that
Dynamo, AOTAutograd and Inductor walk over; the refresh is one because it decides at run time.  All of them are
implemented by plain PyTorch functions, the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from qgalore_compile._torch import OpOverload, after_inplace_or_view, dispatch_modes, profiler_enabled

_library = torch.library.Library("qgalore", "FRAGMENT")


def define(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any] | None, *tags: torch.Tag
) -> OpOverload[..., Any]:
    """Register ``torch.ops.qgalore.<name>`` and return its overload.

    Args:
        schema: PyTorch's notation, an overload's name behind a dot; mutated arguments carry an alias annotation.
        implementation: called below autograd, for every device.
        fake: returns empty tensors of the results' metadata, for tracing; None where ``implementation`` can be traced
            itself, being plain PyTorch without a look at values.
        tags: of the op.
    """
    name = schema[: schema.index("(")]
    _library.define(schema, tags=tags)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"qgalore::{name}", fake, lib=_library)
    return _overload(name)


calls = SimpleNamespace()
"""Functions that do what an operator does without PyTorch's dispatcher, which takes 7 to 13 µs of a call: it copies a
program's text, and the lists.  Generated code calls them (:mod:`qgalore_compile.backend.direct`)."""

DIRECT: dict[Any, str] = {}
"""By operator: its function's name in :data:`calls`."""


def called_directly(op: OpOverload[..., Any], implementation: Callable[..., Any]) -> None:
    """Let generated code call an operator's implementation; where a profiler or a dispatch mode (fake tensors, counters
    of operations) looks on, the operator."""

    def call(*given: Any) -> Any:
        return op(*given) if profiler_enabled() or dispatch_modes() else implementation(*given)

    DIRECT[op] = name = op.name().removeprefix("qgalore::").replace(".", "_")
    setattr(calls, name, call)


def written_places(op: OpOverload[..., Any]) -> tuple[int, ...]:
    """The arguments that an operator's schema says it writes."""
    return tuple(place for place, each in enumerate(op._schema.arguments) if each.alias_info is not None)


def count_writes(op: OpOverload[..., Any]) -> None:
    """Let autograd know what an operator writes, as it does of PyTorch's own: the version counters of those arguments
    rise, in tracing too."""
    written = written_places(op)

    def counting(keys: Any, *args: Any) -> Any:
        for index in written:
            torch.autograd.graph.increment_version(args[index])
        return op.redispatch(keys & after_inplace_or_view, *args)

    _library.impl(op.name().removeprefix("qgalore::"), counting, "ADInplaceOrView", with_keyset=True)


def define_traced(schema: str, function: Callable[..., Any]) -> OpOverload[..., Any]:
    """Register an operator that is traced through wherever it is traced below Dynamo; see :func:`define`."""
    name = schema[: schema.index("(")]
    _library.define(schema)
    _library.impl(name, function, "CompositeImplicitAutograd")
    return _overload(name)


def _overload(name: str) -> OpOverload[..., Any]:
    name, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.qgalore, name), overload or "default")  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Numbered:
    """The overload of an operator that takes numbers of parameters as tensors: 0-d, int64, on the CPU.

    Attributes:
        overload: ``<name>.numbered``.
        argument, index: what is a tensor, or a list of tensors, there.
    """

    overload: OpOverload[..., Any]
    argument: str
    index: int


NUMBERED: dict[Any, Numbered] = {}
"""By operator.  A function that several layers share cannot hold the number of one of them."""


def numbered(
    op: OpOverload[..., Any], argument: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Define an operator's overload that takes an argument, an int or ints, as tensors."""
    schema = str(op._schema).removeprefix("qgalore::")
    index = [each.name for each in op._schema.arguments].index(argument)
    name, _, overload = schema[: schema.index("(")].partition(".")
    full = f"{name}.{overload}_numbered" if overload else f"{name}.numbered"
    wanted = schema[schema.index("(") :]
    wanted = wanted.replace(f"int {argument}", f"Tensor {argument}").replace(
        f"int[] {argument}", f"Tensor[] {argument}"
    )

    def with_numbers(*given: Any) -> Any:
        held = given[index]
        found = [int(each) for each in held] if isinstance(held, (list, tuple)) else int(held)
        return implementation(*given[:index], found, *given[index + 1 :])

    overloaded = define(f"{full}{wanted}", with_numbers, fake, *op.tags)
    if op in DIRECT:
        called_directly(overloaded, with_numbers)
    NUMBERED[op] = Numbered(overloaded, argument, index)
