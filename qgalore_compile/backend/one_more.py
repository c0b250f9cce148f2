"""What tracing makes of a graph with one layer more than it is shown, for ``unroll`` to compare with.

    shown       seven layers                 with one put back: eight
    here        eight layers, up to the pass ``unroll``, as text

Whatever a step does with the number of its layers (counts them, averages over them, writes one buffer in each) is
another graph then, and nothing is put back.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from torch import fx

from qgalore_compile._torch import compile_fx
from qgalore_compile.passes import PassManager
from qgalore_compile.passes.columns import Uneven
from qgalore_compile.passes.unroll import spelled_out


class _Traced(BaseException):
    """Ends a compilation whose graph is known.  No Exception, which Inductor would wrap."""


class _Probe(PassManager):
    """Runs what stands in front of ``unroll``, and keeps the graph as text; of a graph of some of the inputs."""

    def __init__(self, of: PassManager, inputs: Sequence[int]) -> None:
        self.__dict__.update(of.__dict__)
        place: dict[int | str, int | str] = {old: new for new, old in enumerate(inputs)}
        self.input_names = {place.get(at, at): name for at, name in of.input_names.items()
                            if at in place or isinstance(at, str)}  # fmt: skip
        if of.parameters is not None:
            self.parameters = {place.get(at, at) for at in of.parameters if at in place or isinstance(at, str)}
        self.passes = tuple(takewhile(lambda each: each.name != "unroll", of.passes))
        self.salt = f"/{secrets.token_hex()}"  # nothing of it comes from a cache
        self.compiles = False
        self.seen: list[str] = []

    def __call__(self, graph: fx.Graph) -> None:
        super().__call__(graph)
        self.seen = spelled_out(graph)
        raise _Traced


def traced(
    gm: fx.GraphModule, example_inputs: Sequence[Any], manager: PassManager, settings: dict[str, Any]
) -> list[str]:
    """The graph that ``unroll`` would be given of a module, as text.

    Args:
        gm: a graph of Dynamo's without most of its layers; inputs that nobody reads are taken out of it, in place:
            AOTAutograd takes half a second for those of a layer.
        example_inputs: all.
        manager: of the passes.
        settings: of ``compile_fx``.

    Raises:
        Uneven: it is no graph by itself.
    """
    read = []
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if node.users:
            read.append(index)
        else:
            gm.graph.erase_node(node)
    gm.recompile()
    example_inputs = [example_inputs[index] for index in read]
    probe = _Probe(manager, read)
    patches = dict(settings["config_patches"])
    name = "post_grad_custom_post_pass"
    patches[name] = [probe if each is manager else each for each in patches[name]]
    try:
        compile_fx(gm, example_inputs, **{**settings, "config_patches": patches})
    except _Traced:
        return probe.seen
    except Exception as error:
        raise Uneven(f"with fewer layers it cannot be traced: {error}") from error
    raise Uneven("no pass of ours ran")
