"""``torch.compile(step, backend="qgalore")``: options, the passes, and the hand-over to Inductor.

Loading this module, which ``torch.compile`` does when it looks the backend's name up, teaches Dynamo how to trace our
steps (``tracing.py``); those of other backends are traced as before.  No configuration of the process
changes: Dynamo's is patched while one frame is traced, Inductor's for one compilation, and a pass of the user's own
stays in place.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qgalore_compile import composites, progress
from qgalore_compile._torch import (
    ShortenTraceback,
    get_custom_graph_passes,
    inductor_config,
    list_mode_options,
)
from qgalore_compile.backend import (
    compilation,
    dependencies,
    direct,
    host_reads,
    leavings,
    recompute,
    reroll,
    spent,
    strict,
    tracing,
    unseen,
)
from qgalore_compile.backend.capturing import capturer_of
from qgalore_compile.backend.cuda_graphs import CudaGraphs
from qgalore_compile.backend.records import GraphsRecord
from qgalore_compile.backend.strict import UnfusedError as UnfusedError
from qgalore_compile.kernels.cpp import launch as cpu
from qgalore_compile.kernels.cpp import units
from qgalore_compile.passes import PASSES, PassManager

tracing.install()


FUSION_SEARCH: dict[str, Any] = {"cpp.max_horizontal_fusion_size": 1, "max_fusion_buffer_group_pairwise_attempts": 8}
"""Inductor's settings for one compilation.  A step has thousands of small nodes with equal neighbours, and the search
for fusions grows faster than linearly.  `tiny` with two layers compiles in 75.5 s with these and in 78.5 s without, at
the same speed of the step; with four layers the search alone took 10 s, and 38 s without, though on a busier machine.
Horizontal fusion would also make updated weights of several layers live together."""


KEEP_ORDER: dict[str, Any] = {"reorder_for_peak_memory": False}
"""Inductor would reorder what :mod:`qgalore_compile.passes.order` has ordered, by an estimate that knows nothing of
what is inside an outlined function: it hoists X Pᵀ of every layer in front of the forward."""


STATIC_LAUNCH = "static_launch_user_defined_triton_kernels"
"""Inductor launches its own Triton kernels through C, but those of others, which all of ours count as, through Triton's
launcher in Python, unless this is set.  It is asked where a kernel is compiled: worker processes of Inductor's are not
told of a patch (2.13), so there the environment variable TORCHINDUCTOR_STATIC_LAUNCH_USER_DEFINED_TRITON_KERNELS=1 has
to say it, before they start."""


class OptionError(ShortenTraceback, ValueError):
    """An option of ``torch.compile(…, backend="qgalore", options=…)`` that does not exist or has no such value.

    A ``ValueError``; also a ``ShortenTraceback``, which Dynamo hands through as it is instead of wrapping it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class ContradictionError(OptionError, UnfusedError):
    """Options that forbid what ``strict`` asks for: known before anything is compiled."""

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)


REASSOCIATE = ("memory", "cost", "never")
GEMM = ("same", "bf16")
UNASKED = ("outline", "cudagraphs", "reroll")
"""Options of which None leaves the choice to the backend."""


def _check_strict(disable: tuple[str, ...], *, exact: bool) -> None:
    """Raise :class:`ContradictionError` where ``strict`` asks for what other options forbid."""
    missing = [name for name in strict.NEEDED if name in disable]
    if missing:
        raise ContradictionError(
            f"backend 'qgalore': option 'strict' refuses what ends unfused, and 'disable' takes out the pass "
            f"{' and '.join(map(repr, missing))}, without which nothing is fused; choose one"
        )
    if exact:
        raise ContradictionError(
            "backend 'qgalore': option 'strict' refuses what ends unfused, and 'exact' takes out the passes that fuse, "
            "since generated kernels round in another order; choose one"
        )


