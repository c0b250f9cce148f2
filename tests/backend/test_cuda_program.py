"""The program that Inductor emits for a GPU, of a whole step with INT8 weights and 8-bit moments, made without one."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest
import torch
from fake_cuda import Program, emitted, fake_cuda, llama_step
from torch._inductor.fx_passes.reinplace import ReinplaceCounters

from qgalore_compile.backend.host_reads import in_program

pytestmark = [
    pytest.mark.triton,
    pytest.mark.slow,
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="the stand-ins are for builds of torch without CUDA"),
]

WIDTH, RANK, PROJECTED = 96, 16, 7
"""The step has 64 tokens, so that no activation has a weight's shape."""
PLAIN = 5
"""Embedding, head and three norms, in bfloat16: however small, they draw random bits, and so are kernels."""

NUMBERS = 21
"""lr, weight_decay, eps, three of each beta and their least root, of both groups; the scale of the projected one."""


@pytest.fixture(scope="module")
def program(inductor_cache: object) -> Program:
    torch._dynamo.reset()
    ReinplaceCounters.clear()
    with fake_cuda():
        step, inputs = llama_step(layers=1, width=WIDTH, rank=RANK)
        return emitted(step, *inputs, backend="qgalore", strict=True)


def test_a_layers_update_takes_three_launches_beside_one_library_product(program: Program) -> None:
    # INT4 down-projection, region, write-back; the forward and the input's gradient are two more products a layer
    assert program.launches() == {"product": 3 * PROJECTED, "region": PROJECTED + PLAIN, "write-back": PROJECTED}


def test_equal_layers_share_a_kernel(program: Program) -> None:
    square = (f"tiles_m = ({WIDTH} ", f"tiles_n = ({WIDTH} ", "e_b1")
    (shared,) = (name for name, source in program.kernels().items() if all(each in source for each in square))
    assert len(program.calls(shared)) == 4  # q, k, v and o


def test_every_weight_is_rounded_with_its_own_number(program: Program) -> None:
    tables: dict[str, set[int]] = defaultdict(set)
    for table, place in re.findall(r"reinterpret_tensor\((buf\d+), \(\), \(\), (\d+)\)", program.text):
        tables[table].add(int(place))
    # 16 bytes apart, or Inductor would compile two kernels
    assert sorted(tables.values(), key=len) == [set(range(0, 4 * size, 4)) for size in (PROJECTED + PLAIN, NUMBERS)]


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


def test_nothing_waits_for_the_gpu(program: Program) -> None:
    # the numbers of both groups, scalars on the CPU, are arguments of one kernel
    assert not re.findall(r"\.copy_\(|\.cpu\(|buf\d+\.item\(|synchronize", program.text)
    (call,) = re.findall(r"\.run\((.*\.item\(\).*)\)", program.text)
    assert call.count(".item()") == NUMBERS


def test_a_step_to_be_replayed_has_its_numbers_on_the_device_and_reads_nothing_on_the_host(
    inductor_cache: object,
) -> None:
    torch._dynamo.reset()
    with fake_cuda():
        step, inputs = llama_step(layers=1, width=WIDTH, rank=RANK)
        replayed = emitted(step, *inputs, backend="qgalore", strict=True, cudagraphs=True)
    assert in_program(replayed.text) is None
    assert replayed.launches() == {"product": 3 * PROJECTED, "region": PROJECTED + PLAIN, "write-back": PROJECTED}
    assert replayed.text.count("qgalore_calls.refresh_(") == PROJECTED
    assert "def partition_" not in replayed.text


def test_numbers_that_are_arguments_of_a_launch_would_be_kept_by_a_graph(program: Program) -> None:
    assert re.fullmatch(r"a kernel takes arg\d+_1 from the host as an argument", in_program(program.text) or "")
