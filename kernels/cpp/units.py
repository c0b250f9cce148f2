"""Inductor's own C++ kernels, several to one run of the compiler.

A module that Inductor generates for a CPU asks for each of its kernels apart, and all of them when its code is done: of
the 0.8 s that the compiler then takes a kernel, 0.6 are its start and the precompiled header.  53 kernels of a model of
eight layers take 42 s of a core so, and 7 in units of 13 (an AMD EPYC, GCC 12).  So while a step of ours is compiled,
kernels of a module are compiled some at a time, each in a namespace of its own, with Inductor's flags and bindings, in
its cache.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

from qgalore_compile import progress
from qgalore_compile._torch import (
    AsyncCompile,
    CppCompileError,
    CppPythonBindingsCodeCache,
    LambdaFuture,
    clear_on_fresh_cache,
    tensor_data_pointer,
)
from qgalore_compile.kernels.cpp.launch import compilers

log = logging.getLogger(__name__)

UNIT = 16
"""Kernels in a unit.  More would take longer to compile one after the other than the compiler's start takes."""

_MARK = "_knows_units"
_now = threading.local()
_batches: WeakKeyDictionary[Any, _Batch] = WeakKeyDictionary()
"""By what a generated module asks for its kernels."""


@contextmanager
def together() -> Iterator[None]:
    """Compile kernels that this thread asks for in units."""
    _install()
    before, _now.together = _is_together(), True
    try:
        yield
    finally:
        _now.together = before


def _is_together() -> bool:
    return getattr(_now, "together", False)


def _install() -> None:
    """Put wrappers around two of Inductor's functions, which run them elsewhere; a second call does nothing."""
    original, original_wait = AsyncCompile.cpp_pybinding, AsyncCompile.wait
    if getattr(original, _MARK, False):
        return

    @wraps(original)
    def cpp_pybinding(self: Any, argtypes: list[str], source: str) -> Any:
        if not _is_together():
            return original(self, argtypes, source)
        batch = _batches.setdefault(self, _Batch())
        return _Promise(batch.add(_Kernel(tuple(argtypes), source)))

    @wraps(original_wait)
    def wait(self: Any, scope: dict[str, Any]) -> None:
        if self in _batches:  # Inductor waits for nothing where it would compile one kernel at a time
            scope |= {name: each.result() for name, each in scope.items() if isinstance(each, _Promise)}
        original_wait(self, scope)

    setattr(cpp_pybinding, _MARK, True)
    AsyncCompile.wait = wait  # type: ignore[method-assign]
    AsyncCompile.cpp_pybinding = cpp_pybinding  # type: ignore[assignment]


class _Promise(LambdaFuture):
    """A kernel that is yet to be waited for."""


class _Kernel(NamedTuple):
    """What a module asks for: a function ``kernel`` with arguments of these types."""

    argtypes: tuple[str, ...]
    source: str


class _Batch:
    """The kernels of one module; units are begun when the first kernel is waited for."""

    def __init__(self) -> None:
        self._kernels: list[_Kernel] = []
        self._units: list[Callable[[], Any] | None] | None = None
        self._begun = 0

    def add(self, kernel: _Kernel) -> Callable[[], Any]:
        """What waits for the kernel and returns it, to be called with a tuple of its arguments."""
        index = len(self._kernels)
        self._kernels.append(kernel)
        return lambda: self._loaded(index)

    def _loaded(self, index: int) -> Any:
        if self._units is None:
            self._begun = len(self._kernels)
            self._units = [_begun(self._kernels[at : at + UNIT]) for at in range(0, self._begun, UNIT)]
            progress.wait_for_kernels()
        load = self._units[index // UNIT] if index < self._begun else None  # None: asked for behind the first wait
        if load is not None:
            try:
                unit = load()
                return _imported(unit.path, unit.key, index % UNIT)
            except CppCompileError as error:
                self._units[index // UNIT] = None
                log.warning("kernels are compiled one by one, for the compiler does not take them together: %s", error)
        kernel = self._kernels[index]
        return CppPythonBindingsCodeCache.load_pybinding(kernel.argtypes, kernel.source)


@clear_on_fresh_cache
class _Unit(CppPythonBindingsCodeCache):
    """The cache of units, which holds where they are."""

    cache: ClassVar[dict[str, Callable[[], Any]]] = {}  # type: ignore[misc]
    cache_clear = staticmethod(cache.clear)

    @classmethod
    def _load_library_inner(cls, path: str, key: str) -> Any:
        return SimpleNamespace(path=path)


def _begun(kernels: Sequence[_Kernel]) -> Callable[[], Any]:
    """Begin to compile a unit on another thread; what waits for it."""
    submit = progress.counted(compilers().submit, len(kernels))
    return _Unit.load_async(text_of(kernels), "cpu", submit_fn=submit)  # type: ignore[no-any-return]


_CLEAN = "#define PY_SSIZE_T_CLEAN"
_INCLUDE = re.compile(r"^\s*#\s*include\b.*$", re.MULTILINE)


def text_of(kernels: Sequence[tuple[Sequence[str], str]]) -> str:
    """A unit's C++: the files that kernels include, once, and each kernel with its bindings in a namespace.

    Args:
        kernels: types of arguments and source of each, as Inductor's generated code gives them.
    """
    bodies = []
    included: dict[str, None] = {}
    for index, (argtypes, source) in enumerate(kernels):
        whole = source + _bindings(argtypes, f"kernel_{index}")
        included |= dict.fromkeys(line.strip() for line in _INCLUDE.findall(whole))
        # a function with C's linkage is one for all namespaces
        own = re.sub(r'extern\s+"C"', "", _INCLUDE.sub("", whole)).replace(_CLEAN, "")
        bodies.append(f"namespace qgalore_{index} {{\n{own}\n}}\n")
    return "\n".join([_CLEAN, *included, *bodies])


def _bindings(argtypes: Sequence[str], name: str) -> str:
    own = CppPythonBindingsCodeCache
    parsed = ", ".join(f"parse_arg<{each.replace('const ', '')}>(args, {at})" for at, each in enumerate(argtypes))
    return "\n" + own.suffix_template.format(
        arg_len=len(argtypes), call_entry_func=own.call_entry_function.format(parsed), entry_func=name,
        extra_parse_arg=own.extra_parse_arg,
    )  # fmt: skip


def _imported(path: str, key: str, index: int) -> Any:
    """The kernel of a number in a unit."""
    # where the bindings read how to find a tensor's memory
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(tensor_data_pointer)
    name = f"kernel_{index}"
    spec = spec_from_file_location(f"{key}.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
