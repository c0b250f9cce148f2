"""What training a model would take in memory, before the model exists: ``qg.plan`` and ``qgalore plan``.

=============  ======================================================================================================
file           what it is
=============  ======================================================================================================
planner.py     ``plan``: settings to forecasts
forecast.py    ``Forecast`` and ``MemoryPlan``: what it returns, as a text and as JSON
states.py      what lies in memory between steps, exactly: the optimizer's own state on the meta device
twin.py        the model's copy without memory, and of equal layers a few
recording.py   a forward and a backward on fake tensors, operation by operation
losses.py      how a model is called for its loss
buffers.py     which values a compiled step stores: a model of Inductor's choices
outlined.py    layers as functions, which compute casts and gates again in the backward
timeline.py    bytes over the step, call by call and by category, of all layers
treatments.py  what this project makes of each gradient; ``refreshes.py`` what a new subspace takes
vocabulary.py  logits that exist some rows at a time
rivals.py      AdamW, 8-bit Adam, GaLore, LoRA and QLoRA, by formulas
process.py     what a process holds beside tensors: an estimate
cards.py       sizes of GPUs, and budgets in words
budget.py      what to change so that a step keeps to a budget
picture.py     the plot
=============  ======================================================================================================
"""

from __future__ import annotations

from qgalore_compile.planning.forecast import Forecast, MemoryPlan
from qgalore_compile.planning.planner import plan

__all__ = ["Forecast", "MemoryPlan", "plan"]
