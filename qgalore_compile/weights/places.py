"""Where modules hold what is on the meta device: values come in its place, whoever shared it shares them, and where
that fails all is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn


class Place(NamedTuple):
    """A module's parameter or buffer on the meta device: its key there, its name in the model, and itself."""

    module: nn.Module
    key: str
    name: str
    tensor: Tensor


class Places:
    """What of a model is on the meta device when this is made, and what has come in its place.

    Attributes:
        own: the places by module, of those that have any; what modules share has a place in each.
        first: the first place of each tensor, by its identity.
    """

    def __init__(self, model: nn.Module, *, parameters: bool = True) -> None:
        self.own: dict[nn.Module, list[Place]] = {}
        self.first: dict[int, Place] = {}
        self._given: dict[int, Tensor] = {}
        for prefix, module in model.named_modules():
            for key, tensor in [*(module._parameters.items() if parameters else ()), *module._buffers.items()]:
                if tensor is not None and tensor.is_meta:
                    place = Place(module, key, f"{prefix}.{key}".lstrip("."), tensor)
                    self.own.setdefault(module, []).append(place)
                    self.first.setdefault(id(tensor), place)

    def given(self, place: Place) -> Tensor | None:
        """What :meth:`give` has put in this place, or in one that shares it; None while nothing has come."""
        return self._given.get(id(place.tensor))

    def give(self, place: Place, tensor: Tensor) -> Tensor:
        """Put a tensor in a place; a parameter's is a parameter then, with what the old one is marked with.

        Returns:
            What is there: the tensor of a buffer, the new parameter of a parameter.
        """
        held = _held(place)
        if place.key in place.module._parameters:
            old = held[place.key]
            new = nn.Parameter(tensor, requires_grad=old.requires_grad)
            for name, value in vars(old).items():  # marks of other libraries
                vars(new).setdefault(name, value)
            tensor = new
        held[place.key] = self._given[id(place.tensor)] = tensor
        return tensor

    def share(self, module: nn.Module | None = None) -> None:
        """In every place, or a module's, what :meth:`give` has put in one that shares it."""
        for place in self._every() if module is None else self.own.get(module, ()):
            if (tensor := self.given(place)) is not None:
                _held(place)[place.key] = tensor

    def restore(self) -> None:
        """All as it was."""
        self._given.clear()
        for place in self._every():
            _held(place)[place.key] = place.tensor

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Where the block raises, all is as it was."""
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def _every(self) -> Iterator[Place]:
        for own in self.own.values():
            yield from own


def _held(place: Place) -> dict[str, Any]:
    """Where the module holds it."""
    return place.module._parameters if place.key in place.module._parameters else place.module._buffers
