"""Copies of what a step reaches, functions included.

``copy.deepcopy`` will not do: functions are atomic to it, so a copied step would go on using the original model; a
copied parameter has lost its gradient, its hooks and its attributes, and a copied optimizer its hooks; and its errors
do not say where the object was found.

A copied function that reads copied globals, or sets any, has those of a module made for the copy, so nothing is set in
the user's.  It is in ``sys.modules`` until :meth:`Copier.close`, for Dynamo finds globals by their module's name.
"""

from __future__ import annotations

import builtins
import copyreg
import sys
from collections import Counter
from collections.abc import Callable
from itertools import count
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qgalore_compile._torch import has_storage
from qgalore_compile.reports.reach import ATOMIC, globals_of, has_variables, moves, unwrapped, walk
from qgalore_compile.weights import QuantizedWeight

_KEPT = ("torch._library", "torch._ops", "torch.library", "triton")  # classes whose objects Dynamo knows by identity


_runs = count()


class CopyError(TypeError):
    """The step reaches something that has no copy; the message names it and says what to do."""


class Copier:
    """Copies with one memo: what is shared stays shared, storages of tensors included.

    Args:
        roots: all that will be copied, by name, for messages and to know which tensors share a storage.
    """

    def __init__(self, roots: dict[str, Any]) -> None:
        self._roots = roots
        self._memo: dict[int, Any] = {}
        self._kept: list[Any] = []
        self._storages: dict[int, Any] = {}
        self._modules: list[ModuleType] = []
        self._sharing = Counter(_storage(x) for _, x in walk(roots) if isinstance(x, Tensor))

    def copy(self, x: Any) -> Any:
        """The copy of x; x itself where it is immutable.

        Raises:
            CopyError: x, or something that it refers to, has no copy.
        """
        x = unwrapped(x)
        if isinstance(x, ATOMIC) or type(x).__module__.startswith(_KEPT):
            return x
        if id(x) not in self._memo:
            self._kept.append(x)
            self._memo[id(x)] = self._new(x)
        return self._memo[id(x)]

    def close(self) -> None:
        """Take the copied globals away; copied functions that read them cannot be called any more."""
        for module in self._modules:
            del sys.modules[module.__name__]
            vars(module).clear()  # Dynamo keeps the module in a cache

    def _new(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self._tensor(x)
        if isinstance(x, FunctionType):
            return self._function(x) if has_variables(x) else x
        if isinstance(x, MethodType):
            return MethodType(self.copy(x.__func__), self.copy(x.__self__))
        if type(x) is tuple:
            return tuple(map(self.copy, x))
        if isinstance(x, ref):
            return x if x() is None else ref(self.copy(x()))
        if isinstance(x, torch.Generator):
            return x.clone_state()
        try:
            return self._object(x)
        except CopyError:
            raise
        except Exception as error:
            raise self._refused(
                x,
                f"{error}; give check a step that does not reach it, such as a function of the "
                "model, the optimizer and the data alone",
            ) from error

    def _refused(self, x: Any, why: str) -> CopyError:
        name = next((name for name, each in walk(self._roots) if each is x), "") or "the step itself"
        return CopyError(f"check runs the step on copies, and {name} ({type(x).__qualname__}) has none: {why}")

    def _tensor(self, x: Tensor) -> Tensor:
        if not x.is_leaf:
            raise self._refused(
                x,
                "it is the result of a computation that gradients flow back through; detach() it, "
                "or compute it inside the step",
            )
        if type(x) not in (Tensor, nn.Parameter) or not _storage(x):
            new: Tensor = x.__deepcopy__(self._memo)
        else:
            data = self._data(x)
            new = nn.Parameter(data, x.requires_grad) if isinstance(x, nn.Parameter) else data
            new.requires_grad_(x.requires_grad)
        self._memo[id(x)] = new
        if new.grad is None and x.grad is not None:
            new.grad = self.copy(x.grad)
        vars(new).update({key: self.copy(value) for key, value in vars(x).items()})
        for hook in (x._backward_hooks or {}).values():
            new.register_hook(self.copy(hook))
        for hook in (getattr(x, "_post_accumulate_grad_hooks", None) or {}).values():
            new.register_post_accumulate_grad_hook(self.copy(hook))
        return new

    def _data(self, x: Tensor) -> Tensor:
        key = _storage(x)
        if self._sharing[key] < 2:  # its own elements only: a batch may be a slice of a data set
            return x.detach().clone()
        if key not in self._storages:
            self._storages[key] = x.untyped_storage().clone()
        new = torch.empty(0, dtype=x.dtype, device=x.device)
        return new.set_(self._storages[key], x.storage_offset(), x.size(), x.stride())

    def _function(self, x: FunctionType) -> FunctionType:
        found, sets = globals_of(x)
        for name, value in found.items():
            if "." in name and moves(value):
                raise self._refused(
                    value,
                    f"{x.__qualname__} reads it as {name}, from a module that is not copied; "
                    "import the name itself, or pass it as an argument",
                )
        moved = {name: value for name, value in found.items() if "." not in name and moves(value)}
        scope = x.__globals__
        if moved or sets:
            if id(scope) not in self._memo:
                self._modules.append(module := ModuleType(f"qgalore_check_{next(_runs)}"))
                sys.modules[module.__name__] = module
                vars(module).update(__builtins__=builtins, __package__=scope.get("__package__"))
                self._memo[id(scope)] = vars(module)
            scope = self._memo[id(scope)]
            scope.update({name: value for name, value in found.items() if "." not in name and name not in scope})
        cells = tuple(self._memo.setdefault(id(cell), CellType()) for cell in x.__closure__ or ())
        new = FunctionType(x.__code__, scope, x.__name__, None, cells)
        self._memo[id(x)] = new  # before what it refers to, which may refer to it
        for cell, original in zip(cells, x.__closure__ or (), strict=True):
            if original != CellType() and cell == CellType():
                cell.cell_contents = self.copy(original.cell_contents)
        new.__module__, new.__qualname__, new.__doc__ = x.__module__, x.__qualname__, x.__doc__
        new.__defaults__, new.__kwdefaults__ = self.copy(x.__defaults__), self.copy(x.__kwdefaults__)
        vars(new).update({key: self.copy(value) for key, value in vars(x).items()})
        scope.update({name: self.copy(value) for name, value in moved.items()})
        return new

    def _object(self, x: Any) -> Any:
        """As ``copy.deepcopy`` does it; an optimizer keeps its hooks, which its own ``__getstate__`` leaves out."""
        if isinstance(x, Optimizer):
            self._memo[id(x)] = new = object.__new__(type(x))
            vars(new).update({key: self.copy(value) for key, value in vars(x).items()})
            return new
        if hasattr(type(x), "__deepcopy__"):
            return x.__deepcopy__(self._memo)
        reduce = copyreg.dispatch_table.get(type(x))
        reduced = reduce(x) if reduce else x.__reduce_ex__(4)
        if isinstance(reduced, str):
            return x
        make, args, state, items, pairs = (*reduced[:5], None, None, None)[:5]
        self._memo[id(x)] = new = make(*map(self.copy, args))
        self._kept.append(reduced)
        if hasattr(new, "__setstate__") and state is not None:
            new.__setstate__(self.copy(state))
        else:
            attributes, slots = state if isinstance(state, tuple) else (state, None)
            for key, value in {**(attributes or {}), **(slots or {})}.items():
                object.__setattr__(new, key, self.copy(value))
        for item in items or ():
            new.append(self.copy(item))
        for key, value in pairs or ():
            new[self.copy(key)] = self.copy(value)
        return new


def _storage(x: Tensor) -> int:
    """Which storage a plain tensor is a view of; 0 where it has none of its own."""
    plain = x.layout is torch.strided and not x.is_quantized and not x.is_meta and has_storage(x)
    return x.untyped_storage()._cdata if plain and not isinstance(x, QuantizedWeight) else 0


def alone(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` inlined into a function whose code and globals nobody else has: Dynamo keeps what it compiles there.

    Names are new each time, since Dynamo goes by them when it remembers which sizes have changed.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    run = next(_runs)
    variables = (f"args_{run}", f"kwargs_{run}")
    code = call.__code__.replace(co_name=f"check_{run}", co_freevars=(f"step_{run}",), co_varnames=variables)
    return FunctionType(code, {"__builtins__": builtins}, code.co_name, None, call.__closure__)
