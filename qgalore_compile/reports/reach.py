"""What a step reaches: everything by a readable name, and the tensors among it with what they stand for."""

from __future__ import annotations

import dis
import inspect
import re
import sys
import sysconfig
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qgalore_compile.formats import Stored
from qgalore_compile.optim import groups, layout
from qgalore_compile.optim.hyper_parameters import Group
from qgalore_compile.subspace.projection import Side, side_of
from qgalore_compile.subspace.scheduler import Schedule
from qgalore_compile.weights import QuantizedWeight

_STATE = (Tensor, nn.Module, Optimizer)
_MUTABLE = (list, dict, set, bytearray, deque)
ATOMIC = (type(None), bool, int, float, complex, str, bytes, range, slice, type, type(...), CodeType, ModuleType,
           BuiltinFunctionType, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)  # fmt: skip
_LIBRARIES = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib"))
_INSTALLED = {"site-packages", "dist-packages"}  # of the user, of another environment on the path, of the system


def unwrapped(x: Any) -> Any:
    """What was handed to ``torch.compile``, or x."""
    while isinstance(x, FunctionType) and not hasattr(x, "_torchdynamo_disable"):
        if not hasattr(x, "_torchdynamo_orig_callable"):
            break
        x = x._torchdynamo_orig_callable
    return unwrapped(x._orig_mod) if type(x).__name__ == "OptimizedModule" else x


def bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by their parameters' names, or by their places where there is no signature."""
    try:
        return dict(inspect.signature(unwrapped(function)).bind_partial(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        return {**{f"args[{index}]": value for index, value in enumerate(args)}, **kwargs}


def _users_own(function: FunctionType) -> bool:
    return _is_users(function.__code__.co_filename)


def _is_users(file: str) -> bool:
    """Whether no library stands in a file."""
    return not file.startswith(_LIBRARIES) and _INSTALLED.isdisjoint(Path(file).parts)


def globals_of(function: FunctionType) -> tuple[dict[str, Any], bool]:
    """The globals that a user's function names, attributes of modules as "module.name", and whether it sets one."""
    found: dict[str, Any] = {}
    codes, sets = [function.__code__] if _users_own(function) else [], False
    for code in codes:
        codes += (constant for constant in code.co_consts if isinstance(constant, CodeType))
        instructions = list(dis.get_instructions(code))
        for one, following in zip(instructions, [*instructions[1:], instructions[-1]], strict=True):
            sets |= one.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")
            if one.opname not in ("LOAD_GLOBAL", "LOAD_NAME") or one.argval == "__name__":
                continue
            if one.argval not in function.__globals__:
                continue
            value = found[one.argval] = function.__globals__[one.argval]
            if isinstance(value, ModuleType) and following.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                found[f"{one.argval}.{following.argval}"] = vars(value).get(following.argval)
    return found, sets


def _children(name: str, x: Any) -> Iterator[tuple[str, Any]]:
    """What x refers to directly, with names.  Functions and methods are transparent: a variable's name is its own."""
    dot = f"{name}." if name else ""
    if isinstance(x, FunctionType):
        for variable, cell in zip(x.__code__.co_freevars, x.__closure__ or (), strict=True):
            if cell != CellType():
                yield variable, cell.cell_contents
        defaults = x.__defaults__ or ()
        yield from zip(x.__code__.co_varnames[x.__code__.co_argcount - len(defaults) :], defaults, strict=False)
        yield from chain((x.__kwdefaults__ or {}).items(), globals_of(x)[0].items(), vars(x).items())
    elif isinstance(x, (MethodType, partial)):
        yield name, x.__self__ if isinstance(x, MethodType) else x.func
        yield from ((name, x.__func__),) if isinstance(x, MethodType) else bound(x.func, x.args, x.keywords).items()
    elif isinstance(x, ref):
        yield name, x()
    elif isinstance(x, dict):
        yield from ((f"{name}[{key!r}]" if name else str(key), value) for key, value in x.items() if key is not x)
        yield from ((f"{name}.key", key) for key in x if not isinstance(key, ATOMIC))
    elif isinstance(x, (list, tuple, set, frozenset, deque)):
        yield from ((f"{name}[{index}]", value) for index, value in enumerate(x))
    elif isinstance(x, Tensor):
        if x.is_leaf:
            yield f"{name}.grad", x.grad
        if not isinstance(x, QuantizedWeight):
            yield from ((dot + key, value) for key, value in vars(x).items())
    elif not isinstance(x, ATOMIC):
        slots = [slot for cls in type(x).__mro__ for slot in cls.__dict__.get("__slots__", ()) if hasattr(x, slot)]
        inner = {**getattr(x, "__dict__", {}), **{slot: getattr(x, slot) for slot in slots}}
        for part in ("_parameters", "_buffers", "_modules") if isinstance(x, nn.Module) else ():
            yield from ((dot + key, value) for key, value in inner.pop(part).items())
        yield from ((dot + key, v) for key, v in inner.items() if not (isinstance(x, Optimizer) and key in _OPTIMIZER))


_OPTIMIZER = ("state", "param_groups", "defaults")


def _optimizer_children(optimizer: Optimizer, names: dict[int, str]) -> Iterator[tuple[str, Any]]:
    """Parameters, by the group's names where the model has not named them, and state, by its parameter's."""
    owners: dict[Any, str] = {}
    for position, group in enumerate(optimizer.param_groups):
        for own, p in zip(groups.names_of(group, position), group["params"], strict=True):
            owners[p] = names.get(id(p), own)
            yield owners[p], p
        yield from ((f"group {position}/{key}", value) for key, value in group.items() if key != "params")
    for owner, state in optimizer.state.items():
        where = owners.get(owner, str(owner) if isinstance(owner, str) else "state")
        yield from ((f"{where}/{key}", value) for key, value in state.items())


def walk(roots: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Everything that ``roots`` reach, once each, with a name.  Optimizers come last, for modules name better."""
    names: dict[int, str] = {}
    kept = []  # an id is one object's as long as that lives
    now, later = deque(roots.items()), deque[tuple[str, Any]]()
    while now or later:
        name, x = now.popleft() if now else later.popleft()
        x = unwrapped(x)
        if isinstance(x, ATOMIC):
            yield name, x
        elif id(x) not in names:
            if isinstance(x, Optimizer) and now:
                later.append((name, x))
                continue
            names[id(x)] = name
            kept.append(x)
            yield name, x
            now.extend(_children(name, x))
            if isinstance(x, Optimizer):
                now.extend(_optimizer_children(x, names))


def moves(x: Any) -> bool:
    """Whether a global with this value is copied: state, mutable containers, objects of a user's own class, and
    functions that have such."""
    if isinstance(x, FunctionType):
        return has_variables(x)
    return _is_mutable(x) or any(isinstance(each, _STATE) for _, each in walk({"": x}))


def _is_mutable(x: Any) -> bool:
    """Whether a step may count in it: a container, or an object of a class that no library has made."""
    if isinstance(x, _MUTABLE):
        return True
    if isinstance(x, ATOMIC) or not hasattr(x, "__dict__"):
        return False
    module = type(x).__module__
    file = getattr(sys.modules.get(module), "__file__", None)  # none of what is built in, nor of a notebook
    return module == "__main__" or (file is not None and _is_users(file))


def has_variables(function: FunctionType) -> bool:
    """Whether its copy would be another function; torch's own stay themselves, for Dynamo knows them by identity."""
    own = _users_own(function)
    for _, x in walk({"": function}):
        if isinstance(x, _STATE) or (own and _is_mutable(x)):
            return True
        if own and isinstance(x, FunctionType) and _users_own(x) and (x.__closure__ or globals_of(x)[1]):
            return True
    return False


# -- tensors ----------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A tensor, and where it belongs to an optimizer's state, its key there, that state, its parameter and group."""

    tensor: Tensor
    key: str
    state: dict[str, Any]
    parameter: Tensor | None
    group: dict[str, Any]

    @property
    def projector(self) -> Side | None:
        """The side of a projector of QGaLoreAdamW."""
        if self.key != "projector" or self.parameter is None or "quant_n_bit" not in self.group:
            return None
        return side_of(self.parameter.shape)

    @property
    def projector_names(self) -> tuple[str, ...]:
        """Where the state holds a projector."""
        return self.group.formats.names if isinstance(self.group, Group) else ("projector",)

    def projector_parts(self) -> list[Tensor]:
        """What the projector is stored in; [] where there is none."""
        return [self.state[name] for name in self.projector_names if name in self.state]

    @property
    def is_part(self) -> bool:
        """Whether it belongs to what another part stands for."""
        if not isinstance(self.group, Group) or self.parameter is None:
            return False
        return any(self.key in names[1:] for names in layout.names_of_parts(self.parameter, self.group))

    @property
    def turn(self) -> int:
        """The clock of the next turn; a step that moves it may have computed the subspace anew."""
        return Schedule.from_tensor(self.state["schedule"]).next if "schedule" in self.state else 0

    @property
    def stored(self) -> Stored | None:
        """The projector or the moment that this is, by its first part."""
        if self.parameter is None or not isinstance(self.group, Group):
            return None
        found = layout.stored(self.parameter, self.group, self.state, self.key)
        return found and found._replace(parts=[self.tensor.detach(), *found.parts[1:]])

    def value(self) -> Tensor:
        """What it stands for, exact or in float64."""
        x = self.tensor.detach()
        if isinstance(x, QuantizedWeight):
            x = x.dequantize()
        elif (stored := self.stored) is not None:
            x = stored.load()
        if x.is_complex():
            x = torch.view_as_real(x.resolve_conj())
        return x.to(torch.float64) if x.is_floating_point() else x

    def code_step(self) -> Tensor | None:
        """How far the next code is from each element's, float64; None where there are no codes, or of a projector."""
        x = self.tensor.detach()
        if isinstance(x, QuantizedWeight):
            step = x.stored.code_step()
            return step.t() if step is not None and x.transposed else step
        stored = self.stored
        return None if stored is None or self.projector else stored.code_step()

    def codes(self) -> Tensor | None:
        """Its integer codes, one an element."""
        if isinstance(self.tensor, QuantizedWeight):
            return self.tensor.stored.codes()
        return None if self.stored is None else self.stored.codes()


def entries(roots: dict[str, Any]) -> dict[str, Entry]:
    """Every tensor that ``roots`` reach; scales and offsets are part of what they belong to."""
    found: dict[str, Entry] = {}
    homes: dict[int, Entry] = {}
    times: Counter[str] = Counter()
    for name, x in walk(roots):
        if isinstance(x, Optimizer):
            home = {p: group for group in x.param_groups for p in group["params"]}
            for p, state in x.state.items():
                own = (state, p, home[p]) if p in home else (state, None, {})
                homes.update({id(t): Entry(t, key, *own) for key, t in state.items()})
        if isinstance(x, (int, float, complex)) and (name.endswith("/lr") or re.match(r"result\b", name)):
            x = torch.tensor(x)
        entry = homes.get(id(x), Entry(x, "", {}, None, {})) if isinstance(x, Tensor) else None
        if entry is not None and not entry.is_part:
            times[name] += 1
            found[name if times[name] == 1 else f"{name} ({times[name]})"] = entry
    return found
