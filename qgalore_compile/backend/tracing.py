"""How Dynamo traces *our* steps, and nobody else's.

Dynamo can make ``loss.backward()`` part of a graph, but only where it is told to (``trace_autograd_ops``), for a whole
thread, and with gaps that train nothing, or slowly, without a word.  :func:`install` puts wrappers around some of
its functions.  Each asks first whether the frame that is being traced was given to this backend; if not, torch's own
function runs as it stands, with the configuration that it had.

=============================  ========================================================================================
what Dynamo does by itself     what it does for a step of ours
=============================  ========================================================================================
breaks at ``backward()``       traces it; the setting holds while one frame is traced, in the thread that traces it
drops a ``backward()`` that    breaks the graph there, so that PyTorch runs it as it is written: the loss came out of an
finds no leaf                  earlier graph, and its gradients are not this one's to compute
makes parameters that it met   makes them inputs, as those that it meets through the model: ``backward()`` looks for its
through an optimizer           leaves among the inputs
attributes of the graph
forgets hooks on parameters    calls them where autograd would, and compiles again when one comes or goes
gives sizes that differ        keeps sizes of parameters, gradients and states, and integers of optimizers, as
between two calls a symbol     numbers; remembers what has varied for each ``torch.compile`` apart; takes all
                               sizes of tokens for symbols where one has varied (``sizes.py``)
keeps what it compiled by      keeps it by ``torch.compile``: two steps of one factory share neither a recompile limit
code object                    nor a report
lets a backward that is a      donates none: functions outlined in it would write over each other's operands
graph of its own write over
what it is handed
leaves a frame that it cannot  keeps what broke, where and why (``frames.py``); under ``strict`` raises
trace to Python, in silence    an error that says so
=============================  ========================================================================================
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, fx, nn

from qgalore_compile import composites, progress
from qgalore_compile._torch import (
    AttrSource,
    BaseListVariable,
    ConstantVariable,
    DictSubclassGetItemSource,
    GradModeVariable,
    GradSource,
    InstructionTranslator,
    InstructionTranslatorBase,
    OptimizeContext,
    OutputGraph,
    TensorStaticReason,
    TensorVariable,
    VariableTracker,
    builder,
    convert_frame,
    dynamo_config,
    get_eval_frame_isolate_recompiles_id,
    graph_compile,
    is_from_optimizer_source,
    is_from_unspecialized_nn_module_source,
    lookup_backend,
    unimplemented,
)
from qgalore_compile.backend import frames, leavings, sizes, strict
from qgalore_compile.optim.hyper_parameters import Group

MARK = "_traced_as_qgalore"
COMPOSITE = "_knows_composites"


ACCUMULATED_LIMIT = 1 << 16
"""Compilations of one code object in a process, over all ``torch.compile`` calls; Dynamo's 256 end a long sweep.  Each
call has its own ``recompile_limit``, and only its own entries are searched."""

_now = threading.local()

_collecting = threading.Lock()
_rare: list[tuple[int, int, int]] = []
"""For each frame of ours that is being traced, in whatever thread, the thresholds of garbage collection that it found:
the first one's are Python's."""


def step_backend(backend: Callable[..., Any], composite: bool = True) -> Callable[..., Any]:
    """Mark a backend of one's own that hands its graphs to ``qgalore``, so that Dynamo
    traces its steps as those of "qgalore".  Returns it.

    What ``strict`` says of frames that no graph tells of, it says where the backend is asked: of one's own, by an
    attribute ``options`` that holds what it hands over.

    Args:
        composite: whether it knows composite operators (:mod:`qgalore_compile.composites`), as ``qgalore`` does.
    """
    setattr(backend, MARK, True)
    setattr(backend, COMPOSITE, composite)
    return backend


def traced_as_step(backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """Any backend, by name or itself, whose steps are to be traced as ours are; the backend is not changed."""
    return step_backend(partial(lookup_backend(backend)), composite=False)


def is_ours(backend: Any) -> bool:
    """Whether what Dynamo was given as a backend, or what that wraps, is marked by :func:`step_backend`."""
    return any(getattr(each, MARK, False) for each in _layers(backend))


def knows_composites(backend: Any) -> bool:
    """Whether a backend that is ours takes composite operators: the outermost mark says so."""
    return next((getattr(each, COMPOSITE) for each in _layers(backend) if hasattr(each, COMPOSITE)), False)


def differentiates(gm: fx.GraphModule) -> bool:
    """Whether a graph of Dynamo's computes gradients itself.

    Only there a weight may be decoded by one operator: a graph whose backward is one of its own would hand over what
    such an operator returned, a float copy of every weight, rather than decode it again.
    """
    return bool(gm.graph.find_nodes(op="call_function", target=torch.autograd.grad))


def is_strict(backend: Any) -> bool:
    """Whether its options, wherever they are held, ask for ``strict``."""
    for each in _layers(backend):
        given = [getattr(each, name, None) for name in ("kwargs", "keywords")]
        held = [
            getattr(each, "options", None),
            *(found.get("options") for found in given if isinstance(found, Mapping)),
        ]
        if any(isinstance(options, Mapping) and options.get("strict") is True for options in held):
            return True
    return False


def _layers(backend: Any) -> Iterator[Any]:
    """What Dynamo was given as a backend, and what that wraps, outermost first."""
    seen: set[int] = set()
    while backend is not None and id(backend) not in seen:
        seen.add(id(backend))
        yield backend
        owner = getattr(backend, "__self__", None)  # DDPOptimizer.compile_fn, which splits a graph into buckets
        inner = ("_torchdynamo_orig_backend", "compiler_fn", "backend_compile_fn", "func")
        backend = next((found for each in (backend, owner) for name in inner
                        if (found := getattr(each, name, None)) is not None), None)  # fmt: skip


def region_of(compiled: Any) -> int | None:
    """The number of a ``torch.compile`` call, from what it returned; None of anything else."""
    context = getattr(compiled, "dynamo_ctx", compiled)  # of a module, of a function
    number = getattr(context, "_isolate_recompiles_id", None)
    return number if isinstance(number, int) and number >= 0 else None


def current_region() -> int:
    """That number of the step that is running or being traced in this thread; -1 where there is none."""
    return int(get_eval_frame_isolate_recompiles_id())


def _tracing() -> bool:
    return getattr(_now, "tracing", False)


@contextmanager
def _frame(ours: bool) -> Iterator[None]:
    """One frame is traced in this thread: one of our steps', or one of another backend's that was called inside."""
    before, _now.tracing = _tracing(), ours
    if ours and not before:
        _now.others = dynamo_config.trace_autograd_ops
    try:
        if ours:
            settings = dict(trace_autograd_ops=True, accumulated_recompile_limit=ACCUMULATED_LIMIT)
            with dynamo_config.patch(settings):
                yield
        elif before:
            with dynamo_config.patch(trace_autograd_ops=_now.others):
                yield
        else:
            yield
    finally:
        _now.tracing = before


@contextmanager
def _rare_collections(ours: bool) -> Iterator[None]:
    """While one of our steps is traced and compiled Python looks for cycles seldom, and never among what is old.

    Graphs of hundreds of thousands of nodes are built, most of which stay until the end: eight layers of `60m` are
    traced and rewritten in 29.5 s so, and in 37.1 s with Python's own thresholds.
    """
    if not ours or gc.get_threshold()[0] == 0:
        yield
        return
    with _collecting:  # thresholds are the process's: the last thread that leaves puts back what the first one found
        _rare.append(gc.get_threshold())
        first, second, _ = _rare[-1]
        gc.set_threshold(max(first, 100_000), max(second, 20), 1_000_000)
    try:
        yield
    finally:
        with _collecting:
            before = _rare[0]
            _rare.pop()
            if not _rare:
                gc.set_threshold(*before)


# -- the wrappers -----------------------------------------------------------------------------------------------------


def install() -> None:
    """Put the wrappers in place; a second call does nothing."""
    if getattr(convert_frame._compile, MARK, False):
        return
    _wrap(convert_frame, "_compile", _compile)
    _wrap(OptimizeContext, "__init__", _isolated)
    for owner, name, wrapper in (
        (builder, "get_static_address_type", _lifted),
        (builder, "tensor_always_has_static_shape", _static),
        (builder, "is_int_specialization_case", _constant),
        (builder, "process_automatic_dynamic", _apart),
        (builder, "record_automatic_dynamic", sizes.together),
        (TensorVariable, "method_backward", _backward),
        (TensorVariable, "method_attr_grad", _gradient),
        (ConstantVariable, "create", _fresh),
        (OutputGraph, "compile_subgraph", frames.cut),
        (InstructionTranslatorBase, "log_graph_break", frames.noted),
        (graph_compile, "collect_bw_donated_buffer_idxs", _undonated),
    ):
        _wrap(owner, name, wrapper, only_ours=True)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any], *, only_ours: bool = False) -> None:
    """Put ``wrapper`` in the place of a function, which it gets as its first argument; where ``only_ours``, it is
    called while a frame of ours is traced and the function itself at any other time."""
    original = getattr(owner, name)

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if only_ours and not _tracing():
            return original(*args, **kwargs)
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, MARK, True)
    static = isinstance(owner, type) and isinstance(vars(owner)[name], staticmethod)
    setattr(owner, name, staticmethod(wrapped) if static else wrapped)
    table = getattr(owner, "tp_methods", {})  # from torch 2.14 on, what a method is called through
    for key, entry in table.items():
        if entry.handler is original:
            table[key] = replace(entry, handler=wrapped)


def _compile(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around the tracing and compiling of one frame; the sixth argument is its backend."""
    backend = kwargs["compiler_fn"] if "compiler_fn" in kwargs else args[5]
    ours = is_ours(backend)
    with _frame(ours), composites.kept(knows_composites(backend)), _rare_collections(ours):
        if not ours:
            return original(*args, **kwargs)
        code = kwargs["code"] if "code" in kwargs else args[0]
        with progress.compiling(frames.function_of(code)):
            traced = frames.traced(
                original, args, kwargs, current_region(), strict.refusal if is_strict(backend) else None
            )
    leavings.give_back()
    return traced


