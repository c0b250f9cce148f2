"""What passes share and what they tell: the context of one graph, and one record a pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import fx

from qgalore_compile.passes.facts import Facts
from qgalore_compile.passes.nodes import arguments_changed

if TYPE_CHECKING:
    from qgalore_compile.passes.columns import Rerolled
    from qgalore_compile.passes.regions import LayerUpdate
    from qgalore_compile.passes.update import Updates

Tier = Literal["exact", "rounding"]


@dataclass
class PassRecord:
    """What one pass did to one graph.

    Attributes:
        name, tier: of the pass; "exact" leaves every result bit for bit, "rounding" within the contract.
        matches: places rewritten, by the name of the node that was there.
        skipped: (node name, reason) of each place that was looked at and left.
        nodes_before, nodes_after: nodes in the graph.
        ops: how the number of calls of each operator changed, only those that did.
        milliseconds: time in the pass.
    """

    name: str
    tier: Tier
    matches: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    ops: dict[str, int] = field(default_factory=dict)
    milliseconds: float = 0.0

    def match(self, node: fx.Node) -> None:
        """Count a rewritten place."""
        self.matches.append(node.name)

    def skip(self, node: fx.Node, reason: str) -> None:
        """Count a place that stays as it is, and why."""
        self.skipped.append((node.name, reason))

    def __str__(self) -> str:
        ops = ", ".join(f"{op} {change:+d}" for op, change in sorted(self.ops.items())) or "no operator changed"
        return (
            f"{self.name} ({self.tier}): {len(self.matches)} matched, {len(self.skipped)} skipped, "
            f"{self.nodes_before} -> {self.nodes_after} nodes, {ops}, {self.milliseconds:.1f} ms"
        )


@dataclass(slots=True)
class LayerNote:
    """What passes tell of one layer, or of another parameter; None for what none has told.

    Attributes:
        ops: nodes of the update, as it was found.
        inequality: what R costs through the factors and through the gradient.
        reassociated: whether R is taken from the factors, so that the gradient is never formed.
        not_reassociated: why it is not.
        keeps: what of the gradient lives until the update, where the write-back reads it.
        refresh_takes: what the refresh op is given.
        refresh_cost: what a refresh costs beside the step.
        update_function: what runs the update, where it is not left to Inductor.
        not_fused: why no generated kernel does.
    """

    ops: int | None = None
    inequality: str | None = None
    reassociated: bool | None = None
    not_reassociated: str | None = None
    keeps: str | None = None
    refresh_takes: str | None = None
    refresh_cost: str | None = None
    update_function: str | None = None
    not_fused: str | None = None

    def told(self) -> dict[str, Any]:
        """What has been told, by name."""
        return {name: fact for name, fact in asdict(self).items() if fact is not None}


@dataclass
class Context:
    """What the passes of one graph share.

    Attributes:
        reassociate: "memory", "cost" or "never" (:mod:`qgalore_compile.passes.reassociate`).
        gemm: "same" or "bf16" (:mod:`qgalore_compile.passes.gemm_dtype`).
        outline: whether equal layers become calls of one function (:mod:`qgalore_compile.passes.outline`); None for
            where it saves much.
        name_of: readable names by the name of an input, as far as the caller knows any.
        updates: what :mod:`qgalore_compile.passes.update` found, kept true by :meth:`replace`; None before.
        parameters: names of the inputs that are parameters; None where the caller does not know.
        origin_of: the program's input that an input of the graph comes from, likewise: a number, or an attribute.
        notes: what passes tell about one layer or other parameter, by its name.
        kept: by layer, why its gradient is formed or None, once that has been asked
            (:func:`qgalore_compile.passes.reassociate.kept`).
        waiting: by layer whose update waits for a number over other layers, that number, once that has been asked
            (:mod:`qgalore_compile.passes.until_update`).
        at_full_rank: names of parameters that are not projected, by the call of the kernel that updates one.
        program: what passes tell about the graph as a whole.
        rerolled: layers that the graph is without and shall have (:mod:`qgalore_compile.backend.reroll`).
        uneven: why they could not be put back.
        layer_text: one layer's name, and its part of the graph before and after the passes, as text.
    """

    reassociate: str = "memory"
    name_of: dict[str, str] = field(default_factory=dict)
    parameters: frozenset[str] | None = None
    origin_of: dict[str, int | str] = field(default_factory=dict)
    updates: Updates | None = None
    notes: dict[str, LayerNote] = field(default_factory=dict)
    kept: dict[LayerUpdate, str | None] = field(default_factory=dict)
    waiting: dict[LayerUpdate, fx.Node] | None = None
    at_full_rank: dict[fx.Node, str] = field(default_factory=dict)
    program: dict[str, Any] = field(default_factory=dict)
    layer_text: dict[str, str] = field(default_factory=dict)
    gemm: str = "same"
    outline: bool | None = False
    rerolled: Rerolled | None = None
    uneven: str | None = None
    _facts: Facts | None = None

    @property
    def layers(self) -> list[LayerUpdate]:
        """The matched layers; none where the analysis did not run."""
        return self.updates.layers if self.updates else []

    def note(self, layer: LayerUpdate | str) -> LayerNote:
        """What is told of a layer, or by its name of a parameter that is none: to be added to."""
        return self.notes.setdefault(layer if isinstance(layer, str) else layer.name, LayerNote())

    def told(self, name: str) -> dict[str, Any]:
        """What has been told of a parameter."""
        return self.notes[name].told() if name in self.notes else {}

    def facts(self, graph: fx.Graph) -> Facts:
        """Facts about the nodes of the graph, the same for all passes."""
        if self._facts is None:
            self._facts = Facts(graph)
        return self._facts

    def replace(
        self, graph: fx.Graph, old: fx.Node, new: fx.Node, *, up: fx.Node | None = None, down: fx.Node | None = None,
        low: fx.Node | None = None, where: Callable[[fx.Node], bool] = lambda user: True,
    ) -> None:  # fmt: skip
        """Let a node stand where another one stood: for its readers, in the same line of the user's source, in what the
        analysis found, and in what is known of the graph.  The other one stays in the graph.

        Args:
            graph: that both are in.
            old, new: nodes of the same value.
            up, down, low: what a layer's field that was ``old`` becomes, where that is not ``new``.
            where: of the readers, those that are meant; all by default.
        """
        for node in (new, up, down, low):
            if node is not None and "stack_trace" in old.meta:
                node.meta.setdefault("stack_trace", old.meta["stack_trace"])
        old.replace_all_uses_with(new, delete_user_cb=lambda user: where(user) and arguments_changed(user))
        for layer in self.layers:
            if old in (layer.up, *layer.downs, layer.low, layer.gradient, *layer.further, *layer.inside):
                layer.across = tuple((down or new) if gemm is old else gemm for gemm in layer.across)
                layer.further = tuple((up or new) if gemm is old else gemm for gemm in layer.further)
                layer.inside = tuple(new if gemm is old else gemm for gemm in layer.inside)
                layer.up = (up or new) if layer.up is old else layer.up
                layer.down = (down or new) if layer.down is old else layer.down
                layer.low = (low or new) if layer.low is old else layer.low
                layer.gradient = new if layer.gradient is old else layer.gradient
        self.facts(graph).replaced(old, new)