@dataclass(frozen=True)
class Options:
    """What ``options=`` may hold.

    Attributes:
        strict: everything that is not as asked is an error: a projected layer whose update is not matched, has no
            generated kernel, or whose gradient is formed though ``reassociate`` asks for it to go; a large update at
            full rank or a product with a quantised weight without a generated kernel; a graph break; compiled code of
            which nothing is known.
        disable: names of passes to leave out.
        exact: run only the passes that keep every result bit for bit.
        reassociate: "memory" contracts a gradient's factors with the projector wherever that is possible, "cost" where
            it takes fewer operations and bytes, "never" nowhere.
        gemm: "bf16" takes the projections and the products with INT8 weights of a float32 model in bfloat16; "same"
            leaves every product the type that it has.
        outline: equal layers become calls of one function, so that Inductor compiles a layer once; None, the default,
            on a CPU, where that saves much and ``exact`` is not asked for.
        cudagraphs: True replays steps in which no subspace is due as a CUDA graph (``cuda_graphs.py``); an error for a
            step on the CPU, and for one that decides something else on the host.  None, the default, and False do not:
            it has not run on a GPU yet.
        reroll: True has AOTAutograd and most passes see seven of nine equal layers or more (``reroll.py``); None, the
            default, where there are twenty and ``exact`` is not asked for.
    """

    strict: bool = False
    disable: tuple[str, ...] = ()
    exact: bool = False
    reassociate: str = "memory"
    gemm: str = "same"
    outline: bool | None = None
    cudagraphs: bool | None = None
    reroll: bool | None = None

    @classmethod
    def parse(cls, options: dict[str, Any] | None) -> Options:
        """Checked options; raises :class:`OptionError` with what is known."""
        options = dict(options or {})
        known = cls.__dataclass_fields__
        for name in options:
            if name not in known:
                raise OptionError(f"backend 'qgalore': unknown option {name!r}; known options: {', '.join(known)}")
        for name in ("strict", "exact", *UNASKED):
            if not (isinstance(options.get(name, False), bool) or (name in UNASKED and options[name] is None)):
                values = "True, False or None" if name in UNASKED else "True or False"
                raise OptionError(f"backend 'qgalore': option {name!r} must be {values}, got {options[name]!r}")
        for name, allowed in (("reassociate", REASSOCIATE), ("gemm", GEMM)):
            if options.get(name, allowed[0]) not in allowed:
                raise OptionError(
                    f"backend 'qgalore': option {name!r} must be one of {', '.join(map(repr, allowed))}, "
                    f"got {options[name]!r}"
                )
        if options.get("exact") and options.get("gemm") == "bf16":
            raise OptionError(
                "backend 'qgalore': option 'exact' keeps every result bit for bit, which 'gemm': 'bf16' does not; "
                "choose one"
            )
        disable = options.get("disable", ())
        disable = (disable,) if isinstance(disable, str) else tuple(disable)
        names = [each.name for each in PASSES]
        for name in disable:
            if name not in names:
                raise OptionError(f"backend 'qgalore': no pass is called {name!r}; passes: {', '.join(names)}")
        if options.get("strict"):
            _check_strict(disable, exact=options.get("exact", False))
        return cls(**{**options, "disable": disable})

    def passes(
        self,
        input_names: Mapping[int | str, str] | None = None,
        parameters: Collection[int | str] | None = None,
        *,
        compiles: bool = False,
    ) -> PassManager:
        """The manager of the passes that these options leave; arguments as for :class:`PassManager`."""
        chosen = [each for each in PASSES if each.name not in self.disable and (each.tier == "exact" or not self.exact)]
        # where no pass contracts the factors, the gradient exists, and the refresh op may as well take it
        contracts = any(each.name == "reassociate" for each in chosen)
        mode = self.reassociate if contracts else "never"
        return PassManager(
            chosen,
            reassociate=mode,
            gemm=self.gemm,
            outline=False if self.exact and self.outline is None else self.outline,
            rerolls=self._rerolls(),
            input_names=input_names,
            parameters=parameters,
            compiles=compiles,
        )

    def _rerolls(self) -> int:
        """Equal layers from which on fewer are traced; 0 for never."""
        if self.reroll is None:
            return 0 if self.exact else reroll.WORTH
        return reroll.LEAST if self.reroll else 0


@tracing.step_backend
def qgalore(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
    into: list[compilation.Compilation] | None = None,
    **compile_fx_arguments: Any,
) -> Callable[..., Any]:
    """The backend.  ``torch.compile`` finds it by name, through the entry point group ``torch_dynamo_backends``.

    Args:
        gm, example_inputs: from Dynamo.
        options: see :class:`Options`.
        mode: Inductor's modes ("reduce-overhead", "max-autotune", …), handed on to it.
        into: takes the record of this compilation, in place of the register that ``report`` asks.
        **compile_fx_arguments: for tests: ``inner_compile`` in place of Inductor's code generation.

    Raises:
        OptionError: an unknown option or value.
        NoCompilerError: a step on the CPU, and no C++ compiler; before anything of it is compiled, or runs.
        UnfusedError: ``strict``, and something is not as asked.
    """
    progress.tell("autograd")
    patches = {**FUSION_SEARCH, **KEEP_ORDER, **(list_mode_options(mode) if mode else {})}
    patches |= launches_of(example_inputs)
    chosen = Options.parse(options)
    compiles = not compile_fx_arguments
    if compiles and _on_cpu(example_inputs):
        cpu.check_compiler()
        cpu.prepare()
    parameters = compilation.parameters(gm, example_inputs)
    manager = chosen.passes(compilation.input_names(gm), parameters, compiles=compiles)
    patches["post_grad_custom_post_pass"] = [*_post_passes(), manager]
    record = compilation.begin(gm, into)
    spent.detach(gm)
    graphs = _cuda_graphs(gm, example_inputs, manager.input_names, record, mode) if chosen.cudagraphs else None
    if graphs is not None:
        example_inputs = graphs.examples(example_inputs)
        patches["cudagraph_policy"] = graphs.policy
    kept = composites.stay() and "decompose" not in chosen.disable
    unseen_writes = unseen.hide(gm, keep=kept)
    name = compilation.key(gm, example_inputs, manager)  # before compile_fx, which may change the graph
    # Two graphs of Dynamo's can be one of Inductor's (detach() elsewhere), whose code has one record: not shared. Where
    # the record is damaged, code from a cache would be refused for want of it: the passes run, and write it anew.
    damaged = chosen.strict and compilation.is_damaged(name)
    manager.salt = f"/{secrets.token_hex() if damaged else name}"
    with composites.kept(kept and tracing.differentiates(gm)), _inductor():
        settings = {"config_patches": patches, **compile_fx_arguments}
        before = compilation.rerolled(name)
        compiled = reroll.compiled(gm, example_inputs, manager, unseen_writes, known=before, **settings)
    _wait_for(manager)
    compilation.finish(record, manager, name)
    if compiles:
        progress.tell_skipped()
    if chosen.strict:
        _refuse_unfused(record)
    progress.tell("guards")
    return unseen.bumping(_replayed(leavings.without_graph(compiled), graphs), unseen_writes)


