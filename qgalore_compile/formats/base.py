"""``Format``: how a float tensor is kept in fewer bits, one frozen object for each way.

A format is defined by two formulas, ``store`` (floats to what is kept) and ``load`` (back), written in the operators of
an :class:`~qgalore_compile.formats.arithmetic.Arithmetic`: run on tensors they are :meth:`Format.encode` and
:meth:`Format.decode`, handed a program builder they are a generated kernel.

``str(format)`` is its only external form: in group keys, state dicts, operators of a compiled graph and files.
:meth:`Format.parse` reads it back.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from qgalore_compile.formats.arithmetic import Arithmetic, OnTensors
from qgalore_compile.formats.grouping import check_grouped, from_groups, to_groups
from qgalore_compile.formats.packing import BITS, pack, pack_int4, packed_size, unpack, unpack_int4


class Part(NamedTuple):
    """One of the tensors that a stored tensor is made of.

    Attributes:
        name: "codes", "scale", …; the first part's is that of the whole in a state dict.
        memory: what it holds, as programs name it ("u8", "f32"; "p4", "p2" and "u4" are packed codes).
        extent: "element", "group", "row" or "scalar": how much of the tensor one value is for.
    """

    name: str
    memory: str
    extent: str


_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
_SIZES = {"u8": 8, "f32": 32, "u4": 4, **BITS}
"""Bits of an element, by the kind of memory."""


class FormatError(ValueError):
    """A text that names no format, or a format that cannot do what is asked; the message says what can."""


class Format(ABC):
    """See the module's docstring."""

    rounds: ClassVar[bool] = True
    """Whether it takes draws: what trains a weight has to."""

    @property
    def inline(self) -> bool:
        """Whether tracing goes through ``encode`` and ``decode``, rather than keep each as one node."""
        return False

    @property
    def trains(self) -> bool:
        """Whether kernels write it: groups must not depend on one another, nor share a byte."""
        return True

    @property
    def least(self) -> int:
        """The least code whose entry is above 0, where entries are in order; 0 where none is to be told from zero."""
        return 0

    @property
    def grouped(self) -> Grouped | None:
        """The format that its codes are in; None of floats."""
        return None

    @staticmethod
    def parse(text: str | Format) -> Format:
        """The format of a text; a format as it is.  FormatError where there is none, with what there is."""
        from qgalore_compile.formats.registry import parse

        return text if isinstance(text, Format) else parse(text)

    @cached_property
    def text(self) -> str:
        """``str`` of it, made once."""
        return str(self)

    @property
    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """What is stored."""

    @property
    @abstractmethod
    def bits(self) -> float:
        """Bits an element of a long row, scales included."""

    @abstractmethod
    def shape_of(self, part: Part, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of a part's tensor, for a stored tensor of ``shape``."""

    @abstractmethod
    def encode(self, x: Tensor, noise: Tensor | None = None) -> list[Tensor]:
        """The parts of a floating-point tensor.

        Args:
            x: at least one dimension; computed in float32.
            noise: 16 random bits an element, int32 of x's shape (:func:`qgalore_compile.rng.random_bits`), for
                stochastic rounding; None rounds to nearest.

        Raises:
            TypeError: x is not floating point.
            ValueError: x is 0-d.
        """

    @abstractmethod
    def decode(self, stored: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """The floats that ``stored`` stands for, computed in float32, of ``shape`` and ``dtype``."""

    def zeros(self, shape: Sequence[int], device: torch.device | str | None = None) -> list[Tensor]:
        """The parts of a tensor of zeros.

        One group stands for all: to encode an embedding's 131 M zeros would take 2.5 GB for a while.
        """
        if math.prod(shape) < 4096:
            return self.encode(torch.zeros(tuple(shape), device=device))
        one = self.encode(torch.zeros((*(1 for _ in shape[1:]), 8), device=device))  # 8: that no byte is half full
        return [each.reshape(-1)[:1].expand(self.shape_of(part, shape)).clone() if part.extent != "scalar" else each
                for part, each in zip(self.parts, one, strict=True)]  # fmt: skip

    def unsigned(self) -> Format:
        """The format for numbers that are never negative, where it has one of its own."""
        return self

    def flat(self) -> Format:
        """The format with groups along the flattened tensor, as moments have it."""
        return self


@dataclass(frozen=True)
class Grouped(Format):
    """Codes, and what the elements of a group share.

    Attributes:
        width: elements of a group; a row that it does not divide ends in a short one.
        axis: "rows": groups along the last dimension; "flat": along the flattened tensor.
    """

    width: int
    axis: str = "rows"

    name: ClassVar[str]
    default_axis: ClassVar[str] = "rows"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise FormatError(f"{self.name}: group_size must be at least 1, got {self.width}")
        most = max((8 // BITS[part.memory] for part in self.parts if part.memory in BITS), default=1)
        if self.width % most:
            raise FormatError(f"{self.name}: groups of {self.width} elements share bytes; use a multiple of {most}")

    @property
    def grouped(self) -> Grouped:
        return self

    # -- the two formulas -------------------------------------------------------------------------------------------

    @abstractmethod
    def store(self, on: Arithmetic, x: Any, noise: Any) -> list[Any]:
        """A value for each part: codes as integers, one an element, and what their group shares."""

    @abstractmethod
    def load(self, on: Arithmetic, stored: Sequence[Any]) -> Any:
        """The value of each element, from a value for each part."""

    # -- on tensors -------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor, noise: Tensor | None = None) -> list[Tensor]:
        check_grouped(x, self.width)
        if x.numel() == 0:
            return [x.new_zeros(self.shape_of(part, x.shape), dtype=dtype_of(part)) for part in self.parts]
        groups = to_groups(self._row(x).to(torch.float32), self.width)
        draws = None if noise is None else to_groups(self._row(noise), self.width)
        values = self.store(self._on(x.shape), groups, draws)
        return [self._kept(part, value, x.shape) for part, value in zip(self.parts, values, strict=True)]

    def decode(self, stored: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        if math.prod(shape) == 0:
            return stored[0].new_zeros(tuple(shape), dtype=dtype)
        n = self._length(shape)
        values = [self._read(part, each, n) for part, each in zip(self.parts, stored, strict=True)]
        return from_groups(self.load(self._on(shape), values), n).reshape(tuple(shape)).to(dtype)

    def _row(self, x: Tensor) -> Tensor:
        return x.reshape(-1) if self.axis == "flat" else x

    def _length(self, shape: Sequence[int]) -> int:
        return math.prod(shape) if self.axis == "flat" else shape[-1]

    def _on(self, shape: Sequence[int]) -> OnTensors:
        n = self._length(shape)
        return OnTensors(short=n % self.width if n > self.width else 0, size=self.width)

    def _kept(self, part: Part, value: Tensor, shape: Sequence[int]) -> Tensor:
        """A part's value as its tensor."""
        if part.extent == "group":
            return value.squeeze(-1).to(dtype_of(part))
        if part.extent == "row":
            return value.reshape(self.shape_of(part, shape)).to(dtype_of(part))
        codes = from_groups(value.to(torch.uint8), self._length(shape))
        if part.memory == "u4":
            return pack_int4(codes)
        return pack(codes, part.memory) if part.memory in BITS else codes.reshape(self.shape_of(part, shape))

    def _read(self, part: Part, stored: Tensor, n: int) -> Tensor:
        """What :meth:`load` takes, from a part's tensor."""
        if part.extent == "group":
            return _widened(stored).unsqueeze(-1)
        if part.extent == "row":
            return _widened(stored)[..., None]
        codes = stored
        if part.memory == "u4":
            codes = unpack_int4(stored, n)
        elif part.memory in BITS:
            codes = unpack(stored, part.memory, n)
        return to_groups(self._row(codes) if part.memory == "u8" else codes, self.width).to(torch.int32)

    def shape_of(self, part: Part, shape: Sequence[int]) -> tuple[int, ...]:
        n = self._length(shape)
        leading = () if self.axis == "flat" else tuple(shape[:-1])
        if part.extent == "group":
            return (*leading, -(-n // self.width))
        if part.extent == "row":
            return (*leading, 1)
        return tuple(shape) if part.memory == "u8" else (*leading, packed_size(part.memory, n))

    # -- codes, for who compares them ---------------------------------------------------------------------------------

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return sum(_SIZES[part.memory] for part in self.parts if part.extent == "element")

    def codes(self, stored: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The code of each element, int32 of ``shape``."""
        n, found, place = self._length(shape), torch.zeros((), dtype=torch.int32), 0
        for part, each in zip(self.parts, stored, strict=False):
            if part.extent == "element":
                codes = from_groups(self._read(part, each, n), n).reshape(tuple(shape))
                found = found.to(codes.device) | (codes << place)
                place += _SIZES[part.memory]
        return found

    def with_codes(self, stored: Sequence[Tensor], codes: Tensor) -> list[Tensor]:
        """The parts with other codes."""
        parts, place = list(stored), 0
        for index, part in enumerate(self.parts):
            if part.extent == "element":
                own = (codes >> place) & ((1 << _SIZES[part.memory]) - 1)
                groups = to_groups(self._row(own), self.width)
                parts[index] = self._kept(part, groups, codes.shape)
                place += _SIZES[part.memory]
        return parts

    def neighbours(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of the next entries below and above; an entry at an end is its own."""
        top = (1 << self.code_bits) - 1
        return (codes - 1).clamp(min=0), (codes + 1).clamp(max=top)

    def flat(self) -> Format:
        return replace(self, axis="flat")

    @property
    def bits(self) -> float:
        each = {"element": 1.0, "group": 1 / self.width, "row": 0.0}
        return sum(_SIZES[part.memory] * each[part.extent] for part in self.parts)

    def __str__(self) -> str:
        axis = "" if self.axis == self.default_axis else f"+{self.axis}"
        return f"{self.name}/{self.width}{''.join(f'+{word}' for word in self.words)}{axis}"

    @property
    def words(self) -> tuple[str, ...]:
        """Modifiers of the text, in order."""
        return ()


def dtype_of(part: Part) -> torch.dtype:
    """Dtype of a part's tensor."""
    return _DTYPES.get(part.memory, torch.uint8)


def _widened(stored: Tensor) -> Tensor:
    return stored.to(torch.int32) if stored.dtype == torch.uint8 else stored
