"""Run a :class:`BlockProgram` with PyTorch operations: the oracle that every printer is tested against.

Nothing is blocked here and nothing is clever.  Values of extent "element" are whole (rows, columns) tensors, "group"
values (rows, groups), "row" (rows, 1), "column" (1, columns), "scalar" ().
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qgalore_compile.formats.packing import pack, unpack, unpack_int4
from qgalore_compile.formats.rotation import rotated
from qgalore_compile.kernels.ir.dynamic8 import expanded
from qgalore_compile.kernels.ir.memory import MEMORY, PACKED
from qgalore_compile.kernels.ir.program import REDUCTIONS, TYPES, BlockProgram, Buffer, Instruction, Space, number_of
from qgalore_compile.rng import random_bits

_DTYPES = {kind: MEMORY[kind].dtype for kind in TYPES}

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "shl": torch.bitwise_left_shift,
    "shr": torch.bitwise_right_shift,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
    "bitand": torch.bitwise_and,
    "bitor": torch.bitwise_or,
    "bitxor": torch.bitwise_xor,
    **{kind: (lambda x, dtype=dtype: x.to(dtype)) for kind, dtype in _DTYPES.items()},
    "as_i32": lambda x: x.view(torch.int32),
    "as_f32": lambda x: x.view(torch.float32),
    "round_bf16": lambda x: x.to(torch.bfloat16).to(torch.float32),
    "round_f16": lambda x: x.to(torch.float16).to(torch.float32),
}
_REDUCE: dict[str, tuple[Callable[..., Tensor], float]] = {
    "group_min": (torch.amin, torch.inf), "group_max": (torch.amax, -torch.inf), "group_sum": (torch.sum, 0.0),
}  # fmt: skip


def evaluate(program: BlockProgram, tensors: Mapping[str, Tensor], numbers: Mapping[str, int] | None = None) -> None:
    """Run a program on whole tensors, writing its outputs in place.

    Args:
        program: what to run.
        tensors: one for each buffer by name, contiguous, of the buffer's format and of its number of elements.
        numbers: the integer arguments.
    """
    program = expanded(program)
    space, values = program.space, list[Tensor]()
    for instruction in program.instructions:
        args = [values[number] for number in instruction.args]
        values.append(_run(program, instruction, args, tensors, numbers or {}))
    stored = []
    for name, number in program.stores:
        buffer = program.buffer(name)
        value = _spread(values[number], program.instructions[number].extent, buffer.extent, space)
        if buffer.memory in PACKED:
            value = pack(value, buffer.memory)
        # a copy: what was loaded may be the storage that another store overwrites
        stored.append((tensors[name], value.to(tensors[name].dtype, copy=True)))
    for target, value in stored:
        target.copy_(value.reshape(target.shape))


def _run(
    program: BlockProgram, instruction: Instruction, args: list[Tensor],
    tensors: Mapping[str, Tensor], numbers: Mapping[str, int],
) -> Tensor:  # fmt: skip
    operation, space = instruction.operation, program.space
    if operation == "load":
        return _load(program.buffer(instruction.names[0]), tensors[instruction.names[0]], space)
    if operation == "constant":
        return torch.tensor(number_of(instruction.names[0]), dtype=_DTYPES[instruction.type])
    if operation == "lookup":
        return torch.tensor(program.tables[instruction.names[0]], dtype=torch.float32)[args[0].long()]
    if operation == "random_bits":
        seed, param = (numbers[name] for name in instruction.names)
        return random_bits((space.rows, space.columns), seed=seed, step=args[0], param=param)
    if operation == "rotate":
        whole = space.columns // space.width * space.width
        turned = rotated(args[0][:, :whole].reshape(space.rows, -1, space.width), instruction.names == ("back",))
        return torch.cat([turned.reshape(space.rows, whole), args[0][:, whole:]], dim=-1)
    if operation in REDUCTIONS:
        reduce, neutral = _REDUCE[operation]
        missing = space.groups * space.width - space.columns
        padded = torch.nn.functional.pad(args[0].expand(space.rows, space.columns), (0, missing), value=neutral)
        return reduce(padded.view(space.rows, space.groups, space.width), dim=-1)
    extents = [program.instructions[number].extent for number in instruction.args]
    spread = [_spread(arg, extent, instruction.extent, space) for arg, extent in zip(args, extents, strict=True)]
    function: Callable[..., Tensor] = _FUNCTIONS.get(operation) or getattr(torch, operation)
    return function(*spread)


def _load(buffer: Buffer, tensor: Tensor, space: Space) -> Tensor:
    """A buffer's value in the shape that its extent has here."""
    if buffer.memory == "u4":
        return unpack_int4(tensor.view(space.rows, -1), space.columns).to(torch.int32)
    if buffer.memory in PACKED:
        return unpack(tensor.view(space.rows, -1), buffer.memory, space.columns).to(torch.int32)
    shapes = {
        "scalar": (), "row": (space.rows, 1), "column": (1, space.columns), "group": (space.rows, space.groups),
        "element": (space.rows, space.columns),
    }  # fmt: skip
    return tensor.reshape(shapes[buffer.extent]).to(_DTYPES[MEMORY[buffer.memory].widened])


def _spread(value: Tensor, extent: str, to: str, space: Space) -> Tensor:
    """A value of one extent as one of a larger extent."""
    if extent == "group" and to == "element":
        return value.repeat_interleave(space.width, dim=-1)[:, : space.columns]
    if to == "group":
        return value.expand(space.rows, space.groups)
    if to == "element":
        return value.expand(space.rows, space.columns)
    return value
