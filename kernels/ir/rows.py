"""A program that reads a gradient row block by row block, the gradient made of its terms as it is read.

    gradient (m, n) = Σ terms        left (m, k) @ right (k, n), or rows that a tensor of indices sends there, summed

The update of an embedding or a head reads its gradient once, element by element, so that no more of it than a block
need exist.  A description of what to compute; how is for a lowering to say (``kernels/cpp/rows.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, TypeVar

from torch import Tensor

from qgalore_compile.kernels.ir.program import BlockProgram, ProgramError

T = TypeVar("T")


class Term(NamedTuple):
    """One summand of the gradient.

    Attributes:
        kind: "product" of two matrices, or "indexed": the rows of values, each added to the row that its index names,
            where its mask is True (:func:`qgalore_compile.kernels.rows.sum_rows`).
        transposed: of a product, whether each operand is the transpose of its tensor.
    """

    kind: Literal["product", "indexed"]
    transposed: tuple[bool, bool] = (False, False)

    @property
    def tensors(self) -> int:
        """Left and right operand; or values, mask and index."""
        return 2 if self.kind == "product" else 3

    def __str__(self) -> str:
        flags = ["transposed" if each else "straight" for each in self.transposed] if self.kind == "product" else []
        return " ".join(["term", self.kind, *flags])

    @classmethod
    def parse(cls, line: str) -> Term:
        """The term that ``str`` wrote; ProgramError where it is none."""
        words = line.split()
        if words == ["term", "indexed"]:
            return cls("indexed")
        if words[:2] == ["term", "product"] and len(words) == 4:
            left, right = (flag == "transposed" for flag in words[2:])
            return cls("product", (left, right))
        raise ProgramError(f"no term of a gradient: {line!r}")

    def matrices(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(m, k) and (k, n) of a product."""
        left, right = (each.t() if flag else each for each, flag in zip(tensors, self.transposed, strict=True))
        return left, right


@dataclass
class RowsProgram:
    """A program and where its gradient comes from.

    Attributes:
        program: over the gradient's rows and columns, or over the flattened gradient.
        gradient: the program's buffer that stands for it; its format is the gradient's.
        rows, columns: of the gradient.
        terms: its summands.
    """

    program: BlockProgram
    gradient: str
    rows: int
    columns: int
    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return self._text(str(self.program))

    def pretty(self) -> str:
        """For people."""
        return self._text(self.program.pretty())

    def _text(self, program: str) -> str:
        head = f"rows {self.gradient} {self.rows} {self.columns}"
        return "\n".join([head, *map(str, self.terms), "epilogue", program])

    @classmethod
    def parse(cls, text: str) -> RowsProgram:
        """The program that ``str`` wrote; ProgramError where it is none."""
        head, _, program = text.partition("\nepilogue\n")
        first, *terms = head.splitlines()
        words = first.split()
        if len(words) != 4 or words[0] != "rows" or not program or not terms:
            raise ProgramError("a text of rows begins with 'rows BUFFER ROWS COLUMNS', has terms and an epilogue")
        rows, columns = int(words[2]), int(words[3])
        return cls(BlockProgram.parse(program), words[1], rows, columns, tuple(map(Term.parse, terms)))

    def share(self, read: Sequence[T]) -> tuple[list[list[T]], list[T]]:
        """What each term reads, and what the program reads beside the gradient."""
        return shared(self.terms, read)


def shared(terms: Sequence[Term], tensors: Sequence[T]) -> tuple[list[list[T]], list[T]]:
    """The tensors of each term, in order, and what is left."""
    found, at = [], 0
    for term in terms:
        found.append(list(tensors[at : at + term.tensors]))
        at += term.tensors
    return found, list(tensors[at:])


@cache
def parsed(text: str) -> RowsProgram:
    """The program of a text, one a process."""
    return RowsProgram.parse(text)
