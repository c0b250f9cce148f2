"""What passes share and what they tell: the context of one graph, and one record a pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import fx

if TYPE_CHECKING:
    from qgalore_compile.passes.update import LayerUpdate, Updates

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


@dataclass
class Context:
    """What the passes of one graph share.

    Attributes:
        reassociate: "memory", "cost" or "never" (:mod:`qgalore_compile.passes.reassociate`).
        gemm: "same" or "bf16" (:mod:`qgalore_compile.passes.gemm_dtype`).
        name_of: readable names by the name of an input, as far as the caller knows any.
        updates: what :mod:`qgalore_compile.passes.update` found, kept true by the passes that rewrite it; None before.
        parameters: names of the inputs that are parameters; None where the caller does not know.
        origin_of: the program's input that an input of the graph comes from, likewise: a number, or an attribute.
        notes: what passes tell about one layer or other parameter, by its name.
        program: what passes tell about the graph as a whole.
        layer_text: one layer's name, and its part of the graph before and after the passes, as text.
    """

    reassociate: str = "memory"
    name_of: dict[str, str] = field(default_factory=dict)
    parameters: frozenset[str] | None = None
    origin_of: dict[str, int | str] = field(default_factory=dict)
    updates: Updates | None = None
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    program: dict[str, Any] = field(default_factory=dict)
    layer_text: dict[str, str] = field(default_factory=dict)
    gemm: str = "same"

    @property
    def layers(self) -> list[LayerUpdate]:
        """The matched layers; none where the analysis did not run."""
        return self.updates.layers if self.updates else []

    def note(self, layer: LayerUpdate | str, **facts: Any) -> None:
        """Tell something about a layer, or by its name about a parameter that is none."""
        self.notes.setdefault(layer if isinstance(layer, str) else layer.name, {}).update(facts)
