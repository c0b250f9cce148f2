"""Graphs of GaLore layers in many spellings, for the tests of the passes that find and rewrite updates."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from graphs import after, results, traced
from torch import Tensor, fx

from qgalore_compile import formats
from qgalore_compile.passes.manager import PassManager
from qgalore_compile.passes.mutation import FUNCTIONALIZED, functional_arguments
from qgalore_compile.passes.nodes import is_gemm, shape
from qgalore_compile.passes.regions import LayerUpdate
from qgalore_compile.passes.update import Unmatched, Updates, find_updates
from qgalore_compile.subspace.scheduler import Rule, Schedule

aten = torch.ops.aten

GROUP = 8
BETAS = torch.tensor([0.9, 0.99], dtype=torch.float64)
RULE = Rule(official=False, threshold=0.4, gamma=2.0, max_gap=80)
Tensors = dict[str, Tensor]


Full: TypeAlias = "Callable[[Layer, Tensor, Tensor, Tensor, Tensor], Tensor]"


@dataclass
class Layer:
    """One projected weight and how its update is spelled.

    Attributes:
        name: prefix of its inputs.
        shape, rank, tokens, batch: of the weight, the projector and the activations.
        side: which side is projected; None for GaLore's rule.
        gradient: how the backward spells dYᵀ X, a key of ``GRADIENTS``.
        accumulate: micro-batches; ``addition``: how their gradients are added, "add" or "addmm".
        down: "plain", or "transposed" for Rᵀ = P Gᵀ.
        rule: the optimizer between the products, a key of ``RULES``.
        projector, weight: "float", or "int4" and "int8".
        dtype: of the activations, the gradient and both products; states are float32.
        refresh: "svd" or "randomized" puts the refresh op behind R; ``due``: whether its schedule says so.
        follow: "rotate" or "reset" hands the op the moments of the rule "adam" too.
        after: what happens to the gradient before the projection.
    """

    name: str = "a"
    shape: tuple[int, int] = (20, 12)
    rank: int = 4
    tokens: int = 14
    batch: int = 3
    side: str | None = None
    gradient: str = "mm"
    accumulate: int = 1
    addition: str = "add"
    down: str = "plain"
    rule: str = "adam"
    projector: str = "float"
    weight: str = "float"
    dtype: torch.dtype = torch.float32
    refresh: str | None = None
    due: bool = True
    follow: str | None = None
    after: Callable[[Tensor, Tensors], Tensor] = lambda gradient, tensors: gradient

    def __post_init__(self) -> None:
        self.right = self.side == "right" if self.side else self.shape[0] >= self.shape[1]

    # -- inputs -------------------------------------------------------------------------------------------------------

    def inputs(self) -> Tensors:
        """Random values of every input, by name."""
        (m, n), r = self.shape, self.rank
        leading = (self.batch, self.tokens) if self.gradient in BATCHED else (self.tokens,)
        tensors: Tensors = {}
        for index in range(self.accumulate):
            tensors[f"dy{index}"] = torch.randn(*leading, m).to(self.dtype)
            tensors[f"x{index}"] = torch.randn(*leading, n).to(self.dtype)
        projector = torch.linalg.qr(torch.randn(n if self.right else m, r))[0]
        projector = projector.t().contiguous() if self.right else projector.contiguous()
        tensors.update(_encoded("p", projector, formats.quantize_int4 if self.projector == "int4" else None))
        tensors.update(_encoded("w", torch.randn(m, n), formats.quantize_int8 if self.weight == "int8" else None))
        low = (m, r) if self.right else (r, n)
        tensors["m"] = torch.randn(low) * 0.1
        if self.rule.startswith("adam"):
            tensors["v"] = torch.rand(low) * 0.1
        if self.refresh:
            schedule = Schedule.first(5, 5)
            tensors["schedule"] = (schedule if self.due else schedule.refreshed(RULE, None).ticked()).to_tensor()
        return {f"{self.name}_{key}": value for key, value in tensors.items()}

    # -- the update ---------------------------------------------------------------------------------------------------

    def full_gradient(self, t: Tensors) -> Tensor:
        """G as the graph holds it."""
        spelled = GRADIENTS[self.gradient]
        total = spelled(t["dy0"], t["x0"])
        for index in range(1, self.accumulate):
            dy, x = t[f"dy{index}"], t[f"x{index}"]
            total = torch.addmm(total, dy.t(), x) if self.addition == "addmm" else total + spelled(dy, x)
        return self.after(total, t)

    def decoded(self, t: Tensors, which: str, columns: int) -> Tensor:
        """The projector "p" or the weight "w" in floating point."""
        if f"{which}_codes" not in t:
            return t[which]
        parts = t[f"{which}_codes"], t[f"{which}_scale"], t[f"{which}_offset"]
        if which == "p":
            return formats.dequantize_int4(*parts, columns, GROUP)
        return formats.dequantize_int8(*parts, GROUP)

    def project(self, gradient: Tensor, p: Tensor) -> Tensor:
        """R."""
        if self.down == "transposed":
            return (p @ gradient.t()).t() if self.right else (gradient.t() @ p).t()
        return gradient @ p.t() if self.right else p.t() @ gradient

    def back(self, low: Tensor, p: Tensor) -> Tensor:
        """From r × n or m × r to m × n."""
        low = low.to(p.dtype)
        return (low @ p if self.right else p @ low).to(torch.float32)

    def step(self, t: Tensors, full: Full | None = None) -> Tensors:
        """The new value of every input that the step writes; ``full``: the update U of N, R, G and P, in place of N's
        product with the projector."""
        gradient, n = self.full_gradient(t), self.shape[1]
        columns = n if self.right else self.rank
        low = self.project(gradient, self.decoded(t, "p", columns).to(gradient.dtype)).to(torch.float32)
        written: Tensors = {}
        if self.refresh:
            low, written = self._refreshed(low, gradient, t)
            t = {**t, **written}
        update, states = RULES[self.rule](low, t)
        written.update(states)
        p = self.decoded(t, "p", columns).to(gradient.dtype)
        whole = full(self, update, low, gradient.to(torch.float32), p) if full else self.back(update, p)
        weight = self.decoded(t, "w", n) - t["lr"] * whole
        if self.weight == "int8":
            parts = formats.quantize_int8(weight, GROUP)[:3]
            written.update(zip(("w_codes", "w_scale", "w_offset"), parts, strict=True))
        else:
            written["w"] = weight
        return written

    def _refreshed(self, low: Tensor, gradient: Tensor, t: Tensors) -> tuple[Tensor, Tensors]:
        """R and what the refresh op writes, as a functional graph holds it."""
        names = ["p_codes", "p_scale", "p_offset"] if self.projector == "int4" else ["p"]
        moments = ["m", "v"] if self.follow else []
        changed: dict[str, Any] = {"low": low, "projector": [t[name] for name in names], "schedule": t["schedule"]}
        given: dict[str, Any] = {}
        if self.follow:
            changed["moments"] = [t[name] for name in moments]
            given = {"step": t["step"], "on_refresh": self.follow, "betas": t["betas"], "moments_format": "32bit"}
        given |= {
            "factors": [gradient], "scales": None, "shape": list(self.shape), "rank": self.rank,
            "format": f"int4/{GROUP}+planar" if self.projector == "int4" else "float32", "method": self.refresh,
            "power_iterations": 2, "rule": RULE.to_tensor(), "seed": 0, "param": 0,
        }  # fmt: skip
        op = torch.ops.qgalore.refresh_.moments if self.follow else torch.ops.qgalore.refresh_.default
        returned = FUNCTIONALIZED(op, **functional_arguments(changed, given))
        return returned[1], dict(zip([*names, "schedule", *moments], returned[2:], strict=True))


def _encoded(name: str, value: Tensor, quantize: Callable[..., Any] | None) -> Tensors:
    if quantize is None:
        return {name: value}
    return dict(zip((f"{name}_codes", f"{name}_scale", f"{name}_offset"), quantize(value, GROUP)[:3], strict=True))


GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mm": lambda dy, x: dy.t() @ x,
    "transposed": lambda dy, x: (x.t() @ dy).t(),
    "copied": lambda dy, x: dy.t().contiguous() @ x,
    "bmm": lambda dy, x: torch.bmm(dy.transpose(1, 2), x).sum(0),
    "bmm transposed": lambda dy, x: torch.bmm(x.transpose(1, 2), dy).sum(0).t(),
    "einsum": lambda dy, x: torch.einsum("bti,btj->ij", dy, x),
    "view": lambda dy, x: dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1]),
    "batch of one": lambda dy, x: torch.bmm(dy.t().unsqueeze(0), x.unsqueeze(0)).squeeze(0),
}
BATCHED = ("bmm", "bmm transposed", "einsum", "view")


def _adam(low: Tensor, t: Tensors) -> tuple[Tensor, Tensors]:
    m = 0.9 * t["m"] + 0.1 * low
    v = 0.99 * t["v"] + 0.01 * low * low
    step = t["step"] + 1
    return (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8), {"m": m, "v": v}


def _adam_with_eps_inside(low: Tensor, t: Tensors) -> tuple[Tensor, Tensors]:
    m = torch.lerp(t["m"], low, 0.1)
    v = t["v"] * 0.99 + low.square() * 0.01
    return m * torch.rsqrt(v + 1e-6), {"v": v, "m": m}


def _lion(low: Tensor, t: Tensors) -> tuple[Tensor, Tensors]:
    return torch.sign(0.9 * t["m"] + 0.1 * low), {"m": 0.99 * t["m"] + 0.01 * low}


def _sgd(low: Tensor, t: Tensors) -> tuple[Tensor, Tensors]:
    m = 0.9 * t["m"] + low
    return m, {"m": m}


RULES: dict[str, Callable[[Tensor, Tensors], tuple[Tensor, Tensors]]] = {
    "adam": _adam,
    "adam with eps inside": _adam_with_eps_inside,
    "lion": _lion,
    "sgd": _sgd,
}

SHARED = {"lr": torch.tensor(0.1), "step": torch.tensor(3.0), "betas": BETAS}


# -- graphs -----------------------------------------------------------------------------------------------------------


@dataclass
class Built:
    """A traced step: its module, its inputs in the graph's order, and their names."""

    module: fx.GraphModule
    inputs: list[Tensor]
    names: list[str]

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def node(self, name: str) -> fx.Node:
        """The placeholder of an input."""
        return self.placeholders[self.names.index(name)]

    @property
    def placeholders(self) -> list[fx.Node]:
        return list(self.graph.find_nodes(op="placeholder"))

    @property
    def name_of(self) -> dict[str, str]:
        return {node.name: name for node, name in zip(self.placeholders, self.names, strict=True)}

    def updates(self) -> Updates:
        """What the analysis finds; inputs carry their names, and those with a "w" in them are parameters."""
        parameters = {node for node, name in self.name_of.items() if "w" in name.split("_")}
        return find_updates(self.graph, self.name_of, parameters)

    def layer(self) -> LayerUpdate:
        """The only layer."""
        found = self.updates()
        assert not found.unmatched, found.unmatched
        (layer,) = found.layers
        return layer

    def refused(self) -> Unmatched:
        """The only parameter without a layer; there is no other."""
        found = self.updates()
        assert not found.layers
        (other,) = found.unmatched
        return other

    def run(self) -> Tensors:
        """What the step returns, as "0", "1", …, and every input behind it."""
        values = results(self.module, self.inputs)
        returned = len(values) - len(self.names)
        keys = [*map(str, range(returned)), *self.names]
        return dict(zip(keys, values, strict=True))

    def gemms(self) -> list[tuple[Any, ...]]:
        """Shapes of all matrix products in the graph."""
        return [shape(node) for node in self.graph.nodes if is_gemm(node)]

    def operator(self, target: object) -> list[fx.Node]:
        """The graph's calls of an operator."""
        return list(self.graph.find_nodes(op="call_function", target=target))

    def after(self, *passes: str, **options: Any) -> PassManager:
        """Run passes on the graph."""
        return after(self.module, *passes, **options)


