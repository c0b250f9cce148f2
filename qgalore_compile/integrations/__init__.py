"""Where people train: other libraries' loops around a compiled step.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
trainer.py            ``QGaLoreTrainer``: transformers' ``Trainer``
needed.py             what to install, in words
====================  =================================================================================================

Each is looked up when it is first asked for: it loads the library that it is for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qgalore_compile.integrations.trainer import QGaLoreTrainer

__all__ = ["QGaLoreTrainer"]


def __getattr__(name: str) -> Any:
    if name != "QGaLoreTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qgalore_compile.integrations.trainer import QGaLoreTrainer

    return QGaLoreTrainer
