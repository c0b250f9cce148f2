"""One projected parameter as the refresh op sees it, and decompositions that fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from subspace_support import as_matrix
from torch import Tensor

from qgalore_compile.formats import Format
from qgalore_compile.subspace.projection import project, projector_shape, side_of
from qgalore_compile.subspace.refresh import Moments, refresh_
from qgalore_compile.subspace.scheduler import Rule, Schedule

RULE = Rule(official=False, threshold=0.4, gamma=2.0, max_gap=160)
FLOAT = Format.parse("float32")
INT4 = Format.parse("int4/16+planar")
FORMATS = {"float": FLOAT, "int8": Format.parse("int8/16"), "int4": INT4}


@dataclass
class Layer:
    """One projected parameter as the refresh op sees it."""

    shape: tuple[int, int]
    rank: int
    form: Format = FLOAT
    method: str = "svd"
    rule: Rule = RULE
    seed: int = 0
    gap: int = 10
    moments: Moments | None = None

    def __post_init__(self) -> None:
        self.side = side_of(self.shape)
        self.rank = min(self.rank, *self.shape)
        m, n = self.shape
        self.low = torch.zeros((m, self.rank) if self.side == "right" else (self.rank, n))
        self.stored = self.form.encode(torch.zeros(projector_shape(self.shape, self.rank)))
        self.schedule = Schedule.first(self.gap, 5).to_tensor()

    def call(self, *factors: Tensor) -> None:
        settings: dict[str, Any] = dict(
            shape=self.shape,
            rank=self.rank,
            form=self.form,
            method=self.method,
            rule=self.rule,
            seed=self.seed,
            param=3,
            moments=self.moments,
        )
        refresh_(self.low, self.stored, self.schedule, factors, **settings)

    @property
    def projector(self) -> Tensor:
        return self.form.decode(self.stored, projector_shape(self.shape, self.rank))

    @property
    def now(self) -> Schedule:
        return Schedule.from_tensor(self.schedule)

    def matrix(self) -> np.ndarray:
        return as_matrix(self.projector, self.shape)


both_sides = pytest.mark.parametrize("shape", [(23, 12), (12, 23)], ids=["right", "left"])


def project_old(layer: Layer, grad: Tensor) -> None:
    """What the step does before the op."""
    layer.low.copy_(project(grad, layer.projector, layer.side))


def no_convergence(*args: Any, **kwargs: Any) -> None:
    raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")
