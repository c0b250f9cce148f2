"""The backend: from a step to its one graph, through the passes, to Inductor; and what is kept of each compilation.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
entry.py              ``torch.compile(backend="qgalore")``: options, passes, hand-over to Inductor
tracing.py            what Dynamo does differently for our steps, and for nobody else's
frames.py             which frames of a step are not one graph, and why
sizes.py              which sizes of a batch vary; ``qg.mark_dynamic``
unseen.py             writes of an optimizer's operators that AOTAutograd need not see
reroll.py             equal layers, taken out before AOTAutograd walks over them
one_more.py           what tracing makes of one layer more, to compare with
recompute.py          checkpointed parts of a model, computed again where a backward reads them
direct.py             generated code that calls operators' functions, without PyTorch's dispatcher
dependencies.py       what Inductor's scheduler knows of a node, added to in place
cuda_graphs.py        a step that is replayed where no subspace is due (option ``cudagraphs``)
host_reads.py         what of a step is read on the host, and what of that a replay could not follow
capturing.py          how launches are captured and replayed
leavings.py           what compiling leaves behind, let go
spent.py              outputs that can be differentiated no more
asked.py              what the optimizers in a graph ask for
strict.py             what is not as asked, a sentence each
compilation.py        the record of a compilation, kept beside Inductor's cache
records.py            entries of such a record
dry_run.py            Inductor's graph passes without its code generation
====================  =================================================================================================

Names of ``entry.py``, which loads Inductor and takes a second, are looked up when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qgalore_compile.backend.entry import OptionError, Options, UnfusedError, qgalore

__all__ = ["OptionError", "Options", "UnfusedError", "qgalore"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qgalore_compile.backend import entry

    return getattr(entry, name)
