"""``initialize_``: the values that an architecture asks for, drawn weight by weight into a model on the meta device.

A module's function may write what lies below it (a block that scales the last layer of its branch), and a quantised
weight can be drawn in float alone.  So all functions run once on the meta device, where nothing is computed, and a
weight is quantised behind the last one that writes it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qgalore_compile._torch import TorchDispatchMode, tree_leaves
from qgalore_compile.weights.filling import blocks, empty, fill_
from qgalore_compile.weights.places import Place, Places
from qgalore_compile.weights.tensor import QuantizedWeight
from qgalore_compile.words import listed

Init = Callable[[nn.Module], Any]


def initialize_(model: nn.Module, *, init: Init | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """Give a model on the meta device its memory and first values, in place, one module after the other.

    The model never exists in float: each weight that :func:`~qgalore_compile.quantize_` took is drawn in float and
    quantised when nothing writes it any more, as if all had been drawn first.  ::

        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        qg.quantize_(model)
        torch.manual_seed(0)
        qg.initialize_(model)

    Make the optimizer behind it: the parameters are new objects.  What is not on the meta device stays as it is.

    Args:
        model: changed in place.  Weights that modules share are drawn once, and shared afterwards.
        init: called with every module, children first, as ``model.apply(init)`` would; it writes in place.  By default
            a transformers model's own ``_init_weights``, of others each module's ``reset_parameters``.
        device: where the values go.

    Returns:
        The model.

    Raises:
        ValueError: nothing initialises something on the meta device; names it.  The model is then as it was.
    """
    places, chosen = Places(model), _Chosen(model, init)
    _run(model, places, chosen, device)
    return model


def initialize_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Give a model's buffers on the meta device the values that follow from its configuration.

    Raises:
        ValueError: nothing does that; names them, and leaves the model as it was.
    """
    places, chosen = Places(model, parameters=False), _Chosen(model, None)
    _run(model, places, chosen, device, ", which no file holds: build the model with real buffers (accelerate's "
         "init_empty_weights), and hand it over")  # fmt: skip


class _Chosen:
    """The function that initialises each module."""

    def __init__(self, model: nn.Module, init: Init | None) -> None:
        self._init = init
        self._theirs: dict[nn.Module, Init] = {}
        transformers = sys.modules.get("transformers.modeling_utils")
        if init is None and transformers is not None:
            for module in model.modules():  # parents come before what they contain: the nearest one stays
                if isinstance(module, transformers.PreTrainedModel):
                    self._theirs.update(dict.fromkeys(module.modules(), module._init_weights))

    def of(self, module: nn.Module) -> Init | None:
        """What is called with a module."""
        if self._init is not None:
            return self._init
        if module in self._theirs:
            return self._theirs[module]
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        return None if reset is None else lambda _: reset()

    def call(self, module: nn.Module) -> None:
        """Call it, where there is one."""
        init = self.of(module)
        if init is not None:
            init(module)

    @contextmanager
    def called(self, spared: Sequence[Tensor]) -> Iterator[None]:
        """Within it transformers leaves alone what it takes for initialised: what has values."""
        theirs = sys.modules.get("transformers.initialization") if self._theirs else None
        guard: Callable[[], AbstractContextManager[Any]] = getattr(theirs, "guard_torch_init_functions", nullcontext)
        marked = [each for each in spared if self._theirs and not hasattr(each, "_is_hf_initialized")]
        for each in marked:
            each._is_hf_initialized = True  # type: ignore[attr-defined]
        try:
            with guard():
                yield
        finally:
            for each in marked:
                del each._is_hf_initialized  # type: ignore[attr-defined]


@torch.no_grad()
def _run(
    model: nn.Module, places: Places, chosen: _Chosen, device: torch.device | str, otherwise: str = ": give init, a "
    "function that writes a module's parameters and buffers in place",
) -> None:  # fmt: skip
    """Draw everything, or leave all as it was."""
    order = [module for module in _children_first(model) if any(each in places.own for each in module.modules())]
    real = [each for each in (*model.parameters(), *model.buffers()) if not each.is_meta]
    with chosen.called(real):
        last, kept = _writers(order, places, chosen, real)
        if missing := [place.name for identity, place in places.first.items() if identity not in last]:
            raise ValueError(f"nothing gives values to {listed(missing, 4)}{otherwise}")
        drawn: dict[int, tuple[Place, Tensor]] = {}
        with places.restored_on_error():
            for index, module in enumerate(order):
                new = _allocate(places, module, device)
                drawn |= {id(place.tensor): (place, value) for place, value in new}
                if new or module not in places.own:  # a head that is tied to an embedding has the embedding's values
                    with _unchanged(kept[index]):
                        chosen.call(module)
                for identity in [each for each in drawn if last[each] == index]:
                    _settle(places, *drawn.pop(identity), device)
            places.share()


