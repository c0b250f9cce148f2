"""Collectives of torch.distributed on INT8 weights: a broadcast of the stored parts; every other one is refused.

c10d's schemas carry no alias information, so an operation that ran on dequantised copies would write into those and
return as if all were well.
"""

from __future__ import annotations

from typing import Any

_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "symm_mem")


def is_collective(func: Any) -> bool:
    """Whether ``func`` is an operator of torch.distributed."""
    namespace: str = func.namespace
    return namespace in _NAMESPACES


def collective(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Broadcast codes, scales and offsets one after the other.

    Returns:
        What ``func`` returns: the tensors, and the work of the last part.  The others have been waited for.

    Raises:
        NotImplementedError: another collective, or a broadcast of a view.  Nothing has been sent or changed then.
    """
    sent = args[0] if str(func) == "c10d.broadcast_.default" else []
    if not sent or not all(hasattr(each, "__tensor_flatten__") for each in sent):
        raise NotImplementedError(
            f"the collective {func} is not supported on INT8 weights: sums and shards of codes mean nothing, and "
            "floats would be lost. torch.distributed.broadcast(weight.detach(), src) is; reduce the gradients, which "
            "are ordinary floats, or take weight.dequantize() or qgalore_compile.dequantize_(model) and send floats"
        )
    (weight,) = sent  # torch.distributed.broadcast sends one tensor at a time, as its backends demand
    *parts, last = (getattr(weight, name) for name in weight.__tensor_flatten__()[0])
    for part in parts:
        func([part], *args[1:], **kwargs)[1].wait()
    return [weight], func([last], *args[1:], **kwargs)[1]