def _isolated(original: Callable[..., None], self: Any, callback: Any, *args: Any, **kwargs: Any) -> None:
    """Compiled code of a ``torch.compile`` call of ours is kept apart from that of others with the same code."""
    if is_ours(callback):
        kwargs["isolate_recompiles"] = True
    original(self, callback, *args, **kwargs)


def _lifted(original: Callable[[Any], Any], value: Any) -> Any:
    """Parameters that an optimizer's frame has marked are inputs like others, not attributes of the graph."""
    kind = original(value)
    return "unguarded" if kind == "guarded" else kind


def _static(original: Callable[..., Any], tensor: Any, is_tensor: bool, tensor_source: Any) -> Any:
    found, reason = original(tensor, is_tensor, tensor_source)
    if found or not _is_state(tensor, tensor_source):
        return found, reason
    return True, TensorStaticReason.PARAMETER


def _is_state(tensor: Any, source: Any) -> bool:
    """A parameter, a gradient, or a tensor that a module or an optimizer holds: what no batch changes the size of."""
    if isinstance(tensor, nn.Parameter) or (isinstance(tensor, Tensor) and tensor.is_leaf and tensor.requires_grad):
        return True
    return _is_gradient(source) or _is_held(source)


def _is_gradient(source: Any) -> bool:
    return isinstance(source, GradSource) or (
        isinstance(source, AttrSource) and source.member == "grad"
    )  # fmt: skip


