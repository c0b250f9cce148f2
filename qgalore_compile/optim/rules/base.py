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
        scales: float32, of a shape that spreads to (m, n); None where G is not read.  Of a rule with a ``whole``
            momentum they are M̂'s in place of G's: of β₁ M + (1 - β₁) G, without its bias towards zero.
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
        sketches: of a rule that draws, whether it draws in every step, and a second matrix for the other side too, so
            that ``step`` knows sketches of G's rows and of its columns.
        moments: how many moments of R are kept: 2, m and v, 1, m alone, or none.
        whole: whether a momentum of all of G is kept, in the format of the key ``momentum_format``.
        reads_gradient: whether ``step`` may give ``scales``.
        unprojected: whether R may be all of the gradient, for ``rank=None``.
        limits: whether ``step`` asks :meth:`RuleState.limited`, which keeps a number from step to step.
    """

    name: ClassVar[str]
    drawn: ClassVar[bool] = False
    sketches: ClassVar[bool] = False
    moments: ClassVar[int] = 2
    whole: ClassVar[bool] = False
    reads_gradient: ClassVar[bool] = False
    unprojected: ClassVar[bool] = False
    limits: ClassVar[bool] = False

    @abstractmethod
    def step(self, r: Tensor, state: RuleState) -> Written:
        """One step.

        Args:
            r: R, clipped, float32: (r, n) on the left, (m, r) on the right.
            state: the parameter's, with all that a rule computes from it.
        """
