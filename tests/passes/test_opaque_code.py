"""What Inductor makes of outlined functions: the code of each once, and a call for every layer."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from quantised_products import GROUP, stored_int8
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

from qgalore_compile import formats

T, N, R = 7, 12, 4


@pytest.mark.compiles
@inductor_config.patch(fx_graph_cache=False)  # the run's cache has no code to show
@pytest.mark.parametrize("dynamic", [False, True])
def test_generated_code_holds_each_function_once(dynamic: bool) -> None:
    """A step with one INT8 layer that is read twice, for one batch size and for any."""

    def step(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, p: Tensor, m: Tensor) -> Tensor:
        first = torch.tanh(x @ formats.dequantize_int8(codes, scale, offset, GROUP).t())
        y = torch.tanh(first @ formats.dequantize_int8(codes, scale, offset, GROUP).t())
        momentum = 0.9 * m + 0.1 * (y.t() @ first @ p.t())
        weight = formats.dequantize_int8(codes, scale, offset, GROUP) - 0.1 * (momentum @ p)
        m.copy_(momentum)
        for part, new in zip((codes, scale, offset), formats.quantize_int8(weight, GROUP)[:3], strict=True):
            part.copy_(new)
        return y.sum()

    inputs = [*stored_int8(N, N), torch.randn(R, N), torch.randn(N, R)]
    options = {"disable": ["fuse", "fuse_products"]}  # what they leave, or all of it on a device that they do not know
    compiled = torch.compile(step, backend="qgalore", fullgraph=True, options=options)
    for tokens in (T, T + 2) if dynamic else (T,):
        x = torch.randn(tokens, N)
        eager, given = ([each.clone() for each in inputs] for _ in range(2))
        expected = step(x, *eager)
        if tokens == T:
            if dynamic:
                torch._dynamo.mark_dynamic(x, 0)
            found, (code,) = run_and_get_code(compiled, x, *given)
        else:
            with torch.compiler.set_stance("fail_on_recompile"):
                found = compiled(x, *given)
        torch.testing.assert_close(found, expected)
        for one, other in zip(given[1:], eager[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    made = Counter(re.findall(r"^def (qgalore_[a-z]+)_\d+\(", code, re.M))
    assert made == {"qgalore_product": 1, "qgalore_update": 1}
    called = Counter(re.findall(r" = (qgalore_[a-z]+)_\d+\(", code[code.index("def call(self, args):") :]))
    assert called == {"qgalore_product": 2, "qgalore_update": 1}
