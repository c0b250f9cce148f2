"""Training steps of any composition, right and subtly wrong: in plain PyTorch, and as graphs.

A step is a chain of linear layers yₗ = clamp(yₗ₋₁ Wₗᵀ), its backward, and an update of each layer.  What it consists of
(:class:`Layer`, :class:`Step`) ``test_soundness.py`` draws, :meth:`Step.run` is the step in plain PyTorch, and
:func:`build` makes its graph.  A *flaw* is something that makes an update subtly another one than the passes look for:
a valid program all the same, whose results must be kept.

Results are compared for equality, not within a tolerance, although a pass takes products in another order.  For all
that a product sums are integers that the dtype holds exactly: activations, gradients and projectors are -1, 0 or 1,
factors powers of two.  What follows, from Adam to quantised moments, then sees the same values bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import NamedTuple

import torch
from graphs import Recorder, recorded
from torch import Tensor, fx

from qgalore_compile import formats
from qgalore_compile.passes.mutation import FUNCTIONALIZED, functional_arguments
from qgalore_compile.passes.nodes import ANCHOR
from qgalore_compile.subspace.scheduler import Rule, Schedule

aten = torch.ops.aten

GROUP = 4
RULE = Rule(official=False, threshold=0.4, gamma=2.0, max_gap=None)
ONCE = replace(Schedule.first(10, 1), clock=5, last=0, refreshes=1)  # refreshed once, five calls ago

FLAWS = {
    "gradient returned": "the step returns Σ G beside the loss",
    "gradient in the update": "G itself is added to the update, as Fira does: found, and taken from its factors",
    "a number of the gradient": "G is added where its largest element is above 1: all of G is needed first",
    "sums of its columns": "G is added where its column's sum is above 0, likewise",
    "rows in another order": "G is added upside down",
    "factors of another product": "a product of other factors is added, shaped like G",
    "gradient in a state": "the momentum of another layer takes a statistic of G",
    "gradient twice": "G + G, the same product as two terms",
    "foreign projector": "projected back with a projector of its own",
    "another decoding": "projected back with 2 P",
    "transposed projector": "P is square, and projected back with Pᵀ",
    "swapped operands": "all is square, and projected back with P on the other side",
    "foreign state": "the momentum takes part of another layer's momentum",
    "one state for two": "two layers' momenta are added up in one state",
    "product inside": "N is multiplied with products of itself, as Muon does: found",
    "foreign product inside": "N is multiplied with a product of other things",
    "written twice": "the weight is a state of another layer's update too",
}
"""What may be wrong with a layer."""

READINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "a number of the gradient": lambda g: torch.where(g.amax() > 1, g, 0.0),
    "sums of its columns": lambda g: torch.where(g.sum(0, keepdim=True) > 0, g, 0.0),
    "rows in another order": lambda g: g.flip(0),
    "factors of another product": lambda g: torch.ones(len(g), len(g), dtype=g.dtype) @ g,
}
"""What is read of G in place of its elements, by the flaw."""

REFUSED = {
    *READINGS,
    "foreign product inside",
    "foreign projector",
    "another decoding",
    "transposed projector",
    "swapped operands",
}
"""Flaws with which a layer must not be matched.  With others it may be, though its gradient must not be taken apart."""


@dataclass(frozen=True)
class Layer:
    """One layer and its update.

    Attributes:
        m, n, rank: weight (m, n); P (rank, n) on the right, (m, rank) on the left.
        right: the side.
        weight, projector, momentum: how they are stored: "float", "int8", "int4", "dynamic8".
        transposed: which of these stand transposed: "G", "P" in storage, "R", "U".
        linear: linear steps between the products and G, in order.
        optimizer: "sgd", "adam", "lion", or names of pointwise operations that make N from R and the momentum.
        decay: weight decay; None for none.
        refresh: whether a refresh op stands between R and the optimizer.
        due: whether that refreshes.
        flaw: a key of FLAWS, or None.
    """

    m: int
    n: int
    rank: int
    right: bool
    weight: str
    projector: str
    momentum: str
    transposed: frozenset[str]
    linear: tuple[str, ...]
    optimizer: str | tuple[str, ...]
    decay: float | None
    refresh: bool
    due: bool
    flaw: str | None

    @property
    def projector_shape(self) -> tuple[int, int]:
        return (self.rank, self.n) if self.right else (self.m, self.rank)

    @property
    def low_shape(self) -> tuple[int, int]:
        return (self.m, self.rank) if self.right else (self.rank, self.n)


LINEAR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "half": lambda g, two: g * 0.5,
    "over four": lambda g, two: g / 4,
    "negative": lambda g, two: -g,
    "over two": lambda g, two: g / two,
    "times two": lambda g, two: g * two,
    "double precision": lambda g, two: g.to(torch.float64),
    "back": lambda g, two: g.to(two.dtype),
    "copy": lambda g, two: g.clone(),
    "view": lambda g, two: g.reshape(1, *g.shape).squeeze(0),
}

POINTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "momentum": lambda r, m: 0.9 * m + r,
    "tanh": lambda r, m: r.tanh(),
    "sign": lambda r, m: r.sign(),
    "root": lambda r, m: r.abs().sqrt(),
    "where": lambda r, m: torch.where(r > 0, r, m),
    "over norm": lambda r, m: r / (r.abs().amax() + 1),
    "square": lambda r, m: r * r.abs(),
}


class Values(NamedTuple):
    """What updates read, by layer; ``parts`` are the inputs' stored tensors by their letter."""

    parts: dict[str, list[list[Tensor]]]
    weights: list[Tensor]
    gradients: list[Tensor]
    lows: list[Tensor]
    projectors: list[list[Tensor]]
    momenta: list[Tensor]


