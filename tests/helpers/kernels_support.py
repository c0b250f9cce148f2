"""What the tests of kernels share: buffers by name, random contents, and the two ways to run a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from qgalore_compile.kernels import lowering
from qgalore_compile.kernels.cpp import launch as cpu
from qgalore_compile.kernels.ir.evaluate import evaluate
from qgalore_compile.kernels.ir.gemm import VALUE, GemmProgram, Operand, named
from qgalore_compile.kernels.ir.loss import LossProgram
from qgalore_compile.kernels.ir.memory import MEMORY
from qgalore_compile.kernels.ir.program import BlockProgram, Buffer, Space
from qgalore_compile.kernels.ir.rows import RowsProgram
from qgalore_compile.kernels.loss import in_blocks
from qgalore_compile.kernels.lowering import Lowering
from qgalore_compile.kernels.rows import filling

Tensors = dict[str, Tensor]

FORMATS = ("f32", "bf16", "f16", "u8", "i8", "i16", "i32", "i64", "bool")
"""Of memory, but for packed ones."""


def program(space: Space, *buffers: str, numbers: tuple[str, ...] = ()) -> BlockProgram:
    """An empty program with buffers spelled "name memory extent access"."""
    made = BlockProgram(space, numbers=list(numbers))
    made.buffers = [Buffer(*each.split()) for each in buffers]
    return made


def load(made: BlockProgram, name: str) -> int:
    """The number of a buffer's load."""
    return made.emit("load", names=(name,))


def every_format(space: Space) -> BlockProgram:
    """A program that copies elements and groups of every format, ``in_element_u8`` to ``out_element_u8``, and adds up
    rows, columns and scalars of every format, into ``total`` and, a third of it, ``third``."""
    extents, narrower = ("element", "group"), ("row", "column", "scalar")
    made = program(
        space,
        *(f"in_{extent}_{kind} {kind} {extent} in" for extent in (*extents, *narrower) for kind in FORMATS),
        *(f"out_{extent}_{kind} {kind} {extent} out" for extent in extents for kind in FORMATS),
        "total f32 element out", "third bf16 element out",
    )  # fmt: skip
    total = made.constant(0.0)
    for kind in FORMATS:
        for extent in narrower:
            value = load(made, f"in_{extent}_{kind}")
            value = value if made.instructions[value].type == "f32" else made.emit("f32", (value,))
            total = made.emit("add", (total, value))
        for extent in extents:
            made.store(f"out_{extent}_{kind}", load(made, f"in_{extent}_{kind}"))
    made.store("total", total)
    made.store("third", made.emit("div", (total, made.constant(3.0))))
    return made


def shape_of(buffer: Buffer, space: Space) -> tuple[int, ...]:
    """The shape of a buffer's tensor."""
    if MEMORY[buffer.memory].bits < 8:
        return space.rows, MEMORY[buffer.memory].pitch(space.columns)
    return {
        "scalar": (), "row": (space.rows,), "column": (space.columns,), "group": (space.rows, space.groups),
        "element": (space.rows, space.columns),
    }[buffer.extent]  # fmt: skip


def filled(made: BlockProgram, **given: Tensor) -> Tensors:
    """A tensor for each buffer: those that are given, the others random and of sizes around 1."""
    tensors = {}
    for buffer in made.buffers:
        size, dtype = shape_of(buffer, made.space), MEMORY[buffer.memory].dtype
        if buffer.name in given:
            tensors[buffer.name] = given[buffer.name].to(dtype).reshape(size).contiguous()
        elif dtype.is_floating_point:
            tensors[buffer.name] = torch.randn(size).to(dtype)
        elif dtype == torch.bool:
            tensors[buffer.name] = torch.rand(size) < 0.5
        else:
            low, high = {torch.uint8: (0, 256), torch.int64: (-(1 << 40), 1 << 40)}.get(dtype, (-100, 100))
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


class Evaluated:
    """A kernel that is evaluated rather than compiled, for tests that take milliseconds."""

    def __init__(self, text: str) -> None:
        self.program = BlockProgram.parse(text)

    def __call__(self, tensors: dict[str, Tensor], numbers: Sequence[int]) -> None:
        found = evaluated(self.program, tensors, dict(zip(self.program.numbers, numbers, strict=True)))
        for buffer in self.program.written():
            tensors[buffer.name].copy_(found[buffer.name])

    def run(self, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
        """As a kernel in C++ does."""
        self(named(self.program, written, read), numbers)

    def wait(self) -> None:
        """Nothing compiles."""


def evaluate_gemm(text: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    """A product as a whole."""
    gemm = GemmProgram.parse(text)
    tensors, own = gemm.share(written, read)
    products = {
        each.product: operand(each.left, left) @ operand(each.right, right)
        for each, (left, right) in zip(gemm.products, tensors, strict=True)
    }
    Evaluated(str(gemm.epilogue))({**own, **products}, numbers)


def operand(how: Operand, tensors: Sequence[Tensor]) -> Tensor:
    found = tensors[0]
    if how.prologue is not None:
        names = [buffer.name for buffer in how.prologue.buffers if buffer.name != VALUE]
        found = torch.empty(how.prologue.space[:2], dtype=MEMORY[how.prologue.buffer(VALUE).memory].dtype)
        Evaluated(str(how.prologue))({**dict(zip(names, tensors, strict=True)), VALUE: found}, ())
    return found.t() if how.transposed else found


def evaluate_product(text: str, read: Sequence[Tensor]) -> Tensor:
    """A product without an epilogue, as a whole."""
    gemm = GemmProgram.parse(text)
    ((left, right),) = gemm.operands(read)
    return operand(gemm.left, left) @ operand(gemm.right, right)


def evaluate_region(text: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    """A region as a whole."""
    kernel = Evaluated(text)
    kernel(named(kernel.program, written, read), numbers)


def evaluate_rows(text: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    """A program with its gradient as a whole."""
    made = RowsProgram.parse(text)
    operands, rest = made.share(read)
    own = named(made.program, written, rest, leave=[made.gradient])
    dtype = MEMORY[made.program.buffer(made.gradient).memory].dtype
    gradient = torch.empty(made.rows, made.columns, dtype=dtype)
    filling(made.terms, operands, made.rows)(gradient, 0, made.rows)
    Evaluated(str(made.program))({**own, made.gradient: gradient}, numbers)


def evaluate_loss(text: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    """A loss, its logits as a whole."""
    made = LossProgram.parse(text)
    _, results, _, rest = made.share(written, read)
    own = named(made.program, results, rest, leave=[made.logits])

    def finish(logits: Tensor, first: int) -> None:
        assert (first, len(logits)) == (0, made.program.space.rows)
        Evaluated(str(made.program))({**own, made.logits: logits}, numbers)

    in_blocks(made, written, read, finish)


def prepare_evaluation(text: str) -> list[Evaluated]:
    """What is begun for a region; what is more than one is evaluated when it is called."""
    return [] if text.startswith(("gemm ", "rows ", "loss ")) else [Evaluated(text)]


EVALUATOR = Lowering(
    "evaluator", ("cpu",), accepts=lambda program, read, device: None, prepare=prepare_evaluation,
    run_program=evaluate_region, run_gemm=evaluate_gemm, gemm=evaluate_product, passes=lowering.CPP.passes,
    products=True, lengths=True, run_rows=evaluate_rows, run_loss=evaluate_loss,
)  # fmt: skip


def evaluated_kernels() -> AbstractContextManager[None]:
    """Generated kernels are evaluated, not compiled, for tests that take milliseconds."""
    return lowering.registered(EVALUATOR)


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
