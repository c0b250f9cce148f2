"""A step whose weights, moments and projectors are in other formats is fused throughout, and is the eager one.

One more combination, in a step with a refresh as well, is in ``tests/optim/test_formats.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from formats_support import batch, made
from kernels_support import EVALUATOR, evaluate_gemm, evaluate_region
from support import Interpreted, training_step

import qgalore_compile as qg
from qgalore_compile.formats import Format
from qgalore_compile.kernels import lowering
from qgalore_compile.subspace.moments import MomentFormats

COMBINATIONS = [
    ("int4/32", "e4m3/128", "int4/32+planar"),
    ("nf4/64+double", "4bit", "int6/32+pow2row"),
    ("int6/32+pow2", "e5m2/128+pow2", "e2m1/32+rotated"),
    ("int8/32+rotated", "bfloat16", "e3m2/32"),
    ("e2m1/32+rotated", "8bit", "nf4/32+double"),
]


@pytest.mark.parametrize(("weights", "moments", "projector"), COMBINATIONS, ids=lambda text: text)
def test_every_layer_is_fused_and_a_step_is_the_eager_one(weights: str, moments: str, projector: str) -> None:
    net, opt = made(weights, moments=moments, projector_format=projector)
    step, programs = training_step(net, opt), list[str]()
    step(batch())

    def region(text: str, *rest: Any) -> None:
        programs.append(text)
        evaluate_region(text, *rest)

    def gemm(text: str, *rest: Any) -> None:
        programs.append(text)
        evaluate_gemm(text, *rest)

    with lowering.registered(replace(EVALUATOR, run_program=region, run_gemm=gemm)):
        found = qg.check(step, batch(1), backend=Interpreted(strict=True))  # strict: what is not fused is an error
    assert found.ok, found
    errors = {error.name: error for error in found.errors}
    assert errors["model.blocks.0.weight"].codes_differing is not None
    assert errors["model.blocks.0.weight"].moved > 0
    buffers = [line.split() for text in programs for line in text.splitlines() if line.endswith((" out", " inout"))]
    written = {word for words in buffers for word in words}
    formats = MomentFormats.parse(moments)
    for form in (each.grouped or each for each in (Format.parse(weights), formats.first, formats.second)):
        assert {part.memory for part in form.parts if part.extent == "element"} <= written, form
