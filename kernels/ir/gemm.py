"""A matrix product whose operands are decoded as they are loaded, and whose result is consumed while it is in cache.

    product (m, n) = left (m, k) @ right (k, n)

Either operand may be the result of a *prologue*, a :class:`BlockProgram` that decodes it from storage; the *epilogue*
is a program over m × n that reads the product from one of its buffers.  Neither a decoded operand nor the product need
exist as a whole.  A description of what to compute; how is for a lowering to say (``gemm_cpu.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
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


@dataclass
class GemmProgram:
    """A product with prologues and an epilogue.

    Attributes:
        left, right: the operands.
        epilogue: over the product's rows and columns; None where the product itself is wanted.
        product: the epilogue's buffer that stands for the product; its format is the product's.
    """

    left: Operand
    right: Operand
    epilogue: BlockProgram | None = None
    product: str = "product"

    def __str__(self) -> str:
        return self._text(str)

    def pretty(self) -> str:
        """For people."""
        return self._text(BlockProgram.pretty)

    def _text(self, spelled: Callable[[BlockProgram], str]) -> str:
        lines = [f"gemm {self.product}"]
        for name, (prologue, transposed) in (("left", self.left), ("right", self.right)):
            lines.append(f"{name} {'transposed' if transposed else 'straight'}")
            lines += [spelled(prologue)] if prologue else []
        return "\n".join(lines + (["epilogue", spelled(self.epilogue)] if self.epilogue else []))

    @classmethod
    def parse(cls, text: str) -> GemmProgram:
        """The program that ``str`` wrote; ProgramError where it is none."""
        head, *lines = text.splitlines() or [""]
        sections: dict[str, tuple[list[str], list[str]]] = {}
        for line in lines:
            word, *rest = line.split() or [""]
            if word in ("left", "right", "epilogue"):
                sections[word] = (rest, [])
            elif sections:
                list(sections.values())[-1][1].append(line)
        if not head.startswith("gemm ") or not {"left", "right"} <= set(sections):
            raise ProgramError("a product's text begins with 'gemm' and has the parts left and right")
        left, right = (
            Operand(BlockProgram.parse("\n".join(body)) if body else None, flags == ["transposed"])
            for flags, body in (sections["left"], sections["right"])
        )
        epilogue = BlockProgram.parse("\n".join(sections["epilogue"][1])) if "epilogue" in sections else None
        return cls(left, right, epilogue, head.split()[1])

    def share(self, written: Sequence[Tensor], read: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Named]:
        """Tensors by part: the left operand's, the right one's, and the epilogue's by buffer, without the product.

        Args:
            written: one for each buffer that the epilogue writes, in order.
            read: those of the left operand, of the right one, and of the epilogue's other buffers.
        """
        left, right = self.operands(read)
        rest = read[len(left) + len(right) :]
        return left, right, named(self.epilogue, written, rest, leave=self.product) if self.epilogue else {}

    def operands(self, read: Sequence[T]) -> tuple[list[T], list[T]]:
        """The left operand's tensors and the right one's, of those that are read."""
        first, second = self.left.tensors(), self.left.tensors() + self.right.tensors()
        return list(read[:first]), list(read[first:second])


@cache
def parsed(text: str) -> GemmProgram:
    """The program of a text, one a process."""
    return GemmProgram.parse(text)


Named = dict[str, Tensor]


def named(program: BlockProgram, written: Sequence[Tensor], read: Sequence[Tensor], leave: str = "") -> Named:
    """Tensors by buffer, from those that the program writes and those that it only reads, each in the order of the
    buffers; without ``leave``."""
    writes = [buffer.name for buffer in program.written()]
    reads = [buffer.name for buffer in program.buffers if buffer.access == "in" and buffer.name != leave]
    return dict(zip([*writes, *reads], [*written, *read], strict=True))
