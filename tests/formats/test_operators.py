"""``encode`` and ``decode`` in traced programs: one node each, or traced through, with the same numbers."""

from __future__ import annotations

import pytest
import torch
from formats_support import ALL, draws, numbers
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from qgalore_compile.formats import Format, decode, encode

ENCODE, DECODE = torch.ops.qgalore.encode.default, torch.ops.qgalore.decode.default
SHAPE = (3, 77)


@pytest.mark.parametrize("text", ALL)
def test_the_operators_mean_what_the_format_does(text: str) -> None:
    form, x, noise = Format.parse(text), numbers(SHAPE, text), draws(SHAPE)
    assert all(map(torch.equal, encode(x, form, noise), form.encode(x, noise)))
    stored = form.encode(x)
    assert torch.equal(decode(stored, SHAPE, form, torch.bfloat16), form.decode(stored, SHAPE, torch.bfloat16))


@pytest.mark.parametrize("text", ALL)
def test_a_trace_has_a_node_for_each_unless_it_goes_through(text: str) -> None:
    form = Format.parse(text)

    def both(x: Tensor, noise: Tensor) -> Tensor:
        return decode(encode(x, form, noise), SHAPE, form)

    x, noise = numbers(SHAPE, text), draws(SHAPE)
    graph = make_fx(both, tracing_mode="fake")(x, noise)
    own = form.grouped or form
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(ENCODE) == targets.count(DECODE) == (0 if own.inline else 1)
    texts = {node.args[2] for node in graph.graph.nodes if node.target in (ENCODE, DECODE)}
    assert texts == (set() if own.inline else {str(own)})
    assert torch.equal(graph(x, noise), both(x, noise))


@pytest.mark.parametrize("text", ["e4m3/32", "int6/32", "nf4/32+rotated", "int4/32+flat", "e2m1/32+pow2row"])
def test_schemas_and_fakes_are_right(text: str) -> None:
    form, checks = Format.parse(text), ("test_schema", "test_faketensor")
    for x in (torch.randn(SHAPE), torch.randn(77, 3).t(), torch.zeros(0, 5)):
        torch.library.opcheck(ENCODE, (x, None, text), test_utils=checks)
        stored = form.encode(x)
        torch.library.opcheck(DECODE, (stored, list(x.shape), text, torch.bfloat16), test_utils=checks)