Body = Callable[[Tensors], Any]


def build(
    body: Body, inputs: Tensors, *, shuffle: int | None = None, symbolic: Iterable[str] = (), named: bool = True
) -> Built:
    """Trace ``body``, a function of the inputs by name that ends in ``aten.copy_.default`` of what it writes.

    Args:
        shuffle: a seed that selects another order of the inputs.
        symbolic: inputs whose first dimension is symbolic.
        named: whether placeholders are called as the inputs; else by a number.
    """
    names = list(inputs)
    if shuffle is not None:
        random.Random(shuffle).shuffle(names)

    def function(*tensors: Tensor) -> Any:
        return body(dict(zip(names, tensors, strict=True)))

    values = [inputs[name] for name in names]
    module = traced(function, *values, symbolic=[names.index(name) for name in symbolic])
    for index, node in enumerate(list(module.graph.find_nodes(op="placeholder"))):
        node._rename(names[index] if named else f"arg{index}_1")
        node.target = node.name
    module.recompile()
    return Built(module, values, names)


def galore(
    *layers: Layer,
    extra: Tensors | None = None,
    values: Tensors | None = None,
    also: Callable[[Tensors], Any] | None = None,
    **how: Any,
) -> Built:
    """The graph of a step that updates these layers, and does ``also`` something with inputs, ``extra`` ones included;
    what ``also`` returns, the step returns.  Inputs are random, or these ``values``."""
    inputs = {**SHARED, **(extra or {})}
    for layer in layers:
        inputs.update(layer.inputs())
    inputs.update(values or {})

    def body(t: Tensors) -> Any:
        new: Tensors = {}
        for layer in layers:
            new.update(prefixed(layer, layer.step(own(layer, t))))
        returned = also(t) if also else None
        write(t, new)
        return returned

    return build(body, inputs, **how)


def own(layer: Layer, t: Tensors) -> Tensors:
    """The inputs of a layer by their short names, and those that layers share."""
    prefix = f"{layer.name}_"
    short = {name.removeprefix(prefix): value for name, value in t.items() if name.startswith(prefix)}
    return {**t, **short}


def prefixed(layer: Layer, values: Tensors) -> Tensors:
    return {f"{layer.name}_{name}": value for name, value in values.items()}


def write(t: Tensors, new: Tensors) -> None:
    """End a step: ``copy_`` every new value into its input."""
    for name, value in new.items():
        aten.copy_.default(t[name], value)


def assert_near(found: Tensors, expected: Tensors, tolerance: float, *, besides: Sequence[str] = ()) -> None:
    """‖found - expected‖ ≤ tolerance · ‖expected‖ for every tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name in besides:
            continue
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name].isnan(), value.isnan()), name
        one, other = found[name].double().nan_to_num(), value.double().nan_to_num()
        apart, size = float((one - other).norm()), float(other.norm())
        assert apart <= tolerance * size + 1e-30, f"{name}: {apart:.3g} apart, of {size:.3g}"
