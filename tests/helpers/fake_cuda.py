"""A GPU that is not there: Inductor's whole CUDA program of a step, as text, from a machine that has CPUs only.

    with fake_cuda():
        step, inputs = build()                         # on fake tensors of device "cuda"
        program = emitted(step, *inputs, backend="qgalore")
    assert "fp64" not in program.signatures()

The step is traced, differentiated, rewritten, scheduled and printed as for a GPU; nothing is compiled by Triton, loaded
or run.  Three things differ from a real one: attention is spelled out in products and a softmax, because a CPU build
of torch has no fused attention for CUDA tensors; products are padded never or, on request, always, which Inductor
decides by timing them; and patterns of the joint graph are those that were traced on a CPU.
"""

from __future__ import annotations

import ast
import ctypes
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, fx
from torch._dynamo import device_interface
from torch._functorch import config as functorch_config
from torch._inductor import codecache, compile_fx, utils
from torch._inductor import config as inductor_config
from torch._inductor.codegen.cuda import cuda_env
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import hints
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.utils import _triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.cpp_extension import include_paths
from triton.backends.compiler import GPUTarget

import qgalore_compile as qg
from qgalore_compile.kernels.triton import kernels as triton_kernels
from qgalore_compile.training.llama import Llama, LlamaConfig, move_

_RUNTIME = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <utility>
using c10::Device, c10::DeviceType, c10::Stream;

// One device with one stream, whose events are over as soon as they are recorded.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream getDefaultStream(Device) const override { return getStream(getDevice()); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

struct Hooks final : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};

static Guard guard;
static Hooks hooks;
static const c10::impl::DeviceGuardImplInterface* other_guard = &guard;
static void* other_table = *reinterpret_cast<void**>(&hooks);

// The hooks are an object that torch made once and keeps: it gets the methods of the ones above, not their place.
extern "C" void exchange() {
  auto& place = c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)];
  other_guard = place.exchange(other_guard);
  auto& built = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  std::swap(*reinterpret_cast<void**>(&built), other_table);
}
"""
"""What autograd asks of an accelerator before it differentiates a tensor that says it is on one.  A build without CUDA
has no device guard for it and aborts the process."""


@contextmanager
def fake_cuda(capability: tuple[int, int] = (9, 0), *, padding: bool = False) -> Iterator[None]:
    """Let torch, Triton and Inductor find one GPU of this compute capability, for compiling only.

    ``padding``: whether Inductor pads every product with a side that does not align.

    Raises:
        RuntimeError: torch is built with CUDA, whose device guard and hooks are real; or one is there already.
    """
    if torch.backends.cuda.is_built():
        raise RuntimeError("fake_cuda is for builds of torch without CUDA")
    if torch.cuda.is_available():
        raise RuntimeError("a fake GPU is there already, and a second one would take its runtime away")
    with ExitStack() as stack:
        stack.callback(_forget)  # the last of all: after the stand-ins are gone
        runtime = _runtime()
        runtime.exchange()
        stack.callback(runtime.exchange)
        for owner, name, replacement in _stand_ins(capability):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        for table in ("caching_worker_device_properties", "caching_worker_current_devices"):
            stack.enter_context(mock.patch.dict(getattr(device_interface, table), clear=True))
        # No threads of autograd's own for the device: it has as many as there were devices when it first ran.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
        stack.enter_context(
            inductor_config.patch(
                {
                    "fx_graph_cache": False,
                    "fx_graph_remote_cache": False,
                    "compile_threads": 1,
                    "shape_padding": padding,  # asks by timing products, unless it is forced
                    "force_shape_pad": padding,
                    "triton.autotune_at_compile_time": False,  # runs kernels
                }
            )
        )
        _forget()
        yield


@cache
def _runtime() -> Any:
    """`_RUNTIME`, compiled: in 3 s, of which Inductor's way to compile C++, with its probing and headers, makes 22."""
    libraries = Path(torch.__file__).parent / "lib"
    with TemporaryDirectory() as folder:
        source, library = Path(folder, "runtime.cpp"), Path(folder, "runtime.so")
        source.write_text(_RUNTIME)
        command = [get_cpp_compiler(), "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(library)]
        command += [f"-I{path}" for path in include_paths()] + [f"-L{libraries}", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))


def _stand_ins(capability: tuple[int, int]) -> Iterator[tuple[Any, str, Any]]:
    """What replaces what: an owner, the name of its attribute, and the stand-in."""
    properties = _properties(capability)
    yield triton_kernels, "LOOK", False  # nothing is compiled
    functions: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "synchronize": lambda device=None: None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        # Dynamo puts the generator back as it was before tracing.
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }
    for name, function in functions.items():
        yield torch.cuda, name, function
    for name in ("device_count", "current_device", "get_device_properties", "synchronize"):
        yield device_interface.CudaInterface, name, staticmethod(functions[name])  # it has them by value
    yield triton.runtime.driver, "_active", _Driver(GPUTarget("cuda", 10 * capability[0] + capability[1], 32))
    # Both make a real tensor on the device, to have it initialised.
    yield fake_tensor, "init_gpu_context", lambda device: None
    yield FakeTensorMode, "avoid_device_init", True
    # Advice for the user's float32 products, given once a process.
    yield compile_fx, "_warn_tf32_disabled", lambda: None
    # Registers its patterns once for each device, beside those of other devices, and traces them with tensors there.
    register = joint_graph.lazy_init
    yield joint_graph, "lazy_init", lambda device=None: register(torch.device("cpu"))
    folder = joint_graph.UniformValueConstantFolder
    deduce = folder._deduce_value

    def deduce_on_cpu(self: Any, node: fx.Node) -> Any:
        with _OnCpu():
            return deduce(self, node)

    yield folder, "_deduce_value", deduce_on_cpu


