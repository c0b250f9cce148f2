"""qgalore_compile: a torch.compile backend that trains at full rank in little memory.

``import qgalore_compile as qg``: ``qg.quantize_`` turns a model's linear weights into INT8, ``qg.param_groups`` and
``qg.QGaLoreAdamW`` make the optimizer, and ``torch.compile(step, backend="qgalore", fullgraph=True)`` compiles the
whole training step.  ``qg.explain`` and ``qg.report`` tell what became of it, and ``qg.check`` compares it with the
eager step; ``qg.plan`` says beforehand what it will hold.  ``qg.export`` writes the trained model as safetensors.
"""

from qgalore_compile import _startup as _startup
from qgalore_compile.backend.sizes import mark_dynamic
from qgalore_compile.checkpoints import load, load_pretrained, save
from qgalore_compile.exports import export
from qgalore_compile.optim.adamw import QGaLoreAdamW
from qgalore_compile.optim.groups import param_groups
from qgalore_compile.optim.rules.base import Rule
from qgalore_compile.planning import MemoryPlan, plan
from qgalore_compile.progress import Progress, on_progress
from qgalore_compile.reports.check import CheckResult, check
from qgalore_compile.reports.report import Report, explain, report
from qgalore_compile.weights import Int8Weight, dequantize_, quantize_
from qgalore_compile.weights.coverage import CoverageWarning
from qgalore_compile.weights.initialization import initialize_

__all__ = [
    "CheckResult",
    "CoverageWarning",
    "Int8Weight",
    "MemoryPlan",
    "Progress",
    "QGaLoreAdamW",
    "Report",
    "Rule",
    "check",
    "dequantize_",
    "explain",
    "export",
    "initialize_",
    "load",
    "load_pretrained",
    "mark_dynamic",
    "on_progress",
    "param_groups",
    "plan",
    "quantize_",
    "report",
    "save",
]
__version__ = "0.1.0"
