"""A program over the rows of a product, the logits, that leaves their gradient, and the products that read that.

    logits (T, V) = hidden (T, d) @ weight (d, V) (+ bias)
    program           logits → their gradient dL, in their place; a loss for each row, and the like
    hidden's gradient (T, d) = dL @ weightᵀ        weight's (V, d) = dLᵀ @ hidden        bias's (V,) = Σ rows of dL

Rows do not depend on each other, so that no more of them than a block need exist.  A description of what to compute;
how is for a lowering to say (``kernels/cpp/loss.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from qgalore_compile.kernels.ir.program import BlockProgram, ProgramError

T = TypeVar("T")

GRADIENTS = ("hidden", "weight", "bias")
_FLAGS = {"straight": False, "transposed": True}


@dataclass
class LossProgram:
    """A program and the products around it.

    Attributes:
        program: over the logits' rows and columns.
        logits: its buffer that stands for them, and then for their gradient; its format is that of all operands.
        transposed: whether hidden and weight are the transposes of their tensors.
        bias: whether one is added to the logits.
        gives: whose gradients are wanted, of ``GRADIENTS``, in that order.
    """

    program: BlockProgram
    logits: str
    transposed: tuple[bool, bool]
    bias: bool
    gives: tuple[str, ...]

    def __str__(self) -> str:
        return self._text(str(self.program))

    def pretty(self) -> str:
        """For people."""
        return self._text(self.program.pretty())

    def _text(self, program: str) -> str:
        flags = ["transposed" if each else "straight" for each in self.transposed]
        lines = [f"loss {self.logits}", " ".join(["product", *flags, *(["bias"] if self.bias else [])])]
        return "\n".join([*lines, " ".join(["gives", *self.gives]), "epilogue", program])

    @classmethod
    def parse(cls, text: str) -> LossProgram:
        """The program that ``str`` wrote; ProgramError where it is none."""
        head, _, program = text.partition("\nepilogue\n")
        lines = [line.split() for line in head.splitlines()]
        if [line[0] for line in lines if line] != ["loss", "product", "gives"] or len(lines[0]) != 2 or not program:
            raise ProgramError("a text of a loss has 'loss BUFFER', 'product …', 'gives …' and an epilogue")
        flags, rest = lines[1][1:3], lines[1][3:]
        if not set(flags) <= set(_FLAGS) or len(flags) != 2 or rest not in ([], ["bias"]):
            raise ProgramError(f"no product of logits: {' '.join(lines[1])!r}")
        gives = tuple(lines[2][1:])
        if gives != tuple(name for name in GRADIENTS if name in gives):
            raise ProgramError(f"gradients are of {', '.join(GRADIENTS)}, in that order, not {' '.join(gives)!r}")
        parsed = BlockProgram.parse(program)
        if lines[0][1] not in [buffer.name for buffer in parsed.buffers]:
            raise ProgramError(f"the program has no buffer {lines[0][1]!r}")
        return cls(parsed, lines[0][1], (_FLAGS[flags[0]], _FLAGS[flags[1]]), bool(rest), gives)

    def share(self, written: Sequence[T], read: Sequence[T]) -> tuple[dict[str, T], list[T], list[T], list[T]]:
        """(gradients by whose they are; what the program writes beside the logits; the product's tensors; what the
        program reads)."""
        count, own = len(self.gives), 2 + self.bias
        return dict(zip(self.gives, written, strict=False)), list(written[count:]), list(read[:own]), list(read[own:])


@cache
def parsed(text: str) -> LossProgram:
    """The program of a text, one a process."""
    return LossProgram.parse(text)
