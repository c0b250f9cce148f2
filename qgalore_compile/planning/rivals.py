"""What other ways of training the same model hold, by formulas: each from its source, for one parameter at a time.

All of them are given the forward and backward that this project compiles, so that only what belongs to the method
differs: an eager step keeps more for its backward.  Gradients are whole and live until the optimizer's step behind the
backward, as ``loss.backward(); opt.step()`` has them.

===================  ==================================================================================================
AdamW                weights and two moments in the weights' dtype; torch.optim.AdamW, ``zeros_like(p)``
8-bit Adam           moments of a byte, a float32 maximum for each block of 256; float32 below 4,096 elements.
                     Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861); bitsandbytes
GaLore               projector and moments of R in the gradient's dtype, the gradient whole.  Zhao et al. (arXiv
                     2403.03507), table 1; jiaweizzhao/GaLore, ``galore_projector.py``
LoRA                 a frozen base; of each projected weight B (m, r) and A (r, n) in bfloat16, their gradients, and
                     moments in float32.  Hu et al. (arXiv 2106.09685)
QLoRA                the same over a base in NF4: 4 bits, a maximum of 8 bits for 64 of them, one of 32 bits for 256 of
                     those (0.127 bits an element), decoded weight by weight.  Dettmers et al. (arXiv 2305.14314)
===================  ==================================================================================================
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from qgalore_compile.optim import layout
from qgalore_compile.planning.states import Bytes, Holding
from qgalore_compile.planning.timeline import Treatment

_ADAPTER, _ADAPTER_MOMENTS = 2, 8
"""Bytes of an element of an adapter, and of its two moments."""
_BLOCK, _SMALL = 256, 4096


class Rival(NamedTuple):
    """A way of training.

    Attributes:
        name: of it.
        holds: bytes between steps for a parameter, by category.
        treats: what becomes of a parameter's gradient, of elements of so many bytes, over so many tokens; None where
            it has none.
    """

    name: str
    holds: Callable[[Holding], Bytes]
    treats: Callable[[Holding, int, int], Treatment | None]


def _count(holding: Holding) -> int:
    return math.prod(holding.parameter.shape)


def _float_weight(holding: Holding) -> int:
    return _count(holding) * holding.parameter.dtype.itemsize


def _projected(holding: Holding) -> bool:
    return "rank" in holding.group


def _whole(holding: Holding, tokens: int, element: int) -> Treatment:
    return Treatment(_count(holding) * element)


def _adamw(holding: Holding) -> Bytes:
    weight = _float_weight(holding)
    return Counter({"weights": weight, "moments": 2 * weight, "other states": 4})


def _adam_8bit(holding: Holding) -> Bytes:
    count = _count(holding)
    moments = 8 * count if count < _SMALL else 2 * count + 2 * 4 * -(-count // _BLOCK)
    return Counter({"weights": _float_weight(holding), "moments": moments})


def _galore(holding: Holding) -> Bytes:
    if not layout.projects(holding.group):
        return _adamw(holding)
    weight, element, rank = _float_weight(holding), holding.parameter.dtype.itemsize, _rank(holding)
    low, projector = max(holding.parameter.shape) * rank, min(holding.parameter.shape) * rank
    return Counter({"weights": weight, "moments": 2 * low * element, "projectors": projector * element})


def _rank(holding: Holding) -> int:
    return layout.rank_of(holding.group, holding.parameter)


def _adapters(holding: Holding) -> int:
    return _rank(holding) * sum(holding.parameter.shape) if _projected(holding) else 0


def _lora(holding: Holding) -> Bytes:
    adapters = _adapters(holding)
    weights = _float_weight(holding) + _ADAPTER * adapters
    return Counter({"weights": weights, "moments": _ADAPTER_MOMENTS * adapters})


def _qlora(holding: Holding) -> Bytes:
    found = _lora(holding)
    if _projected(holding):
        count, adapters = _count(holding), _ADAPTER * _adapters(holding)
        blocks = -(-count // 64)
        found.update({"scales": blocks + 4 * -(-blocks // 256)})
        found["weights"] = -(-count // 2) + adapters
    return found


def _of_adapters(holding: Holding, tokens: int, element: int) -> Treatment | None:
    if not _projected(holding):
        return None
    # X A' of the forward is there again: a rank's worth of a token
    return Treatment(_ADAPTER * _adapters(holding), forms=False, while_made=2 * tokens * _rank(holding) * element)


def _over_nf4(holding: Holding, tokens: int, element: int) -> Treatment | None:
    treatment = _of_adapters(holding, tokens, element)
    if treatment is None:
        return None
    return treatment._replace(while_made=treatment.while_made + _count(holding) * element)


RIVALS = (
    Rival("GaLore", _galore, _whole),
    Rival("8-bit Adam", _adam_8bit, _whole),
    Rival("AdamW", _adamw, _whole),
    Rival("LoRA", _lora, _of_adapters),
    Rival("QLoRA", _qlora, _over_nf4),
)
