"""``plan``: what a training step of a model would hold, before the model exists anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from qgalore_compile._torch import FakeTensorMode
from qgalore_compile.planning.budget import propose
from qgalore_compile.planning.cards import amount
from qgalore_compile.planning.forecast import Forecast, MemoryPlan
from qgalore_compile.planning.losses import Loss, checkpointed, loss_of
from qgalore_compile.planning.outlined import is_outlined, outlined
from qgalore_compile.planning.process import process_bytes
from qgalore_compile.planning.recording import Recording, record
from qgalore_compile.planning.rivals import RIVALS, Rival
from qgalore_compile.planning.states import Bytes, Holding, Resident, resident
from qgalore_compile.planning.timeline import Treatment, recorded_layers, timeline
from qgalore_compile.planning.treatments import treatments_of
from qgalore_compile.planning.twin import fake, twin_of
from qgalore_compile.planning.vocabulary import by_rows
from qgalore_compile.weights import QuantizedWeight, select_linears

QUARTER = "quarter"
"""The rank that ``plan`` takes of its own: a quarter of the projected weights' smaller side."""

VARIANTS: dict[str, dict[str, Any]] = {
    "qgalore, updates at once": {"nonfinite": "skip_parameter", "max_grad_norm": None},
    "qgalore, moments of 4 bits": {"moments": "4bit"},
    "qgalore, checkpointing": {"checkpointing": True},
}
"""Settings that are shown beside those that were asked for."""