def _wait_for(manager: PassManager) -> None:
    """What cannot be compiled is an error here, not in the middle of a step."""
    progress.wait_for_kernels()
    for kernel in manager.kernels:
        kernel.wait()


def _post_passes() -> Sequence[Any]:
    """Passes of the user's own, in the place where ours will run."""
    return get_custom_graph_passes(inductor_config.post_grad_custom_post_pass)


@contextmanager
def _inductor() -> Iterator[None]:
    """Inductor, with what it does otherwise for these graphs."""
    with units.together(), dependencies.in_place(), direct.called(), recompute.everywhere():
        yield


def _cuda_graphs(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    names: Mapping[int | str, str],
    record: compilation.Compilation,
    mode: str | None,
) -> CudaGraphs:
    """Of the option ``cudagraphs``; raises OptionError where the step cannot be captured."""
    if (list_mode_options(mode) if mode else {}).get("triton.cudagraphs", inductor_config.triton.cudagraphs):
        asked = f"mode={mode!r}" if mode else "the setting triton.cudagraphs of Inductor"
        raise OptionError(
            f"backend 'qgalore': option 'cudagraphs' replays the whole step, and {asked} asks for Inductor's own CUDA "
            "graphs, which would cut it at every refresh op; choose one (mode='max-autotune-no-cudagraphs' tunes "
            "kernels alone)"
        )
    if inductor_config.cpp_wrapper:
        raise OptionError(
            "backend 'qgalore': option 'cudagraphs' looks for what the emitted program does on the host, which it "
            "cannot in one in C++; leave the setting cpp_wrapper of Inductor out, or the option"
        )
    devices = [given.device for given in example_inputs if isinstance(given, Tensor) and given.device.type != "cpu"]
    device = devices[0] if devices else torch.device("cpu")
    capturer = capturer_of(device)
    if capturer is None:
        raise OptionError(
            f"backend 'qgalore': option 'cudagraphs' is for steps on an NVIDIA GPU, and this one is on {device.type}; "
            "leave it out"
        )
    with _refusing():
        plan = host_reads.planned(gm, example_inputs, names, capturer.on_host)
    record.cuda_graphs = GraphsRecord(numbers=len(plan.numbers), schedules=len(plan.schedules))
    return CudaGraphs(plan, capturer, record.cuda_graphs)


def _replayed(compiled: Callable[..., Any], graphs: CudaGraphs | None) -> Callable[..., Any]:
    """With the option, what replays; raises OptionError where Inductor's program cannot be captured."""
    if graphs is None:
        return compiled
    with _refusing():
        graphs.check()
    return graphs.around(compiled)


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except host_reads.HostReadError as error:
        raise OptionError(
            f"backend 'qgalore': option 'cudagraphs' cannot replay this step: {error}; or leave the option out"
        ) from None


def launches_of(example_inputs: Sequence[Any]) -> dict[str, Any]:
    """Inductor's settings for how kernels are launched: of a graph on an NVIDIA or AMD GPU, where this torch has it."""
    on_gpu = any(given.device.type == "cuda" for given in example_inputs if isinstance(given, Tensor))
    return {STATIC_LAUNCH: True} if on_gpu and hasattr(inductor_config, STATIC_LAUNCH) else {}


def _on_cpu(example_inputs: Sequence[Any]) -> bool:
    """Whether all tensors are on the CPU, so that Inductor's code will be C++."""
    return {given.device.type for given in example_inputs if isinstance(given, Tensor)} == {"cpu"}


def _refuse_unfused(record: compilation.Compilation) -> None:
    if found := strict.problems(record):
        raise strict.error(found)
