"""The compiler as a list: every pass, in order.

====================  =====  ========================================================================================
file                  tier   what it does
====================  =====  ========================================================================================
manager.py            –      runs the list, keeps a record of each pass, names the graph for Inductor's cache
dead_allocations.py   exact  erases allocations that nobody reads
====================  =====  ========================================================================================

A pass is a function ``run(graph, record)`` on the post-grad graph: functional ATen, ending in one ``copy_`` for each
tensor that the step changes.  Tier "exact" keeps every result bit for bit; "rounding" keeps the contract of
``docs/architecture.md``.
"""

from __future__ import annotations

from qgalore_compile.passes.dead_allocations import dead_allocations
from qgalore_compile.passes.manager import Pass, PassManager, PassRecord

__all__ = ["PASSES", "Pass", "PassManager", "PassRecord"]

PASSES: tuple[Pass, ...] = (Pass("dead_allocations", "exact", dead_allocations),)
