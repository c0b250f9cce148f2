"""One view of a call that changes tensors, in the functional form that it has in a graph.

    %call = auto_functionalized_v2(op, read=[%x], _written_length=1, _written_0_base_index=0, _all_bases=[%w])
    %new  = getitem(%call, 1)                                                   what %w holds behind the call

``_all_bases`` holds the tensors that the op changes, and each argument that it changes is spelled as its place there.
Nobody else spells that form.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx

from qgalore_compile._torch import OpOverload
from qgalore_compile.kernels.read.fx_values import value

T = TypeVar("T")

FUNCTIONALIZED = torch.ops.higher_order.auto_functionalized_v2
"""The functional form of an op that changes its arguments: its results are the new versions of those."""


@dataclass(frozen=True)
class Mutation:
    """A call of ``FUNCTIONALIZED``.

    Attributes:
        node: the call.
    """

    node: fx.Node

    @classmethod
    def of(cls, node: fx.Node, *ops: OpOverload[..., Any]) -> Mutation | None:
        """The view of a node; None where it is no such call, or one of none of these ``ops``, where any are given."""
        if node.target is not FUNCTIONALIZED or (ops and node.args[0] not in ops):
            return None
        return cls(node)

    @property
    def op(self) -> OpOverload[..., Any]:
        """What is called."""
        op: Any = self.node.args[0]
        return op  # type: ignore[no-any-return]

    @property
    def written(self) -> list[fx.Node]:
        """The tensors that the call changes, as they are before it, in the order of its results."""
        bases: Any = self.node.kwargs["_all_bases"]
        return list(bases)

    @property
    def reads(self) -> list[fx.Node]:
        """What the op is given as ``read``, the tensors that a generated kernel reads and does not change."""
        return list(self["read"])

    @property
    def program(self) -> str:
        """The text of the generated kernel that is called."""
        return str(self["program"])

    def __getitem__(self, name: str) -> Any:
        """What the op is given as an argument of its schema; of one that it changes, the tensors as they are before."""
        given = self.node.kwargs
        if name in given:
            return given[name]
        if f"_{name}_length" in given:
            length: Any = given[f"_{name}_length"]
            return [self._base(f"_{name}_{index}_base_index") for index in range(length)]
        return self._base(f"_{name}_base_index")

    def _base(self, key: str) -> fx.Node:
        bases: Any = self.node.kwargs["_all_bases"]
        base: fx.Node = bases[self.node.kwargs[key]]
        return base

    def result(self, index: int) -> fx.Node | None:
        """The node of what ``written[index]`` holds behind the call; None where nobody reads it."""
        return next((result for place, result in self.results() if place == index), None)

    def results(self) -> list[tuple[int, fx.Node]]:
        """(index, node) of what each of ``written`` holds behind the call, as far as somebody reads it."""
        places: list[tuple[Any, fx.Node]] = [(user.args[1], user) for user in self.node.users]
        return [(place - self._returned, user) for place, user in places if place >= self._returned]

    def before(self, result: fx.Node) -> fx.Node | None:
        """What a result of the call was before it; None where it is something that the op returns."""
        place: Any = result.args[1]
        written = self.written
        return written[place - self._returned] if 0 <= place - self._returned < len(written) else None

    @property
    def _returned(self) -> int:
        """Results that come first: what the op returns, or one None where it returns nothing."""
        return max(len(self.op._schema.returns), 1)

    def with_(self, *, reads: Sequence[fx.Node] | None = None, **given: Any) -> Mutation:
        """The same call with other arguments, none of which it changes, by name; ``reads`` stands for ``read``."""
        more = given if reads is None else {**given, "read": list(reads)}
        unknown = more.keys() - self.node.kwargs.keys()
        if unknown:
            raise ValueError(f"{self.op} takes no {', '.join(sorted(unknown))}, or changes it")
        self.node.kwargs = {**self.node.kwargs, **more}
        arguments_changed(self.node)
        return self

    @classmethod
    def call(
        cls, graph: fx.Graph, op: OpOverload[..., Any], written: Mapping[str, fx.Node | Sequence[fx.Node]], **given: Any
    ) -> tuple[Mutation, list[fx.Node]]:
        """A new call of an op that returns nothing, at the graph's insertion point: (the call, what each tensor that it
        changes holds behind it).

        Args:
            written: the arguments that it changes, by name.
            **given: its others.
        """
        made = cls(graph.call_function(FUNCTIONALIZED, (op,), functional_arguments(written, given)))
        bases = made.written
        made.node.meta["val"] = (None, *map(value, bases))
        results = []
        for index, base in enumerate(bases):
            result = graph.call_function(operator.getitem, (made.node, index + made._returned))
            result.meta = {"val": value(base)}
            results.append(result)
        return made, results


def functional_arguments(written: Mapping[str, T | Sequence[T]], given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of ``FUNCTIONALIZED`` for an op with these arguments: nodes, or tensors while tracing."""
    places: dict[str, int] = {}
    bases: list[T] = []
    for name, argument in written.items():
        if isinstance(argument, (list, tuple)):
            places[f"_{name}_length"] = len(argument)
            places |= {f"_{name}_{index}_base_index": len(bases) + index for index in range(len(argument))}
            bases += argument
        else:
            places[f"_{name}_base_index"] = len(bases)
            bases.append(argument)  # type: ignore[arg-type]  # a sequence of tensors is no tensor
    return {**given, **places, "_all_bases": bases}


def arguments_changed(call: fx.Node) -> bool:
    """Forget the arguments that tracing saw: Inductor checks a mutating op's against them.  True, as a callback."""
    call.meta.pop("eager_input_vals", None)
    return True
