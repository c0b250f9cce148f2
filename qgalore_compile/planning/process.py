"""What a process holds beside tensors.  Not counted: fitted to a few runs, and not good to a percent.

On a CPU: Python, torch and the compiler's own memory, which stays with the process when the step has been compiled, and
grows with the layers that were traced (``benchmarks/plan.py`` measures it).  On a GPU: the context and libraries, and
what PyTorch's allocator reserves but does not hand out: 8.4 % in the run of ``docs/gpu.md``.
"""

from __future__ import annotations

INTERPRETER = 560_000_000
COMPILED = 18_000_000

CONTEXT = 500_000_000
FRAGMENTS = 0.084


def process_bytes(device: str, layers: int, tensors: int) -> int:
    """Bytes of a process that trains, beside its tensors.

    Args:
        device: "cpu" or "cuda".
        layers: of the model.
        tensors: bytes at the peak.
    """
    if device == "cuda":
        return CONTEXT + int(FRAGMENTS * tensors)
    return INTERPRETER + COMPILED * max(1, layers)
