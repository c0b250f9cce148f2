"""The error of a traced step in which no parameter has a gradient: compiled, it would train nothing.

Imported where it is raised, for it loads Dynamo.
"""

from __future__ import annotations

from qgalore_compile._torch import ShortenTraceback


class NoGradientError(ShortenTraceback, RuntimeError):
    """``opt.step()`` is part of a compiled step in which no parameter of ``opt`` has a gradient."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)
