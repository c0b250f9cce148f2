"""What tracing left at a node of an FX graph: its tensor's shape and dtype, its arguments."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

aten = torch.ops.aten
prims = torch.ops.prims


def value(node: fx.Node) -> Any:
    """The fake tensor (or tuple, or number) that tracing left for a node; None where there is none."""
    return node.meta.get("val")


def is_tensor(node: object) -> TypeGuard[fx.Node]:
    """Whether it is a node that stands for one tensor."""
    return isinstance(node, fx.Node) and isinstance(value(node), Tensor)


def shape(node: fx.Node) -> tuple[Any, ...]:
    """Shape of a node's tensor: ints and SymInts; () for what is no tensor."""
    return tuple(value(node).shape) if is_tensor(node) else ()


def dtype(node: fx.Node) -> torch.dtype:
    """Dtype of a node's tensor."""
    found: torch.dtype = value(node).dtype
    return found


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """A call's arguments, each of the type that its operator's schema gives it; fx's own type leaves all open."""
    return node.args
