"""The program that Inductor emits for a GPU, of a whole step with INT8 weights and 8-bit moments, made without one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from fake_cuda import Program, emitted, fake_cuda, llama_step
from torch import Tensor, nn
from torch._inductor.fx_passes.reinplace import ReinplaceCounters
from torch._subclasses import FakeTensorMode

import qgalore_compile as qg
from qgalore_compile.llama import move_

pytestmark = [
    pytest.mark.triton,
    pytest.mark.slow,
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="the stand-ins are for builds of torch without CUDA"),
]

WIDTH, RANK, PROJECTED = 96, 16, 7
"""The step has 64 tokens, so that no activation has a weight's shape."""


@pytest.fixture(scope="module")
def program(inductor_cache: object) -> Iterator[Program]:
    torch._dynamo.reset()
    ReinplaceCounters.clear()
    with fake_cuda():
        step, inputs = llama_step(layers=1, width=WIDTH, rank=RANK)
        yield emitted(step, *inputs, backend="qgalore", strict=True)


def odd_step(out: int) -> tuple[Callable[[Tensor], Tensor], tuple[Tensor]]:
    """A step of one INT8 layer whose rows do not align, and of a head; on fake tensors of device "cuda"."""
    with FakeTensorMode():
        model = move_(
            nn.Sequential(nn.Linear(64, out, bias=False), nn.SiLU(), nn.Linear(out, 77)), torch.bfloat16, "cuda"
        )
        qg.quantize_(model, group_size=64, targets=["0"])
        opt = qg.QGaLoreAdamW(qg.param_groups(model, rank=16, targets=["0"]), lr=1e-2)
        x = torch.zeros(80, 64, dtype=torch.bfloat16, device="cuda")

    def step(x: Tensor) -> Tensor:
        loss = model(x).float().square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    return step, (x,)


def launches(program: Program) -> Counter[str]:
    """How often the program launches each kind of generated kernel."""
    found: Counter[str] = Counter()
    for name, source in program.kernels().items():
        (arguments,) = re.findall(r"^def (?:gemm|region)\((.*)\):", source, re.MULTILINE) or [""]
        if arguments:
            kind = "region" if name.startswith("region") else "write-back" if "e_" in arguments else "product"
            found[kind] += len(program.calls(name))
    return found


def test_a_layers_update_takes_three_launches_beside_one_library_product(program: Program) -> None:
    # INT4 down-projection, region, write-back; the forward and the input's gradient are two more products a layer
    found = launches(program)
    assert found == {"product": 3 * PROJECTED, "region": PROJECTED, "write-back": PROJECTED}


def test_equal_layers_share_a_kernel(program: Program) -> None:
    square = (f"tiles_m = ({WIDTH} ", f"tiles_n = ({WIDTH} ", "e_b1")
    (shared,) = (name for name, source in program.kernels().items() if all(each in source for each in square))
    assert len(program.calls(shared)) == 4  # q, k, v and o


def test_every_weight_is_rounded_with_its_own_number(program: Program) -> None:
    numbers = re.findall(r"reinterpret_tensor\(buf\d+, \(\), \(\), (\d+)\)", program.text)
    assert len(set(numbers)) == PROJECTED
    assert all(int(number) % 4 == 0 for number in numbers)  # 16 bytes apart, or Inductor would compile two kernels


def test_no_tensor_has_the_size_of_a_weights_gradient(program: Program) -> None:
    sizes = {(WIDTH, WIDTH), (2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH)}
    made = re.findall(r"empty_strided_cuda\(\(([\d, ]+)\), \([\d, ]+\), (torch\.\w+)\)", program.text)
    made_sizes = [(tuple(int(size) for size in shape.split(",") if size.strip()), kind) for shape, kind in made]
    assert made_sizes
    assert not [each for each in made_sizes if each[0] in sizes]


def test_states_and_weights_are_written_in_place(program: Program) -> None:
    assert ReinplaceCounters.get_total_missed() == 0
    allocated = set(program.allocations())
    for name, source in program.kernels().items():
        (arguments,) = re.findall(r"^def gemm\((.*e_.*)\):", source, re.MULTILINE) or [""]
        written = [index for index, argument in enumerate(arguments.split(", ")) if f"tl.store({argument} " in source]
        assert bool(arguments) == bool(written)
        for call in program.calls(name) if arguments else []:
            assert not allocated & {call[index] for index in written}, name
            assert all(call[index].startswith("arg") for index in written), name


def test_no_kernel_takes_a_float64(program: Program) -> None:
    assert program.signatures()
    assert "fp64" not in program.signatures()


def test_the_learning_rate_is_copied_to_the_gpu_once(program: Program) -> None:
    moved = re.findall(r"^\s*(buf\d+)\.copy_\(arg\d+_1, False\)", program.text, re.MULTILINE)
    assert len(moved) == 1


def test_a_layer_of_odd_width_is_fused_where_inductor_pads_products() -> None:
    torch._dynamo.reset()
    with fake_cuda(padding=True):
        step, inputs = odd_step(out=101)
        program = emitted(step, *inputs, backend="qgalore", strict=True)
    assert launches(program) == {"product": 2, "region": 1, "write-back": 1}  # the forward, X Pᵀ
    assert "constant_pad_nd" in program.text  # the head's products stay padded