def _is_held(source: Any) -> bool:
    if is_from_optimizer_source(source) or is_from_unspecialized_nn_module_source(source):
        return True
    return bool(source.guard_source.is_specialized_nn_module())


def _constant(original: Callable[..., bool], value: Any, source: Any) -> bool:
    """An optimizer's integers (a rank, a shape's side) are constants, as a module's are to Dynamo; a group's also where
    a frame has met the group alone, as a function's argument or a loop's variable behind a graph break."""
    return original(value, source) or is_from_optimizer_source(source) or _is_in_a_group(source)


def _is_in_a_group(source: Any) -> bool:
    return isinstance(source, DictSubclassGetItemSource) and isinstance(
        InstructionTranslator.current_tx().output.resolve_source_value(source.base), Group
    )


def _apart(original: Callable[..., Any], tx: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Dynamo remembers which sizes have varied by file, line and variable, which a factory's steps share."""
    return original(tx, f"{name}#{current_region()}", *args, **kwargs)


def _fresh(original: Callable[..., Any], value: Any, **kwargs: Any) -> Any:
    """A constant of its own for each None, True and False, of which Dynamo has one object each for the process.

    Where a frame reads a gradient that it has set to None, or ``requires_grad``, Dynamo notes on that object where it
    came from; the next constant, in this frame or another, would then be loaded from there.
    """
    return ConstantVariable(value) if not kwargs and (value is None or value is True or value is False) else (
        original(value, **kwargs)
    )  # fmt: skip


def _gradient(original: Callable[..., Any], tensor: Any, tx: Any) -> Any:
    """A gradient that was set to None in this frame is read as a None of its own: Dynamo notes on what is read that it
    is ``tensor.grad``, and what is to be stored there would in the end be loaded from there, and nothing be cleared."""
    found = original(tensor, tx)
    return ConstantVariable(found.value) if isinstance(found, ConstantVariable) else found


def _undonated(original: Callable[..., Any], *args: Any) -> list[int]:
    """No buffer that a backward is handed may be written over.

    Inductor 2.13 takes the places of a backward's donated buffers for places of each function outlined in it, too, and
    one of them wrote over what the next one read: gradients 10 to 40 % off, where the backward is a graph of its own.
    Torch's own setting, ``donated_buffer=False``, then makes an error of every ``retain_graph=True``.
    """
    return []


# -- backward() -------------------------------------------------------------------------------------------------------


def _backward(
    original: Callable[..., Any],
    loss: Any,
    tx: Any,
    gradient: Any = None,
    retain_graph: Any = None,
    create_graph: Any = None,
    inputs: Any = None,
) -> Any:
    """``Tensor.backward()`` as torch traces it, by ``autograd.grad`` and an assignment a leaf, with what a leaf's hooks
    do before and after.  Arguments are Dynamo's variables."""
    arguments = (gradient, retain_graph, create_graph, inputs)
    if not (loss.requires_grad or loss.has_grad_fn):
        return original(loss, tx, *arguments)
    if inputs is None:
        known = [*tx.output.leaf_var_creation_order, *tx.output.input_source_to_var.values()]
    else:
        known = list(inputs.items) if isinstance(inputs, BaseListVariable) else [inputs]
    leaves = loss._collect_backward_inputs(known)
    if not leaves:
        _break_before(loss)
    hooks = [_hooks_of(leaf, tx) for leaf in leaves]
    if inputs is None and not any(before or after for before, after in hooks):
        return original(loss, tx, *arguments)
    _differentiate(loss, tx, arguments, leaves, hooks)
    return ConstantVariable.create(None)


def _break_before(loss: Any) -> None:
    """Leave a ``backward()`` to PyTorch whose leaves are in no graph that is being traced."""
    unimplemented(
        gb_type="qgalore: backward() of a loss that was computed before this graph",
        context=f"call_method {loss} backward",
        explanation="The loss was computed before this graph begins: ahead of a graph break in the step, or outside of "
        "the compiled function. Its parameters are not in the graph, so no gradient can be computed in it.",
        hints=[
            "Move what breaks the graph (print, .item(), a branch on a tensor's value, a hook) behind opt.step(), or "
            "out of the compiled function.",
            "Compile a function that computes the loss, calls backward() and steps.",
            "Without fullgraph=True the step is run in pieces: PyTorch computes the gradients, full-rank ones, and the "
            "update is compiled.",
        ],
    )


def _hooks_of(leaf: Any, tx: Any) -> tuple[list[Any], list[Any]]:
    """Hooks of a leaf before and after its gradient is accumulated; with guards on which there are."""
    before: list[Any] = []
    after: list[Any] = []
    if leaf.source is not None:
        tensor = tx.output.resolve_source_value(leaf.source)
        for name, found in (("_backward_hooks", before), ("_post_accumulate_grad_hooks", after)):
            source = AttrSource(leaf.source, name)
            hooks = VariableTracker.build(tx, getattr(tensor, name), source).realize()
            if getattr(tensor, name) is not None:
                found += hooks.call_method(tx, "values", [], {}).unpack_var_sequence(tx)
    for tensor, hook, _, name in tx.output.side_effects.tensor_hooks.values():  # registered while tracing
        if tensor.proxy.node is leaf.proxy.node:
            (before if name == "register_hook" else after).append(hook)
    return before, after


def _differentiate(loss: Any, tx: Any, arguments: Any, leaves: list[Any], hooks: list[Any]) -> None:
    gradient, retain_graph, create_graph, _ = arguments
    build = partial(VariableTracker.build, tx)
    # True also where inputs are named: backward(), unlike autograd.grad, passes over those that the loss does not reach
    given = dict(allow_unused=build(True), retain_graph=retain_graph, create_graph=create_graph)
    outputs = [loss, build(leaves), *([] if gradient is None else [gradient])]
    gradients = build(torch.autograd.grad).call_function(
        tx, outputs, {name: value for name, value in given.items() if value is not None}
    )
    without_grad = GradModeVariable.create(tx, False, initialized=True)
    without_grad.enter(tx)
    for index, (leaf, (before, after)) in enumerate(zip(leaves, hooks, strict=True)):
        found = gradients.call_method(tx, "__getitem__", [build(index)], {})
        if found.is_python_constant() and found.as_python_constant() is None:
            continue  # the loss does not depend on it: neither a gradient nor a call of its hooks
        for hook in before:
            changed = hook.call_function(tx, [found], {})
            found = found if changed.is_python_constant() and changed.as_python_constant() is None else changed
        build(torch.ops.inductor.accumulate_grad_.default).call_function(tx, [leaf, found], {})
        for hook in after:
            hook.call_function(tx, [leaf], {})
    without_grad.exit(tx)
