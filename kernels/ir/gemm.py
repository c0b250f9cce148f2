"""A matrix product whose operands are decoded as they are loaded, and whose result is consumed while it is in cache.

    product (m, n) = left (m, k) @ right (k, n)

Either operand may be the result of a *prologue*, a :class:`BlockProgram` that decodes it from storage; the *epilogue*
is a program over m × n that reads the product from one of its buffers, and further products of other operands and
another k from others.  Neither a decoded operand nor a product need exist as a whole.  A description of what to
compute; how is for a lowering to say (``kernels/cpp/gemm.py``, ``kernels/triton/gemm.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple, TypeVar

from torch import Tensor

from qgalore_compile.kernels.ir.program import BlockProgram, ProgramError

T = TypeVar("T")

VALUE = "value"
"""The buffer that a prologue writes the decoded operand to."""


class Operand(NamedTuple):
    """``prologue`` None for a tensor as it is; ``transposed``: the operand is the transpose of the tensor or value."""

    prologue: BlockProgram | None
    transposed: bool

    def tensors(self) -> int:
        """Tensors that the operand is made of."""
        return 1 if self.prologue is None else len(self.prologue.buffers) - 1

    def named(self, tensors: Sequence[T]) -> dict[str, T]:
        """Its tensors by the prologue's buffers, without the one for the value."""
        assert self.prologue is not None
        names = [buffer.name for buffer in self.prologue.buffers if buffer.name != VALUE]
        return dict(zip(names, tensors, strict=True))

    def size(self, tensors: Sequence[Tensor], dim: int) -> int:
        """Size of dimension ``dim`` of the operand."""
        place = dim != self.transposed
        return self.prologue.space[place] if self.prologue else tensors[0].shape[place]


class Factors(NamedTuple):
    """Two operands, and the epilogue's buffer that stands for their product."""

    left: Operand
    right: Operand
    product: str


@dataclass
class GemmProgram:
    """A product with prologues and an epilogue.

    Attributes:
        left, right: the operands.
        epilogue: over the product's rows and columns; None where the product itself is wanted.
        product: the epilogue's buffer that stands for the product; its format is the product's.
        further: products of the same m × n that the epilogue reads beside it.
    """

    left: Operand
    right: Operand
    epilogue: BlockProgram | None = None
    product: str = "product"
    further: tuple[Factors, ...] = ()

    @cached_property
    def products(self) -> tuple[Factors, ...]:
        """All of them, the first one before the further ones."""
        return (Factors(self.left, self.right, self.product), *self.further)

    def __str__(self) -> str:
        return self._text(str)

    def pretty(self) -> str:
        """For people."""
        return self._text(BlockProgram.pretty)

    def _text(self, spelled: Callable[[BlockProgram], str]) -> str:
        lines = []
        for left, right, product in self.products:
            lines.append(f"gemm {product}")
            for name, (prologue, transposed) in (("left", left), ("right", right)):
                lines.append(f"{name} {'transposed' if transposed else 'straight'}")
                lines += [spelled(prologue)] if prologue else []
        return "\n".join(lines + (["epilogue", spelled(self.epilogue)] if self.epilogue else []))

    @classmethod
    def parse(cls, text: str) -> GemmProgram:
        """The program that ``str`` wrote; ProgramError where it is none."""
        sections: list[tuple[str, list[str], list[str]]] = []
        for line in text.splitlines():
            word, *rest = line.split() or [""]
            if word in ("gemm", "left", "right", "epilogue"):
                sections.append((word, rest, []))
            elif sections:
                sections[-1][2].append(line)
        products, last = [], None
        if sections and sections[-1][0] == "epilogue":
            last = BlockProgram.parse("\n".join(sections.pop()[2]))
        for at in range(0, len(sections), 3):
            (first, name, _), *parts = sections[at : at + 3]
            if first != "gemm" or len(name) != 1 or [part[0] for part in parts] != ["left", "right"]:
                raise ProgramError("a product's text begins with 'gemm' and has the parts left and right")
            left, right = (
                Operand(BlockProgram.parse("\n".join(body)) if body else None, flags == ["transposed"])
                for _, flags, body in parts
            )
            products.append(Factors(left, right, name[0]))
        if not products:
            raise ProgramError("a product's text begins with 'gemm' and has the parts left and right")
        return cls(products[0].left, products[0].right, last, products[0].product, tuple(products[1:]))

    def share(
        self, written: Sequence[Tensor], read: Sequence[Tensor]
    ) -> tuple[list[tuple[list[Tensor], list[Tensor]]], Named]:
        """Tensors by part: the left operand's and the right one's of each product, and the epilogue's by buffer,
        without the products.

        Args:
            written: one for each buffer that the epilogue writes, in order.
            read: those of the operands, product by product, left before right, and of the epilogue's other buffers.
        """
        operands = self.operands(read)
        rest = read[sum(len(left) + len(right) for left, right in operands) :]
        leave = [product for _, _, product in self.products]
        return operands, named(self.epilogue, written, rest, leave=leave) if self.epilogue else {}

    def operands(self, read: Sequence[T]) -> list[tuple[list[T], list[T]]]:
        """The left operand's tensors and the right one's, of each product, of those that are read."""
        found, at = [], 0
        for left, right, _ in self.products:
            first, second = at + left.tensors(), at + left.tensors() + right.tensors()
            found.append((list(read[at:first]), list(read[first:second])))
            at = second
        return found


@cache
def parsed(text: str) -> GemmProgram:
    """The program of a text, one a process."""
    return GemmProgram.parse(text)


Named = dict[str, Tensor]


def named(
    program: BlockProgram, written: Sequence[Tensor], read: Sequence[Tensor], leave: Collection[str] = ()
) -> Named:
    """Tensors by buffer, from those that the program writes and those that it only reads, each in the order of the
    buffers; without ``leave``."""
    writes = [buffer.name for buffer in program.written() if buffer.name not in leave]
    reads = [buffer.name for buffer in program.buffers if buffer.access == "in" and buffer.name not in leave]
    return dict(zip([*writes, *reads], [*written, *read], strict=True))
