"""What the tests of kernels share: buffers by name, random contents, and the two ways to run a program."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qgalore_compile.kernels import cpu
from qgalore_compile.kernels.evaluate import MEMORY_DTYPES, evaluate
from qgalore_compile.kernels.program import BlockProgram, Buffer, Space

Tensors = dict[str, Tensor]


def program(space: Space, *buffers: str, numbers: tuple[str, ...] = ()) -> BlockProgram:
    """An empty program with buffers spelled "name memory extent access"."""
    made = BlockProgram(space, numbers=list(numbers))
    made.buffers = [Buffer(*each.split()) for each in buffers]
    return made


def load(made: BlockProgram, name: str) -> int:
    """The number of a buffer's load."""
    return made.emit("load", names=(name,))


def shape_of(buffer: Buffer, space: Space) -> tuple[int, ...]:
    """The shape of a buffer's tensor."""
    if buffer.memory == "u4":
        return space.rows, -(-space.columns // 2)
    return {
        "scalar": (), "row": (space.rows,), "column": (space.columns,), "group": (space.rows, space.groups),
        "element": (space.rows, space.columns),
    }[buffer.extent]  # fmt: skip


def filled(made: BlockProgram, **given: Tensor) -> Tensors:
    """A tensor for each buffer: those that are given, the others random and of sizes around 1."""
    tensors = {}
    for buffer in made.buffers:
        size, dtype = shape_of(buffer, made.space), MEMORY_DTYPES[buffer.memory]
        if buffer.name in given:
            tensors[buffer.name] = given[buffer.name].to(dtype).reshape(size).contiguous()
        elif dtype.is_floating_point:
            tensors[buffer.name] = torch.randn(size).to(dtype)
        elif dtype == torch.bool:
            tensors[buffer.name] = torch.rand(size) < 0.5
        else:
            low, high = (0, 256) if dtype == torch.uint8 else (-100, 100)
            tensors[buffer.name] = torch.randint(low, high, size).to(dtype)
    return tensors


def evaluated(made: BlockProgram, tensors: Tensors, numbers: Mapping[str, int] | None = None) -> Tensors:
    """What ``evaluate`` leaves in the buffers; ``tensors`` stay."""
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    evaluate(made, copies, numbers)
    return copies


def compiled(made: BlockProgram, tensors: Tensors, numbers: Mapping[str, int] | None = None) -> Tensors:
    """What the compiled program leaves in the buffers; ``tensors`` stay."""
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    kernel = cpu.kernel(str(made))
    kernel(copies, [(numbers or {})[name] for name in made.numbers])
    return copies


def assert_like(found: Tensors, expected: Tensors, made: BlockProgram, tolerance: float = 1e-6) -> None:
    """Integers and bools are equal; floats within ``tolerance`` of the largest in their group, plus the memory's own
    rounding; NaN and infinities stand in the same places."""
    assert found.keys() == expected.keys()
    for buffer in made.buffers:
        one, other = found[buffer.name], expected[buffer.name]
        assert one.dtype == other.dtype
        if not other.dtype.is_floating_point:
            assert torch.equal(one, other), buffer.name
            continue
        assert torch.equal(one.isnan(), other.isnan()), f"{buffer.name}: NaN in other places"
        assert torch.equal(one.isinf() * one.sign(), other.isinf() * other.sign()), f"{buffer.name}: infinities"
        rounding = 0.0 if other.dtype == torch.float32 else torch.finfo(other.dtype).eps
        one, other = (torch.nan_to_num(each.double(), 0.0, 0.0, 0.0) for each in (one, other))
        limit = tolerance * _group_sizes(other, buffer, made.space) + rounding * other.abs() + 1e-37
        worst = float(((one - other).abs() / limit).max())
        assert worst <= 1, f"{buffer.name}: {worst:.3g} times what is allowed"


def _group_sizes(values: Tensor, buffer: Buffer, space: Space) -> Tensor:
    """The largest absolute value in each element's group; elsewhere in the whole."""
    if buffer.extent != "element":
        return values.abs().amax()
    missing = space.groups * space.width - space.columns
    groups = torch.nn.functional.pad(values.abs(), (0, missing)).view(space.rows, space.groups, space.width)
    return groups.amax(-1).repeat_interleave(space.width, -1)[:, : space.columns]
