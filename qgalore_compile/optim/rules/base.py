"""What a rule is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from qgalore_compile.optim.rules.state import RuleState


class Written(NamedTuple):
    """What a rule says is to be written: U = α P ``low`` + G ∘ ``scales``, on the right α ``low`` P + G ∘ ``scales``.

    Attributes:
        low: shaped like R, float32; None for nothing.
        scales: float32, (1, n) on the left, (m, 1) on the right, or (1, 1); None where G is not read.
    """

    low: Tensor | None
    scales: Tensor | None = None


@dataclass(frozen=True)
class Rule(ABC):
    """From the projected gradient R, and what is kept of earlier ones, to what is written.

    A rule is found again by its name: in groups, in a ``state_dict``, in a compiled graph's record.  One of a user's
    own is a subclass with a name of its own; an object of it is given as the group key ``rule``.  ``step`` is traced:
    it is tensor operations, and does not look at values.

    Attributes:
        name: as group keys have it.
        drawn: whether P is drawn at random, anew every ``update_proj_gap`` steps, and stored nowhere; else it is found
            from gradients.
        moments: how many moments are kept: 2, m and v, or 1, m alone.
        reads_gradient: whether ``step`` may give ``scales``.
        limits: whether ``step`` asks :meth:`RuleState.limited`, which keeps a number from step to step.
    """

    name: ClassVar[str]
    drawn: ClassVar[bool] = False
    moments: ClassVar[int] = 2
    reads_gradient: ClassVar[bool] = False
    limits: ClassVar[bool] = False

    @abstractmethod
    def step(self, r: Tensor, state: RuleState) -> Written:
        """One step.

        Args:
            r: R, clipped, float32: (r, n) on the left, (m, r) on the right.
            state: the parameter's, with all that a rule computes from it.
        """