@dataclass(frozen=True)
class Settings:
    """All that a forecast depends on beside the model.

    Attributes:
        batch, seq: sequences of a micro-batch, and tokens of one.
        rank, moments, nonfinite, max_grad_norm: the optimizer's.
        weight_format: of the blocks' weights; None leaves them as they are.
        checkpointing: whether layers are computed again in the backward.
        accumulate: micro-batches of a step.
        device: "cpu" or "cuda".
        keys: others of ``param_groups``.
    """

    batch: int
    seq: int
    rank: int | None
    weight_format: str | None
    moments: str
    nonfinite: str
    max_grad_norm: float | None
    checkpointing: bool
    accumulate: int
    device: str
    keys: Mapping[str, Any]

    def check(self) -> None:
        """ValueError for a number that cannot be."""
        for name in ("batch", "seq", "accumulate"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"plan: {name} must be an integer of at least 1, got {value!r}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"plan: device must be 'cpu' or 'cuda', got {self.device!r}")


def plan(
    model: nn.Module,
    *,
    batch: int,
    seq: int,
    rank: int | str | None = QUARTER,
    weight_format: str | None = "int8/256",
    moments: str = "8bit",
    nonfinite: str = "skip_step",
    max_grad_norm: float | None = None,
    checkpointing: bool = False,
    accumulate: int = 1,
    device: str | None = None,
    budget: int | str | None = None,
    loss: Loss | None = None,
    compare: bool = True,
    **keys: Any,
) -> MemoryPlan:
    """What a compiled training step of a model holds, by category and over the step; in seconds, without memory for it.

    Weights and states are exact; activations are a model of what Inductor stores; what a process holds beside tensors
    is an estimate, and stands apart.

    Args:
        model: on the meta device, or anywhere; it is not changed, and nothing of its size is allocated.
        batch, seq: sequences of a micro-batch, and tokens of one.
        rank: of the projected weights; None where the rule is to have the whole gradient; "quarter" of their smaller
            side.
        weight_format: what ``quantize_`` is to make of the blocks' weights; None leaves them.  Weights that are
            quantised stay what they are.
        moments, nonfinite, max_grad_norm: of ``QGaLoreAdamW``.
        checkpointing: forward of each layer computed again in the backward.
        accumulate: micro-batches of a step.
        device: "cpu" or "cuda"; the model's own by default, and "cuda" for one on the meta device.
        budget: bytes, or a text as "16GB": settings that keep to it are proposed.
        loss: from the model, tokens (batch, seq) and targets to the loss, where the model is not called with those, nor
            with ``labels``, and returns no logits.
        compare: other ways of training, and other settings, too.
        **keys: of ``param_groups``: ``rule``, ``projector_format``, ``targets``, …

    Raises:
        ValueError: a number or a budget that cannot be, or a model without a layer to project.
    """
    limit = None if budget is None else amount(budget)
    if device is None:
        found = next((p.device.type for p in model.parameters()), "meta")
        device = "cpu" if found == "cpu" else "cuda"
    if rank == QUARTER:
        rank = quarter(model, keys.get("targets"))
    settings = Settings(batch, seq, cast("int | None", rank), weight_format, moments, nonfinite, max_grad_norm,
                        checkpointing, accumulate, device, keys)  # fmt: skip
    settings.check()
    if any(isinstance(p, QuantizedWeight) for p in model.parameters()):
        settings = changed(settings, weight_format=None)
    return _planned(Planner(model, loss), settings, limit, compare)


def _planned(planner: Planner, settings: Settings, limit: int | None, compare: bool) -> MemoryPlan:
    """The forecast, those that it is compared with, and what keeps to the budget."""
    forecast = planner.forecast(settings, "qgalore")
    others: list[Forecast] = []
    for name, variant in VARIANTS.items() if compare else ():
        if variant.get("checkpointing") and not planner.checkpoints(settings):
            continue
        if any(getattr(settings, key) != value for key, value in variant.items()):
            others.append(planner.forecast(changed(settings, **variant), name))
    if compare:
        others += [planner.rival(settings, rival) for rival in RIVALS]
    over = limit is not None and forecast.total > limit
    proposals = propose(settings, forecast, limit, planner) if over and limit is not None else []
    return MemoryPlan(forecast, tuple(others), settings.batch, settings.seq, settings.device, limit, tuple(proposals))


def changed(settings: Settings, **values: Any) -> Settings:
    """The settings with other values; a key of ``param_groups`` by its name, too."""
    own = {name: value for name, value in values.items() if name in Settings.__dataclass_fields__}
    keys = {name: value for name, value in values.items() if name not in own}
    return Settings(**{**vars(settings), **own, "keys": {**settings.keys, **keys}})


def quarter(model: nn.Module, targets: Any = None) -> int:
    """A quarter of the smaller side that most of the weights to be projected have."""
    sides = [min(linear.weight.shape) for _, linear in select_linears(model, targets)]
    return max(1, max(sides, key=sides.count) // 4)


class Trace(NamedTuple):
    """A recording of a model.

    Attributes:
        recording: of its forward and backward.
        layers: each parameter's layer; -1 outside of the stack.
        depth, recorded: layers of the stack, and how many of them were recorded.
        prefix: the stack's name, with a dot; "" for none.
    """

    recording: Recording
    layers: dict[str, int]
    depth: int
    recorded: int
    prefix: str


class Planner:
    """Forecasts of one model under several settings: what they share is traced once."""

    def __init__(self, model: nn.Module, loss: Loss | None) -> None:
        self._model, self._loss = model, loss or loss_of(model)
        self._recordings: dict[tuple[Any, ...], Trace] = {}
        self._residents: dict[str, Resident] = {}

    def forecast(self, settings: Settings, name: str) -> Forecast:
        """What this project's step holds."""
        known = self._resident(settings)
        trace = self._trace(settings)
        holdings = _holdings(known, trace)
        tokens = settings.batch * settings.seq
        treatments = treatments_of(known, trace.recording, holdings, tokens, trace.layers, settings.device)
        return self._finished(settings, name, known.bytes, treatments, trace, chunks=settings.device == "cpu")

    def rival(self, settings: Settings, rival: Rival) -> Forecast:
        """What another method's step holds, of the same forward and backward."""
        known, trace = self._resident(settings), self._trace(settings)
        held: Bytes = known.others.copy()
        for holding in known.holdings:
            held.update({name: size * holding.times for name, size in rival.holds(holding).items()})
        tokens, treatments = settings.batch * settings.seq, dict[str, Treatment]()
        for name, holding in _holdings(known, trace).items():
            treatment = rival.treats(holding, tokens, trace.recording.elements[name])
            if treatment is not None:
                treatments[name] = treatment._replace(layer=trace.layers[name])
        return self._finished(settings, rival.name, held, treatments, trace)

    def checkpoints(self, settings: Settings) -> bool:
        """Whether a step with checkpointed layers compiles: nothing in them may draw random numbers, as dropout
        does."""
        recording = self._trace(settings).recording
        return not any("dropout" in op.name or "bernoulli" in op.name or "rand" in op.name for op in recording.ops)

    def _finished(
        self, settings: Settings, name: str, held: Bytes, treatments: Mapping[str, Treatment], trace: Trace,
        chunks: bool = False,
    ) -> Forecast:  # fmt: skip
        compiled = self._compiled(settings, trace)
        moments = timeline(
            compiled,
            treatments,
            device=settings.device,
            depth=trace.depth,
            recorded=trace.recorded,
            prefix=trace.prefix,
            by_rows=by_rows(compiled) if chunks else {},
        )
        tokens = 2 * 8 * settings.batch * settings.seq * settings.accumulate
        forecast = Forecast(name, held + Counter({"other states": tokens}), tuple(moments), 0)
        return forecast.with_process(process_bytes(settings.device, trace.depth, forecast.peak))

    def _compiled(self, settings: Settings, trace: Trace) -> Recording:
        """The recording, its layers functions where they are compiled as such."""
        known = self._resident(settings).holdings
        projected = sum("rank" in each.group for each in known if each.name.startswith(f"{trace.prefix}1."))
        if not is_outlined(trace.recording, settings.device, trace.depth, projected):
            return trace.recording
        return outlined(trace.recording)

    def _resident(self, settings: Settings) -> Resident:
        keys = dict(settings.keys)
        own = (settings.rank, settings.weight_format, settings.moments, settings.nonfinite, settings.max_grad_norm)
        place = repr((own, sorted(keys.items(), key=str)))
        if place not in self._residents:
            self._residents[place] = resident(
                self._model,
                weight_format=settings.weight_format,
                keys={"rank": settings.rank, **keys},
                moments=settings.moments,
                nonfinite=settings.nonfinite,
                max_grad_norm=settings.max_grad_norm,
            )
        return self._residents[place]

    def _trace(self, settings: Settings) -> Trace:
        """The recording, each parameter's layer, and of the stack its depth, the layers recorded, and its name."""
        place = settings.batch, settings.seq, settings.checkpointing
        if place not in self._recordings:
            with FakeTensorMode():
                twin = twin_of(self._model, fake, recorded_layers)
                if settings.checkpointing:
                    checkpointed(twin.layers)
                tokens, targets = (torch.zeros(settings.batch, settings.seq, dtype=torch.int64) for _ in range(2))
                recording = record(twin.model, twin.layers, [tokens, targets], self._loss)
            layers = {name: twin.layer_of(name) for name in recording.gradients}
            self._recordings[place] = Trace(recording, layers, twin.depth, len(twin.layers), twin.prefix)
        return self._recordings[place]


def _holdings(known: Resident, trace: Trace) -> dict[str, Holding]:
    """Of each recorded parameter, by its name there: of layers that were not made, the second one's."""
    recording, layers, prefix = trace.recording, trace.layers, trace.prefix
    by_name = {holding.name: holding for holding in known.holdings}
    found = {}
    for name in recording.gradients:
        like = name if name in by_name else name.replace(f"{prefix}{layers[name]}.", f"{prefix}1.", 1)
        found[name] = by_name[like]
    return found