class _OnCpu(TorchDispatchMode):
    """What would be made on the GPU is made on the CPU: Inductor folds constants in real tensors of one element."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


@dataclass
class _Driver:
    """Triton's driver, as far as code generation asks it: which backend and architecture to print for."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0


def _properties(capability: tuple[int, int]) -> SimpleNamespace:
    """Of an H100, but for the capability."""
    return SimpleNamespace(
        name="a GPU that is not there",
        gcnArchName="",  # a build without CUDA counts as one for AMD where caches are named
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2_048,
        max_threads_per_block=1_024,
        warp_size=32,
        total_memory=80 * 2**30,
        L2_cache_size=50 * 2**20,
        shared_memory_per_block=48 * 2**10,
        shared_memory_per_block_optin=227 * 2**10,
        shared_memory_per_multiprocessor=228 * 2**10,
    )


def _forget() -> None:
    """Clear what torch remembers about devices."""
    for module in (_triton, utils, cuda_env):
        for value in vars(module).values():
            if hasattr(value, "cache_clear") and value.__module__ == module.__name__:
                value.cache_clear()
    hints.DeviceProperties.create.cache_clear()
    codecache.CacheBase.get_system.cache_clear()
    codecache.CacheBase.get_local_cache_path.cache_clear()
    TritonKernel.gen_common_triton_imports.cache_clear()


class _Generated(BaseException):
    """Ends a compilation once the program is known.  No Exception: Dynamo would wrap it."""


def _arguments(text: str) -> list[ast.expr]:
    call = ast.parse(f"f({text})", mode="eval").body
    assert isinstance(call, ast.Call)
    return call.args


@dataclass
class Program:
    """What Inductor emitted for one graph.

    Attributes:
        text: the Python module, with the sources of its Triton kernels in it.
        graph: what it was made from, after all passes.
    """

    text: str
    graph: fx.GraphModule

    def kernels(self) -> dict[str, str]:
        """The sources of the Triton kernels, by the names that the module gives them."""
        found = {}
        for node in ast.parse(self.text).body:
            match node:
                case ast.Assign([ast.Name(name)], ast.Call(ast.Attribute(attr="triton"), [_, ast.Constant(source)])):
                    found[name] = source
        return found

    def signatures(self) -> str:
        """The types of all kernels' arguments."""
        return "\n".join(re.findall(r"'signature': ({.*?})", self.text))

    def calls(self, kernel: str) -> list[list[str]]:
        """The arguments of each launch of a kernel, in order, without the stream."""
        launches = re.findall(rf"^\s*{re.escape(kernel)}\.run\((.*), stream=\w+\)$", self.text, re.MULTILINE)
        return [[ast.unparse(each) for each in _arguments(launch)] for launch in launches]

    def launches(self) -> Counter[str]:
        """How often the program launches each kind of generated kernel."""
        found: Counter[str] = Counter()
        for name, source in self.kernels().items():
            (arguments,) = re.findall(r"^def (?:gemm|region)\((.*)\):", source, re.MULTILINE) or [""]
            if arguments:
                kind = "region" if name.startswith("region") else "write-back" if "e_" in arguments else "product"
                found[kind] += len(self.calls(name))
        return found

    def allocations(self) -> list[str]:
        """The names of the buffers that the module makes."""
        return re.findall(r"^\s*(\w+) = empty_strided_cuda\(", self.text, re.MULTILINE)


def emitted(step: Callable[..., Any], *inputs: Tensor, backend: str = "inductor", **options: Any) -> Program:
    """Compile `step` for fake inputs, within :func:`fake_cuda`, up to the point where Inductor would load its program.

    Raises:
        ValueError: the step gave another number of graphs than one.
    """
    programs: list[Program] = []

    def keep(graph: GraphLowering, code: Any) -> Any:
        programs.append(Program(code.value, graph.module))
        raise _Generated

    compiled = torch.compile(step, backend=backend, fullgraph=True, options=options or None)
    with (
        mock.patch.object(GraphLowering, "_compile_to_module_lines", keep),
        # Inductor does not bring it along, and Dynamo would break the graph at backward().
        torch._dynamo.config.patch(trace_autograd_ops=True),
        suppress(_Generated),
    ):
        compiled(*inputs)
    if len(programs) != 1:
        raise ValueError(f"{len(programs)} programs")
    return programs[0]


def llama_step(
    *,
    layers: int = 1,
    width: int = 64,
    rank: int = 16,
    targets: list[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **settings: Any,
) -> tuple[Callable[..., Tensor], tuple[Tensor, Tensor]]:
    """The whole training step of a small Llama with INT8 weights, and its inputs, on fake tensors of device "cuda".

    Args:
        layers, width, rank, dtype: of the model; the MLP is twice as wide.
        targets: parts of names of the weights that are quantised and projected; all of the blocks by default.
        settings: of the groups.
    """
    chosen = {} if targets is None else {"targets": targets}
    with FakeTensorMode():
        model = move_(Llama(LlamaConfig(width, 2 * width, 4, layers, max_seq_len=64)), dtype, "cuda")
        qg.quantize_(model, group_size=64, **chosen)
        opt = qg.QGaLoreAdamW(qg.param_groups(model, rank=rank, **chosen, **settings), lr=1e-2)
        tokens = torch.zeros(2, 32, dtype=torch.long, device="cuda")
        inputs = tokens, tokens.clone()

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = model(tokens, targets)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    return step, inputs