@dataclass
class Step:
    """A training step, as drawn.

    Attributes:
        layers: from the input on.
        tokens: of each micro-batch.
        dtype: of activations, gradients and float weights.
        batched: whether gradients are summed batched products, as three-dimensional activations make them.
        guard: "none", "layer" or "step": whether a layer is written only if its R, or all R, are finite.
        returns: what the step returns beside the loss: nothing, or the norm of all R.
        order: permutation of inputs.
        anchors: permutation of write-backs; those at even places stand as early as they can.
    """

    layers: list[Layer]
    tokens: list[int]
    dtype: torch.dtype
    batched: bool
    guard: str
    returns_norm: bool
    shuffle: list[int] = field(default_factory=list)
    seed: int = 0

    # -- inputs -------------------------------------------------------------------------------------------------------

    def inputs(self) -> dict[str, Tensor]:
        """Random inputs by name, in the drawn order."""
        generator = torch.Generator().manual_seed(self.seed)

        def integers(*shape: int, top: int = 1) -> Tensor:
            return torch.randint(-top, top + 1, shape, generator=generator).to(self.dtype)

        made: dict[str, Tensor] = {"two": torch.tensor(2.0, dtype=self.dtype), "step": torch.tensor(3)}
        for index, count in enumerate(self.tokens):
            made[f"x{index}"] = integers(count, self.layers[0].n)
        for index, layer in enumerate(self.layers):
            stored = {
                "w": encode_integers(layer.weight, integers(layer.m, layer.n)),
                "p": encode_integers(
                    layer.projector, _maybe_t(integers(*layer.projector_shape), "P" in layer.transposed)
                ),
                "m": encode(layer.momentum, torch.randn(layer.low_shape, generator=generator)),
                "v": [torch.rand(layer.low_shape, generator=generator)],
                "q": [integers(*layer.projector_shape)],
                "s": [replace(ONCE, next=1 if layer.due else 100).to_tensor(), RULE.to_tensor()],
            }
            made |= {f"{kind}{index}.{part}": each for kind, parts in stored.items() for part, each in enumerate(parts)}
        names = list(made)
        order = sorted(range(len(names)), key=lambda at: (self.shuffle[at % len(self.shuffle)], at))
        return {names[at]: made[names[at]] for at in order}

    # -- the step -----------------------------------------------------------------------------------------------------

    def run(self, recorder: Recorder, given: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """What the step returns, and new values of inputs by name."""
        parts = {kind: [self._parts(given, kind, index) for index in range(len(self.layers))] for kind in "wpmvqs"}
        stored = zip(self.layers, parts["w"], strict=True)
        weights = [decode(layer.weight, each, layer.n).to(self.dtype) for layer, each in stored]
        products: list[list[Tensor]] = [[] for _ in self.layers]
        losses = []
        for index in range(len(self.tokens)):
            made, loss = self._forward_and_backward(given[f"x{index}"], weights)
            losses.append(loss.to(torch.float64))
            for layer_products, product in zip(products, made, strict=True):
                layer_products.append(product)
        summed = zip(self.layers, products, strict=True)
        gradients = [self._gradient(layer, each, given["two"]) for layer, each in summed]
        returned = [reduce(torch.add, losses)]
        writes: dict[str, Tensor] = {}
        lows, projectors = [], []
        for index, (layer, gradient) in enumerate(zip(self.layers, gradients, strict=True)):
            low = self._low(layer, gradient, self._projector(layer, parts["p"][index], gradient.dtype))
            low, projector = self._refreshed(
                recorder, layer, index, low, gradient, parts["p"][index], parts["s"][index], writes
            )
            lows.append(low)
            projectors.append(projector)
        stored = zip(self.layers, parts["m"], strict=True)
        momenta = [decode(layer.momentum, each, layer.low_shape[1], moment=True) for layer, each in stored]
        values = Values(parts, weights, gradients, lows, projectors, momenta)
        fine = [torch.isfinite(low.square().sum()) for low in lows]
        all_fine = torch.isfinite(torch.stack([low.square().sum() for low in lows]).sum())
        for index in range(len(self.layers)):
            ok = {"none": None, "layer": fine[index], "step": all_fine}[self.guard]
            self._update(index, values, ok, returned, writes)
        if self.returns_norm:
            returned.append(torch.stack([low.square().sum() for low in lows]).sum().sqrt())
        writes["step"] = given["step"] + 1
        return returned, writes

    def _update(
        self, index: int, of: Values, ok: Tensor | None, returned: list[Tensor], writes: dict[str, Tensor]
    ) -> None:
        """One layer's update, written where ``ok``; its flaw may write or return something else beside."""
        layer, other = self.layers[index], (index + 1) % len(self.layers)
        momentum, second, update = self._optimizer(layer, of.lows[index], of.momenta[index], of.parts["v"][index][0])
        if layer.flaw == "foreign state":
            update = update + of.momenta[other].sum()
            momentum = momentum + of.momenta[other].mean()
        if layer.flaw == "product inside":
            update = update @ (update.t() @ update)
        if layer.flaw == "foreign product inside":
            ones = torch.ones(update.shape[1], 2, dtype=update.dtype)
            update = update @ (ones * of.parts["q"][index][0].sum().to(update.dtype) @ ones.t())
        projector = self._projector(layer, of.projectors[index], of.gradients[index].dtype)
        foreign = of.parts["q"][index][0].to(projector.dtype)
        back = self._up(layer, update.to(projector.dtype), projector, foreign)
        new = of.weights[index].to(torch.float32) - 0.125 * back.to(torch.float32)
        if layer.decay is not None:
            new = new - layer.decay * of.weights[index].to(torch.float32)
        if layer.flaw == "gradient in the update":
            new = new - 0.5 * of.gradients[index].to(torch.float32)
        elif layer.flaw in READINGS:
            new = new - 0.5 * READINGS[layer.flaw](of.gradients[index]).to(torch.float32)
        if layer.flaw == "written twice":
            new = new + of.weights[other].sum().to(torch.float32) * 0 + of.parts["v"][other][0].sum()
        if layer.flaw == "gradient in a state":
            writes[f"q{other}.0"] = of.parts["q"][other][0] * of.gradients[index].to(self.dtype).sum()
        if layer.flaw == "gradient returned":
            returned.append(of.gradients[index].sum())
        if layer.flaw == "one state for two":
            momentum = momentum + of.momenta[other].sum() + of.lows[other].sum()
        values = {
            "w": encode(layer.weight, new.to(self.dtype)),
            "m": encode(layer.momentum, momentum),
            "v": [second],
        }
        for kind, news in values.items():
            for part, (value, old) in enumerate(zip(news, of.parts[kind][index], strict=True)):
                writes[f"{kind}{index}.{part}"] = value if ok is None else torch.where(ok, value, old)

    def _parts(self, given: dict[str, Tensor], kind: str, index: int) -> list[Tensor]:
        found = []
        while f"{kind}{index}.{len(found)}" in given:
            found.append(given[f"{kind}{index}.{len(found)}"])
        return found

    def _forward_and_backward(self, x: Tensor, weights: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The gradient of each weight for one micro-batch, and a loss."""
        ys = [x]
        for weight in weights:
            ys.append((ys[-1] @ weight.t()).clamp(-1, 1))
        gradient, found = ys[-1], []
        for index in reversed(range(len(weights))):
            layer = self.layers[index]
            found.append(self._product(layer, gradient, ys[index]))
            if index:
                gradient = (gradient @ weights[index]).clamp(-1, 1)
        return found[::-1], ys[-1].sum()

    def _product(self, layer: Layer, dy: Tensor, x: Tensor) -> Tensor:
        """dYᵀ X."""
        if self.batched:
            return torch.bmm(dy.unsqueeze(1).transpose(1, 2), x.unsqueeze(1)).sum(0)  # a batch of one token each
        return (x.t() @ dy).t() if "G" in layer.transposed else dy.t() @ x

    def _gradient(self, layer: Layer, products: list[Tensor], two: Tensor) -> Tensor:
        gradient = reduce(torch.add, products)
        if layer.flaw == "gradient twice":
            gradient = gradient + gradient
        for name in layer.linear:
            gradient = LINEAR[name](gradient, two)
        return gradient

    def _projector(self, layer: Layer, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        transposed = "P" in layer.transposed
        columns = layer.projector_shape[0 if transposed else 1]
        return _maybe_t(decode(layer.projector, stored, columns), transposed).to(dtype)

    def _low(self, layer: Layer, gradient: Tensor, p: Tensor) -> Tensor:
        if "R" in layer.transposed:
            low = (p @ gradient.t()).t() if layer.right else (gradient.t() @ p).t()
        else:
            low = gradient @ p.t() if layer.right else p.t() @ gradient
        return low.to(torch.float32)

    def _refreshed(
        self,
        recorder: Recorder,
        layer: Layer,
        index: int,
        low: Tensor,
        gradient: Tensor,
        stored: list[Tensor],
        schedule: list[Tensor],
        writes: dict[str, Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """R and the projector's stored parts behind the refresh op, in its functional form."""
        if not layer.refresh:
            return low, stored
        form = {"float": "float32", "int8": f"int8/{GROUP}", "int4": f"int4/{GROUP}+planar"}[layer.projector]
        changed = {"low": low, "projector": stored, "schedule": schedule[0]}
        given = {
            "factors": [gradient], "scales": None, "shape": [layer.m, layer.n], "rank": layer.rank, "format": form,
            "method": "svd", "power_iterations": 2, "rule": schedule[1], "seed": 0, "param": index,
        }  # fmt: skip
        _, new_low, *new_stored, new_schedule = recorder.call(
            FUNCTIONALIZED, torch.ops.qgalore.refresh_.default, **functional_arguments(changed, given)
        )
        writes |= {f"p{index}.{at}": each for at, each in enumerate(new_stored)} | {f"s{index}.0": new_schedule}
        return new_low, new_stored

    def _optimizer(self, layer: Layer, low: Tensor, momentum: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """New momentum, new second moment, N."""
        if layer.optimizer == "sgd":
            momentum = 0.9 * momentum + low
            return momentum, second, momentum
        if layer.optimizer == "lion":
            return 0.99 * momentum + 0.01 * low, second, (0.9 * momentum + 0.1 * low).sign()
        if layer.optimizer == "adam":
            momentum = 0.9 * momentum + 0.1 * low
            second = 0.99 * second + 0.01 * low * low
            return momentum, second, momentum / (second.sqrt() + 1e-8)
        for name in layer.optimizer:
            low = POINTWISE[name](low, momentum)
        return low, second, low

    def _up(self, layer: Layer, update: Tensor, p: Tensor, foreign: Tensor) -> Tensor:
        if layer.flaw == "foreign projector":
            p = foreign
        if layer.flaw == "another decoding":
            p = p * 2
        if layer.flaw == "transposed projector":
            p = p.t()
        if layer.flaw == "swapped operands":
            return p @ update if layer.right else update @ p
        if "U" in layer.transposed:
            return (p.t() @ update.t()).t() if layer.right else (update.t() @ p.t()).t()
        return update @ p if layer.right else p @ update


def _maybe_t(matrix: Tensor, transposed: bool) -> Tensor:
    return matrix.t() if transposed else matrix


def encode(form: str, value: Tensor) -> list[Tensor]:
    """The stored tensors of a float one."""
    if form == "float":
        return [value]
    if form == "dynamic8":
        return list(formats.quantize_dynamic8(value, signed=True)[:2])
    quantize = formats.quantize_int4 if form == "int4" else formats.quantize_int8
    return list(quantize(value, GROUP)[:3])


def encode_integers(form: str, value: Tensor) -> list[Tensor]:
    """The stored tensors of -1, 0 and 1, which decode to exactly these."""
    if form == "float":
        return [value.contiguous()]
    codes = (value + 1).to(torch.uint8)
    scale = torch.ones(len(codes), -(-codes.shape[1] // min(GROUP, codes.shape[1])))
    return [formats.pack_int4(codes) if form == "int4" else codes.contiguous(), scale, -scale]


def decode(form: str, stored: Sequence[Tensor], columns: int, *, moment: bool = False) -> Tensor:
    """The float tensor of stored ones."""
    if form == "float":
        return stored[0]
    if form == "dynamic8":
        return formats.dequantize_dynamic8(*stored, True)
    if form == "int4":
        return formats.dequantize_int4(*stored, columns, GROUP)
    return formats.dequantize_int8(*stored, GROUP)


# -- graphs -----------------------------------------------------------------------------------------------------------


def build(step: Step, inputs: dict[str, Tensor]) -> fx.GraphModule:
    """The step's functional graph; write-backs at the end, or, every other one, as early as they can stand."""
    writes: list[str] = []

    def run(recorder: Recorder, given: dict[str, Tensor]) -> list[Tensor]:
        returned, written = step.run(recorder, given)
        writes[:] = written
        return [*returned, *written.values()]

    module = recorded(run, inputs)
    graph = module.graph
    (end,) = graph.find_nodes(op="output")
    returned = len(end.args[0]) - len(writes)
    values = dict(zip(writes, end.args[0][returned:], strict=True))
    end.args = (end.args[0][:returned],)
    placeholders = dict(zip(inputs, graph.find_nodes(op="placeholder"), strict=True))
    for place, (name, value) in enumerate(sorted(values.items(), key=lambda item: hash_of(step, item[0]))):
        target = placeholders[name]
        with graph.inserting_before(end):
            anchor = graph.call_function(ANCHOR, (target, value))
        anchor.meta["val"] = target.meta["val"]
        if place % 2:
            last = max([value, *(user for user in target.users if user is not anchor)])
            if last.op == "call_function" and last.target is not FUNCTIONALIZED and last is not anchor:
                last.append(anchor)
    graph.lint()
    return module


def hash_of(step: Step, name: str) -> int:
    """A random place for a write-back, the same in every run."""
    return step.shuffle[sum(map(ord, name)) % len(step.shuffle)]
