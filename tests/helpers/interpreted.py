"""Triton kernels on CPU tensors: Triton's interpreter, with what it gets wrong put right, and graphs that call it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from kernels_support import Tensors
from torch import Tensor, fx
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation
from torch._inductor.codecache import PyCodeCache
from triton.runtime import interpreter

from qgalore_compile.kernels.ir.program import BlockProgram, Space
from qgalore_compile.kernels.triton import kernels as triton_kernels
from qgalore_compile.kernels.triton.kernels import Kernel, region_kernel
from qgalore_compile.kernels.triton.printer import print_region
from qgalore_compile.kernels.triton.targets import Target

ODD = Space(3, 21, 8)
"""A space whose groups end short."""

_binary_op = interpreter.InterpreterBuilder.binary_op
_dot = interpreter.InterpreterBuilder.create_dot
_convert_float = interpreter._convert_float
_dtypes = {each: interpreter._get_np_dtype(each) for each in (
    tl.int1, tl.int8, tl.uint8, tl.int16, tl.uint16, tl.int32, tl.uint32, tl.int64, tl.uint64, tl.float16, tl.bfloat16,
    tl.float32, tl.float64,
)}  # fmt: skip
_by_name = {each.name: found for each, found in _dtypes.items()}
_REDUCE: dict[str, Callable[..., Any]] = {"_least": np.min, "_most": np.max, "_sum": np.sum}


def _binary(builder: Any, left: Any, right: Any, op: Any) -> Any:
    found = _binary_op(builder, left, right, op)
    if found.data.dtype == np.bool_:  # a comparison is left with the type of what was compared
        found.dtype = tl.int1
    return found


def _convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
    if source == tl.float32 and target == tl.bfloat16:  # it truncates
        return torch.from_numpy(np.array(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    if source == tl.bfloat16 and target == tl.float32:
        return np.array(data).astype(np.uint32) << 16
    return _convert_float(data, source, target, mode)


def _product(builder: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    # it multiplies the bits of bfloat16 as integers
    a, b = (builder.cast_impl(each, tl.float32) if each.dtype.scalar == tl.bfloat16 else each for each in (a, b))
    return _dot(builder, a, b, d, precision, imprecise)


def _dtype(of: Any) -> Any:
    """As it does, without hashing thirteen types at every operation: a third of the time."""
    if isinstance(of, tl.pointer_type):
        return np.dtype(np.uint64)
    if isinstance(of, tl.block_type):
        return _dtype(of.element_ty)
    return _by_name[of.name]


def _reduce(reduction: Any, values: Any) -> Any:
    """Our reductions by NumPy's, which propagate NaN too: it calls the function for one element at a time."""
    (value,) = values
    function = _REDUCE[reduction.combine_fn.fn.__name__]
    data = function(value.handle.data, axis=reduction.axis).astype(value.handle.data.dtype)
    return [reduction.to_tensor(data, value.dtype)]


@contextmanager
def interpreter_put_right() -> Iterator[None]:
    """Triton's interpreter, as a GPU would compute."""
    builder = interpreter.InterpreterBuilder
    with ExitStack() as stack:
        for holder, name, replacement in (
            (builder, "binary_op", _binary), (builder, "create_dot", _product),
            (interpreter, "_convert_float", _convert), (interpreter, "_get_np_dtype", _dtype),
            (interpreter.ReduceOps, "generic_reduce", _reduce),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(holder, name, replacement))
        stack.enter_context(np.errstate(all="ignore"))
        yield


@cache
def interpreted(kernel: Kernel) -> Any:
    """The kernel as a function that NumPy runs."""
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True  # read when a function is decorated
        return getattr(PyCodeCache.load(f"# interpreted\n{kernel.source}"), kernel.name)


def run(kernel: Kernel, given: dict[str, Any], grid: int) -> None:
    """Run a kernel, its arguments by name."""
    with interpreter_put_right():
        interpreted(kernel)[(grid,)](*(given[name] for name in kernel.signature))


def launch(kernel: Kernel, tensors: dict[str, Tensor], numbers: dict[str, int], m: int = 1, n: int = 1) -> None:
    """In place of ``triton_kernels.launch``."""
    with mock.patch.object(triton_kernels, "tuned", interpreted), interpreter_put_right():
        triton_kernels.launch(kernel, tensors, numbers, m, n)


def kernel_of(made: BlockProgram, rows: int | None = None) -> Kernel:
    """A program's kernel, with so many groups an instance where that is said."""
    kernel = region_kernel(made)
    if rows is None:
        return kernel
    grid = -(-made.space.rows * made.space.groups // rows)
    return dataclasses.replace(kernel, source=print_region(made, rows), grid=grid)


def ran(
    made: BlockProgram, tensors: Tensors, numbers: Mapping[str, int] | None = None, rows: int | None = None
) -> Tensors:
    """What the kernel leaves in the buffers; ``tensors`` stay."""
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    launch(kernel_of(made, rows), copies, dict(numbers or {}))
    return copies


def assert_same(one: Tensor, other: Tensor, why: str, *, zeros: bool = True) -> None:
    """Bit for bit, but that NaN is NaN; ``zeros``: and -0 is not 0."""
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{why}: {text}")
    if zeros and other.is_floating_point():
        real = ~other.isnan()
        assert torch.equal(one.signbit()[real], other.signbit()[real]), f"{why}: zeros of another sign"


class Calls:
    """What runs the Triton kernels of final graphs that were made inside :func:`triton_on_cpus`."""

    def __init__(self) -> None:
        self.kernels: dict[int, Kernel] = {}
        self.counted: list[str] = []

    def runner(self, graph: fx.GraphModule) -> Callable[..., Any]:
        """A callable in place of the graph."""
        calls = self

        class Runner(fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                if target is not triton_kernel_wrapper_mutation:
                    return super().call_function(target, args, kwargs)
                kernel = calls.kernels[id(kernel_side_table.get_kernel(kwargs["kernel_idx"]))]
                calls.counted.append(kernel.name)
                constants = kernel_side_table.get_constant_args(kwargs["constant_args_idx"])
                return run(kernel, {**kwargs["kwargs"], **constants}, int(kwargs["grid"][0][0]))

        return Runner(graph).run


@contextmanager
def triton_on_cpus(target: str = "sm_80") -> Iterator[Calls]:
    """Graphs on CPU tensors are compiled as if they were on a GPU, up to Inductor's code generation."""
    calls = Calls()
    called = triton_kernels.called

    def recorded(kernel: Kernel) -> Any:
        found = called(kernel)
        calls.kernels[id(found)] = kernel
        return found

    with triton_kernels.made_for(Target.named(target)), mock.patch.object(triton_kernels, "called", recorded):
        yield calls
