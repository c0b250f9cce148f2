"""Every private name of PyTorch that this package uses, each in one place: what to look at for a new release of torch.

The first block is loaded by ``import torch`` anyway.  The second is loaded with Dynamo and Inductor, a second and more
that ``import qgalore_compile`` need not take: each of its names is looked up when it is first imported from here.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from torch._C import _after_ADInplaceOrView_keyset as after_inplace_or_view
from torch._C import _disabled_torch_function_impl as disabled_torch_function
from torch._C import _has_storage as has_storage
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._functorch._aot_autograd.descriptors import (
    BufferAOTInput,
    ParamAOTInput,
    PlainAOTInput,
    SubclassGetAttrAOTInput,
)
from torch._guards import CompileContext, detect_fake_mode
from torch._logging._internal import trace_structured
from torch._ops import OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import is_fake
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import _profiler_enabled as profiler_enabled  # type: ignore[attr-defined]
from torch.fx._utils import lazy_format_graph_code
from torch.optim.optimizer import _global_optimizer_post_hooks as global_step_post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as global_step_pre_hooks
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

if TYPE_CHECKING:
    import torch._dynamo.config as dynamo_config
    import torch._dynamo.convert_frame as convert_frame
    import torch._dynamo.variables.builder as builder
    import torch._functorch._activation_checkpointing.remat_using_tags_for_fwd_loss_bwd_graph_pass as rematerialization
    import torch._functorch._aot_autograd.graph_compile as graph_compile
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config
    import torch._inductor.fx_passes.post_grad as inductor_post_grad
    import torch._inductor.ir as inductor_ir
    import torch._inductor.lowering as inductor_lowering
    from torch._C._dynamo.eval_frame import get_eval_frame_isolate_recompiles_id
    from torch._C._dynamo.guards import _torchinductor_pyobject_tensor_data_ptr as tensor_data_pointer  # type: ignore[attr-defined]
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.decorators import mark_dynamic
    from torch._dynamo.eval_frame import OptimizeContext
    from torch._dynamo.exc import ShortenTraceback, Unsupported, UserError, unimplemented
    from torch._dynamo.output_graph import OutputGraph
    from torch._dynamo.pgo import FrameStateSizeEntry, auto_dynamic
    from torch._dynamo.source import (
        AttrSource,
        DictSubclassGetItemSource,
        GradSource,
        is_from_optimizer_source,
        is_from_unspecialized_nn_module_source,
    )
    from torch._dynamo.symbolic_convert import InstructionTranslator, InstructionTranslatorBase
    from torch._dynamo.utils import TensorStaticReason, counters
    from torch._dynamo.variables.base import VariableTracker
    from torch._dynamo.variables.constant import ConstantVariable
    from torch._dynamo.variables.ctx_manager import GradModeVariable
    from torch._dynamo.variables.lists import BaseListVariable
    from torch._dynamo.variables.optimizer import OptimizerVariable
    from torch._dynamo.variables.tensor import TensorVariable
    from torch._functorch._activation_checkpointing.remat_using_tags_for_fwd_loss_bwd_graph_pass import (
        is_impure_node_for_dce,
    )
    from torch._functorch.compile_utils import raise_getitems
    from torch._functorch.partitioners import cleanup_recompute_tags, force_save_bw_mutation_src, must_recompute
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional
    from torch._inductor import list_mode_options
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import CppCodeCache, CppPythonBindingsCodeCache, LambdaFuture, PyCodeCache
    from torch._inductor.compile_fx import _recursive_post_grad_passes as recursive_post_grad_passes
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.cudagraph_trees import StorageWeakRefWrapper, check_memory_pool, clear_cublas_manager
    from torch._inductor.cudagraph_utils import CUDAGraphPolicy
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_custom_graph_passes, get_hash_for_files
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
    from torch._inductor.fx_passes.joint_graph import constant_fold_uniform_value
    from torch._inductor.fx_passes.post_grad import remove_noop_ops, view_to_reshape
    from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
    from torch._inductor.fx_utils import FakeTensorUpdater
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch._inductor.scheduler import BaseSchedulerNode
    from torch._inductor.utils import clear_on_fresh_cache
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

_REMATERIALIZATION = "torch._functorch._activation_checkpointing.remat_using_tags_for_fwd_loss_bwd_graph_pass"

LATE = {
    "OptimizerVariable": "torch._dynamo.variables.optimizer:OptimizerVariable",
    "lookup_backend": "torch._dynamo.backends.registry:lookup_backend",
    "convert_frame": "torch._dynamo.convert_frame",
    "builder": "torch._dynamo.variables.builder",
    "mark_dynamic": "torch._dynamo.decorators:mark_dynamic",
    "FrameStateSizeEntry": "torch._dynamo.pgo:FrameStateSizeEntry",
    "auto_dynamic": "torch._dynamo.pgo:auto_dynamic",
    "OptimizeContext": "torch._dynamo.eval_frame:OptimizeContext",
    "get_eval_frame_isolate_recompiles_id": "torch._C._dynamo.eval_frame:get_eval_frame_isolate_recompiles_id",
    "unimplemented": "torch._dynamo.exc:unimplemented",
    "AttrSource": "torch._dynamo.source:AttrSource",
    "DictSubclassGetItemSource": "torch._dynamo.source:DictSubclassGetItemSource",
    "GradSource": "torch._dynamo.source:GradSource",
    "is_from_optimizer_source": "torch._dynamo.source:is_from_optimizer_source",
    "is_from_unspecialized_nn_module_source": "torch._dynamo.source:is_from_unspecialized_nn_module_source",
    "TensorStaticReason": "torch._dynamo.utils:TensorStaticReason",
    "VariableTracker": "torch._dynamo.variables.base:VariableTracker",
    "ConstantVariable": "torch._dynamo.variables.constant:ConstantVariable",
    "GradModeVariable": "torch._dynamo.variables.ctx_manager:GradModeVariable",
    "BaseListVariable": "torch._dynamo.variables.lists:BaseListVariable",
    "TensorVariable": "torch._dynamo.variables.tensor:TensorVariable",
    "dynamo_config": "torch._dynamo.config",
    "functorch_config": "torch._functorch.config",
    "rematerialization": _REMATERIALIZATION,
    "is_impure_node_for_dce": f"{_REMATERIALIZATION}:is_impure_node_for_dce",
    "raise_getitems": "torch._functorch.compile_utils:raise_getitems",
    "cleanup_recompute_tags": "torch._functorch.partitioners:cleanup_recompute_tags",
    "force_save_bw_mutation_src": "torch._functorch.partitioners:force_save_bw_mutation_src",
    "must_recompute": "torch._functorch.partitioners:must_recompute",
    "graph_compile": "torch._functorch._aot_autograd.graph_compile",
    "inductor_config": "torch._inductor.config",
    "inductor_ir": "torch._inductor.ir",
    "inductor_lowering": "torch._inductor.lowering",
    "inductor_post_grad": "torch._inductor.fx_passes.post_grad",
    "ShortenTraceback": "torch._dynamo.exc:ShortenTraceback",
    "Unsupported": "torch._dynamo.exc:Unsupported",
    "UserError": "torch._dynamo.exc:UserError",
    "OutputGraph": "torch._dynamo.output_graph:OutputGraph",
    "InstructionTranslator": "torch._dynamo.symbolic_convert:InstructionTranslator",
    "InstructionTranslatorBase": "torch._dynamo.symbolic_convert:InstructionTranslatorBase",
    "counters": "torch._dynamo.utils:counters",
    "kernel_side_table": "torch._higher_order_ops.triton_kernel_wrap:kernel_side_table",
    "triton_kernel_wrapper_functional": "torch._higher_order_ops.triton_kernel_wrap:triton_kernel_wrapper_functional",
    "list_mode_options": "torch._inductor:list_mode_options",
    "AsyncCompile": "torch._inductor.async_compile:AsyncCompile",
    "clear_on_fresh_cache": "torch._inductor.utils:clear_on_fresh_cache",
    "tensor_data_pointer": "torch._C._dynamo.guards:_torchinductor_pyobject_tensor_data_ptr",
    "LambdaFuture": "torch._inductor.codecache:LambdaFuture",
    "CppCompileError": "torch._inductor.exc:CppCompileError",
    "CppCodeCache": "torch._inductor.codecache:CppCodeCache",
    "CppPythonBindingsCodeCache": "torch._inductor.codecache:CppPythonBindingsCodeCache",
    "PyCodeCache": "torch._inductor.codecache:PyCodeCache",
    "recursive_post_grad_passes": "torch._inductor.compile_fx:_recursive_post_grad_passes",
    "compile_fx": "torch._inductor.compile_fx:compile_fx",
    "get_cpp_compiler": "torch._inductor.cpp_builder:get_cpp_compiler",
    "StorageWeakRefWrapper": "torch._inductor.cudagraph_trees:StorageWeakRefWrapper",
    "check_memory_pool": "torch._inductor.cudagraph_trees:check_memory_pool",
    "clear_cublas_manager": "torch._inductor.cudagraph_trees:clear_cublas_manager",
    "CUDAGraphPolicy": "torch._inductor.cudagraph_utils:CUDAGraphPolicy",
    "CustomGraphPass": "torch._inductor.custom_graph_pass:CustomGraphPass",
    "get_custom_graph_passes": "torch._inductor.custom_graph_pass:get_custom_graph_passes",
    "get_hash_for_files": "torch._inductor.custom_graph_pass:get_hash_for_files",
    "InvalidCxxCompiler": "torch._inductor.exc:InvalidCxxCompiler",
    "constant_fold_uniform_value": "torch._inductor.fx_passes.joint_graph:constant_fold_uniform_value",
    "remove_noop_ops": "torch._inductor.fx_passes.post_grad:remove_noop_ops",
    "select_decomp_table": "torch._inductor.decomposition:select_decomp_table",
    "make_fx": "torch.fx.experimental.proxy_tensor:make_fx",
    "view_to_reshape": "torch._inductor.fx_passes.post_grad:view_to_reshape",
    "reinplace_inplaceable_ops": "torch._inductor.fx_passes.reinplace:reinplace_inplaceable_ops",
    "FakeTensorUpdater": "torch._inductor.fx_utils:FakeTensorUpdater",
    "BaseSchedulerNode": "torch._inductor.scheduler:BaseSchedulerNode",
    "cache_dir": "torch._inductor.runtime.cache_dir_utils:cache_dir",
    "V": "torch._inductor.virtualized:V",
}
"""By name here, where torch has it: a module, or ``module:name``.  The block above says the same to a type checker."""


def __getattr__(name: str) -> Any:
    if name not in LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = resolve_name(LATE[name])
    globals()[name] = found
    return found


def skip_frames_of(function: Any) -> None:
    """Let Dynamo compile neither ``function``'s frame nor any below it, as ``torch.compiler.disable`` does.

    That would load Dynamo at the first call, wrap it and be seen by tracing; this is a mark on the code object.
    """
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
