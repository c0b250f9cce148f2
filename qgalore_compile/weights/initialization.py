"""``initialize_``: the values that an architecture asks for, drawn weight by weight into a model on the meta device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qgalore_compile.weights.filling import blocks, empty, fill_, put
from qgalore_compile.weights.tensor import QuantizedWeight

Init = Callable[[nn.Module], Any]


@torch.no_grad()
def initialize_(model: nn.Module, *, init: Init | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """Give a model on the meta device its memory and first values, in place, one module after the other.

    The model never exists in float: each weight that :func:`~qgalore_compile.quantize_` took is drawn in float alone
    and quantised, as if all had been drawn first.  ::

        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        qg.quantize_(model)
        torch.manual_seed(0)
        qg.initialize_(model)

    Make the optimizer behind it: the parameters are new objects.  What is not on the meta device stays as it is.

    Args:
        model: changed in place.  Weights that modules share are drawn once, and shared afterwards.
        init: called with every module, children first, as ``model.apply(init)`` would; it writes the module's own
            parameters and buffers in place.  By default a transformers model's own ``_init_weights``, of others each
            module's ``reset_parameters``.
        device: where the values go.

    Returns:
        The model.

    Raises:
        ValueError: no function initialises a module with something on the meta device; one leaves something without
            values.  The model is then as it was.
    """
    places = Places(model)
    chosen = _Chosen(model, init)
    missing = [name for name, module in places.modules() if chosen.of(module) is None]
    if missing:
        raise ValueError(
            f"nothing initialises {_listed(missing)}: the class has no reset_parameters; give init, a function that "
            "writes a module's own parameters and buffers, or build the model with real buffers "
            "(accelerate's init_empty_weights)"
        )
    try:
        with chosen.guard():
            for module in _children_first(model):
                if places.own(module) or chosen.everywhere:
                    _initialize(module, places, chosen, device)
    except BaseException:
        places.restore()
        raise
    return model


class _Own(NamedTuple):
    """Something on the meta device: its key in the module, and its name in the model."""

    key: str
    name: str
    tensor: Tensor


class Places:
    """What of a model is on the meta device, by module, and what has come in its place."""

    def __init__(self, model: nn.Module, *, parameters: bool = True) -> None:
        self._own: dict[nn.Module, list[_Own]] = {}
        self._names: dict[nn.Module, str] = {}
        self._shared: dict[int, Tensor] = {}
        for prefix, module in model.named_modules():
            self._names[module] = prefix
            held = [*(module._parameters.items() if parameters else ()), *module._buffers.items()]
            own = [_Own(key, f"{prefix}.{key}".lstrip("."), tensor) for key, tensor in held
                   if tensor is not None and tensor.is_meta]  # fmt: skip
            if own:
                self._own[module] = own

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Those with something of their own there, by the name that messages give them."""
        for module in self._own:
            yield f"{self._names[module] or 'the model'} ({type(module).__name__})", module

    def own(self, module: nn.Module) -> list[_Own]:
        """A module's."""
        return self._own.get(module, [])

    def taken(self, module: nn.Module) -> list[_Own]:
        """Those of a module's that no other module has been given already; the others are put there."""
        found = []
        for own in self.own(module):
            if id(own.tensor) in self._shared:
                self._put(module, own.key, self._shared[id(own.tensor)])
            else:
                found.append(own)
        return found

    def give(self, module: nn.Module, own: _Own, tensor: Tensor) -> Tensor:
        """Put a tensor in a place; what is there then."""
        put(module, own.key, tensor)
        found = (module._parameters if own.key in module._parameters else module._buffers)[own.key]
        assert found is not None
        self._shared[id(own.tensor)] = found
        return found

    def _put(self, module: nn.Module, key: str, tensor: Tensor) -> None:
        held: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
        held[key] = tensor

    def restore(self) -> None:
        """All as it was."""
        for module, every in self._own.items():
            for own in every:
                self._put(module, own.key, own.tensor)


class _Chosen:
    """The function that initialises each module.

    Attributes:
        everywhere: whether it is called with modules that have nothing of their own, too.
    """

    def __init__(self, model: nn.Module, init: Init | None) -> None:
        self._init = init
        self._theirs: dict[nn.Module, Init] = {}
        transformers = sys.modules.get("transformers.modeling_utils")
        if init is None and transformers is not None:
            for module in model.modules():  # parents come before what they contain: the nearest one stays
                if isinstance(module, transformers.PreTrainedModel):
                    self._theirs.update(dict.fromkeys(module.modules(), module._init_weights))
        self.everywhere = init is not None or bool(self._theirs)
        if self._theirs:
            for tensor in (*model.parameters(), *model.buffers()):
                if not tensor.is_meta:
                    tensor._is_hf_initialized = True  # type: ignore[attr-defined]

    def of(self, module: nn.Module) -> Init | None:
        if self._init is not None:
            return self._init
        if module in self._theirs:
            return self._theirs[module]
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        return None if reset is None else lambda _: reset()

    def leaves_values(self, module: nn.Module) -> bool:
        """Whether a module's function leaves alone what has values already."""
        return module in self._theirs or (not module._parameters and self.of(module) is not None)

    def guard(self) -> AbstractContextManager[Any]:
        """Within it transformers leaves what it takes for initialised."""
        theirs = sys.modules.get("transformers.initialization") if self._theirs else None
        guard = getattr(theirs, "guard_torch_init_functions", None)
        return nullcontext() if guard is None else guard()


def _initialize(module: nn.Module, places: Places, chosen: _Chosen, device: torch.device | str) -> None:
    taken = places.taken(module)
    if places.own(module) and not taken:
        return  # it shares all of them
    drawn = [(own, places.give(module, own, _blank(own.tensor, device))) for own in taken]
    init = chosen.of(module)
    if init is not None:
        init(module)
    for own, value in drawn:
        if _is_blank(value):
            raise ValueError(f"{own.name} of shape {tuple(value.shape)} is left without values by what initialises "
                             f"{type(module).__name__}; give init")  # fmt: skip
        if isinstance(own.tensor, QuantizedWeight):
            stored = empty(own.tensor, device)
            for rows in blocks(stored):
                fill_(stored, rows, value[rows], own.name)
            places.give(module, own, stored)


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


def initialize_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Give a model's buffers on the meta device the values that follow from its configuration.

    Raises:
        ValueError: nothing does that; names them, and leaves the model as it was.
    """
    places, chosen = Places(model, parameters=False), _Chosen(model, None)
    missing = [own.name for _, module in places.modules() for own in places.own(module)
               if not chosen.leaves_values(module)]  # fmt: skip
    try:
        if missing:
            raise ValueError(f"nothing gives values to {_listed(missing)}, which no file holds: build the model with "
                             "real buffers (accelerate's init_empty_weights), and hand it over")  # fmt: skip
        with chosen.guard():
            for _, module in list(places.modules()):
                _initialize(module, places, chosen, device)
    except BaseException:
        places.restore()
        raise


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


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