def _allocate(places: Places, module: nn.Module, device: torch.device | str) -> list[tuple[Place, Tensor]]:
    """Put float memory in a module's places; those that another module shares get what that has.

    Returns:
        What is new.
    """
    new = [
        (place, places.give(place, _blank(place.tensor, device)))
        for place in places.own.get(module, ())
        if places.given(place) is None
    ]
    places.share(module)
    return new


def _writers(
    order: Sequence[nn.Module], places: Places, chosen: _Chosen, real: Sequence[Tensor]
) -> tuple[dict[int, int], list[list[Tensor]]]:
    """What the functions of modules write, found by calling them on the meta device, where they compute nothing.

    Returns:
        For each tensor on the meta device the place, in that order of modules, of the last one whose function writes
        it; and for each module the tensors with values that it would overwrite.
    """
    state = torch.get_rng_state()
    last: dict[int, int] = {}
    kept: list[list[Tensor]] = []
    stand_ins: dict[int, int] = {}  # the place of a tensor's memory, to its identity
    held = {each.untyped_storage()._cdata: each for each in real if not isinstance(each, QuantizedWeight)}
    try:
        with _Writes(held.keys()) as writes:
            for index, module in enumerate(order):
                new = _allocate(places, module, "meta")
                stand_ins |= {value.untyped_storage()._cdata: id(place.tensor) for place, value in new}
                writes.seen.clear()
                if new or module not in places.own:
                    chosen.call(module)
                last |= {stand_ins[storage]: index for storage in writes.seen & stand_ins.keys()}
                kept.append([held[storage] for storage in writes.seen & held.keys()])
    finally:
        places.restore()
        torch.set_rng_state(state)
    return last, kept


class _Writes(TorchDispatchMode):
    """Sees whose memory operations write; of some tensors, whose memory is given, it leaves them undone."""

    def __init__(self, untouched: Collection[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._untouched = untouched
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = []
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[index] if index < len(args) else kwargs.get(argument.name)
                written += [each for each in tree_leaves(given) if isinstance(each, Tensor)]
        storages = {each.untyped_storage()._cdata for each in written if not isinstance(each, QuantizedWeight)}
        self.seen |= storages
        return written[0] if storages & set(self._untouched) else func(*args, **kwargs)


@contextmanager
def _unchanged(tensors: Sequence[Tensor]) -> Iterator[None]:
    """What had values before keeps them."""
    kept = [(each, each.clone()) for each in tensors]
    try:
        yield
    finally:
        for each, value in kept:
            each.copy_(value)


def _settle(places: Places, place: Place, value: Tensor, device: torch.device | str) -> None:
    """Check what was drawn, and quantise it where it is to be."""
    if _is_blank(value):
        raise ValueError(f"{place.name} of shape {tuple(value.shape)} is left without some of its values by what "
                         f"initialises {type(place.module).__name__}; give init")  # fmt: skip
    if isinstance(place.tensor, QuantizedWeight):
        stored = empty(place.tensor, device)
        for rows in blocks(stored):
            fill_(stored, rows, value[rows], place.name)
        places.give(place, stored)


def _blank(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Memory for a tensor in float, filled with what no function draws."""
    value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if value.is_floating_point() or value.is_complex():
        return value.fill_(torch.nan)
    return value if value.dtype == torch.bool else value.fill_(torch.iinfo(value.dtype).max)


def _is_blank(value: Tensor) -> bool:
    if value.numel() == 0 or value.dtype == torch.bool:
        return False
    if value.is_complex():
        return bool(value.isnan().any())
    if value.is_floating_point():
        return bool(value.detach().amin().isnan())
    return bool((value == torch.iinfo(value.dtype).max).all())


def _children_first(model: nn.Module) -> Iterator[nn.Module]:
    """Every module once, in the order of ``model.apply``."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            yield from walk(child)
        if module not in seen:
            seen.add(module)
            yield module

    yield from walk(model)
