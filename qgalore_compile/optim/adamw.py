"""``QGaLoreAdamW`` in plain PyTorch: the specification.  Every fused path is tested against this file.

One step for a projected weight W (m, n) with gradient G, projector P and rank r:

    R = G P^T                    right side, m >= n; on the left R = P^T G                     projection.py
    refresh                      where the schedule says so: P from G anew, R with the new P,  refresh.py
                                 and the stored moments follow, if asked to                    moments.py
    m = β1 m + (1 - β1) R        float32, from moments dequantised; likewise v with R²
    √v = max(√v, κ |m|)          not in 32 bits: what Cauchy and Schwarz say of float ones  moments.py
    N = m̂ / (√v̂ + ε)             bias-corrected, from the fresh m and v; 0 where the divisor is 0
    U = α N P                    left side: α P N
    W = W - lr U;  W = W - lr λ W                              decoupled decay, after the update
    store m, √v, W               with stochastic rounding; dynamic 8-bit blocks to nearest      formats/

Every other parameter takes the same step with R = G and U = N.  Source: Q-GaLore (arXiv 2407.08296), algorithm 1.

The step has two phases, since the norm and the finiteness of *all* gradients are known before the first update: first
every R, r × n elements at most, then every update.  It never branches on a tensor's value, so it is one graph: what
must not happen is a ``torch.where``.  All state exists before the first step, as tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from qgalore_compile.composites import composite, stay
from qgalore_compile.formats import rounding
from qgalore_compile.optim import checkpoint, checks, groups, hooks, layout, settings
from qgalore_compile.optim.hyper_parameters import Group, MaxGradNorm, adopted, trace_groups
from qgalore_compile.optim.placement import check_placement
from qgalore_compile.optim.rules import RuleState, Written
from qgalore_compile.optim.settings import KEYS
from qgalore_compile.rng import MOMENT_STREAM, PROJECTOR_STREAM, random_bits
from qgalore_compile.subspace.projection import Side, other_side, project, project_back, side_of
from qgalore_compile.subspace.refresh import refresh_
from qgalore_compile.subspace.scheduler import Schedule, ScheduleRecord, record_of
from qgalore_compile.subspace.timing import seconds_of
from qgalore_compile.weights import QuantizedWeight
from qgalore_compile.weights.operations import descend_


class _Pending(NamedTuple):
    """A parameter between the two phases: ``low`` is R, or G as it came where it is not projected; ``across`` the
    sketch of the other side, of rules that want one."""

    parameter: Tensor
    group: Group
    state: dict[str, Tensor]
    position: int
    low: Tensor
    across: Tensor | None = None


class QGaLoreAdamW(Optimizer):
    """AdamW in a low-rank subspace: INT4 projector, 8-bit moments, INT8 weights with stochastic rounding.

    Args:
        params: parameters, or groups of them (:func:`qgalore_compile.param_groups`).  ``rank`` marks a projected group;
            its other keys are GaLore's and this project's (``optim/settings.py``).  Weights may be float32,
            bfloat16, float16 or ``Int8Weight``, all on one device; a group's ``rounding``, "stochastic" or "nearest",
            is that of ``Int8Weight``, bfloat16 and float16, and of √v but in 8 and 32 bits.
        lr: a float or a 0-d tensor; kept as a tensor a group, so that schedules of it recompile nothing.
        betas, eps, weight_decay: AdamW's.  All numbers of a group may be set between steps; they are checked there, and
            a compiled step follows them (:class:`~qgalore_compile.optim.hyper_parameters.Group`).
        moments: "8bit", "4bit" (parameters that are not projected and have fewer than 4096 elements keep 32), "32bit",
            or the text of a format.
        max_grad_norm: clip to this global norm: of R for projected parameters, of G for the others.  May be set, too.
        nonfinite: "skip_step": one NaN or Inf anywhere leaves every parameter and its state as it was (a projector
            that was due and finite may be new, and its moments with it; the schedules' clocks count the attempt);
            "skip_parameter": only the parameter concerned stays as it was.
        seed: of all random bits.

    State of a parameter, by name in ``state_dict``:

    ==========================================  =======================================================================
    ``step``                                    int64, 0-d: updates so far
    ``exp_avg``, ``exp_avg_…``                  m, shaped like R, in the parts of its format
    ``exp_avg_sq_root``, ``…_sq_root_…``        √v, likewise; ``exp_avg_sq``, v, where moments are in 32 bits
    ``projector``, ``projector_…``              P in the parts of its format (``layout.py``)
    ``schedule``                                float64 on the CPU (:mod:`qgalore_compile.subspace.scheduler`)
    ``grad_norm``, ``skipped_steps``            float32 and int64, 0-d: of all parameters, beside the first one's alone
    ==========================================  =======================================================================

    Raises:
        ValueError: a setting or a group that cannot be; the message names the parameter, its shape and the remedy.
    """

    param_groups: list[Group]  # type: ignore[assignment]
    _limit: Tensor | None
    max_grad_norm = MaxGradNorm()

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = KEYS["lr"].default,
        betas: tuple[float, float] = KEYS["betas"].default,
        eps: float = KEYS["eps"].default,
        weight_decay: float = KEYS["weight_decay"].default,
        *,
        moments: str = KEYS["moments"].default,
        max_grad_norm: float | None = None,
        nonfinite: str = "skip_step",
        seed: int = KEYS["seed"].default,
    ) -> None:
        if nonfinite not in ("skip_step", "skip_parameter"):
            raise ValueError(f"nonfinite must be 'skip_step' or 'skip_parameter', got {nonfinite!r}")
        self.max_grad_norm, self.nonfinite = max_grad_norm, nonfinite
        given = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, moments=moments, seed=seed)
        defaults = {**settings.defaults(projected=False), **given}
        # betas are no entry of ``defaults``: schedulers that cycle momentum look there, write floats into the group
        # each step and would recompile each time; so they refuse this optimizer with a message about cycle_momentum
        self._betas = defaults.pop("betas")
        trace_groups()
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: Optimizer's own keeps only defaults, state and groups."""
        own = {name: self.__dict__[name] for name in (*MaxGradNorm.KEPT, "nonfinite", "_betas")}
        return {**super().__getstate__(), **own}

    # -- groups and state --------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check a group, fill in the defaults and create the state of its parameters; a bad group changes nothing."""
        group, position = dict(param_group), len(self.param_groups)
        checks.check_keys(group, f"parameter group {position}")
        with checkpoint.undo_on_error(self.param_groups):
            super().add_param_group(group := self._complete(group))
            self.param_groups[position] = group = self._group(group, position)
        first = sum(len(other["params"]) for other in self.param_groups[:-1] if "rank" in other)
        for index, parameter in enumerate(group["params"], first):
            slot = groups.slot_of(group, index) if "rank" in group else -1
            state = layout.new_state(parameter, group, slot)
            if not self.state:
                # here, and under no key of their own: torch.distributed.checkpoint takes every key for a parameter
                state["grad_norm"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["skipped_steps"] = torch.zeros((), dtype=torch.int64, device=parameter.device)
            self.state[parameter] = state

    def _complete(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"betas": self._betas, **(settings.defaults(projected=True) if "rank" in group else {}), **group}

    def _group(self, group: dict[str, Any], position: int) -> Group:
        """A group whose parameters are known, checked."""
        where, names = f"parameter group {position}", groups.names_of(group, position)
        checks.check_adam(group, names, where)
        if "rank" in group:
            checks.check_projection(group, names, where)
        if self.state:
            checks.check_device(group, names, where, self.last_grad_norm.device)
        return Group(group)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, adopted(value, self._adopt) if name == "param_groups" else value)

    def _adopt(self, group: dict[str, Any]) -> Group:
        """Of a plain dict in a list that is assigned to ``param_groups``."""
        checks.check_keys(group, "param_groups")
        if any(p not in self.state for p in group["params"]):
            raise ValueError("param_groups: a parameter has no state in this optimizer; use add_param_group")
        return self._group({**self.defaults, **self._complete(group)}, 0)

    @property
    def last_grad_norm(self) -> Tensor:
        """0-d float32: the global norm of the last step before clipping; of the finite gradients alone where
        ``nonfinite="skip_parameter"``."""
        return self._first_state()["grad_norm"]

    @property
    def skipped_steps(self) -> Tensor:
        """0-d int64: steps so far in which a gradient was not finite."""
        return self._first_state()["skipped_steps"]

    def _first_state(self) -> dict[str, Tensor]:
        """State of the parameter that came first, which holds what belongs to all of them as well."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if "grad_norm" in self.state[parameter]:
                    return self.state[parameter]  # type: ignore[no-any-return]
        for state in self.state.values():  # its group has been taken away
            if "grad_norm" in state:
                return state  # type: ignore[no-any-return]
        raise ValueError("the optimizer has no parameters yet, and so no norm of their gradients")

    def schedule(self) -> list[ScheduleRecord]:
        """When each projected parameter was and will be refreshed, in the order of the groups; those of rules that draw
        their projectors are never."""
        records = []
        for position, group in enumerate(self.param_groups):
            if not layout.has_projector(group):
                continue
            for name, p in zip(groups.names_of(group, position), group["params"], strict=True):
                schedule = self.state[p]["schedule"]
                rank, shape = layout.rank_of(group, p), tuple(p.shape)
                records.append(
                    record_of(Schedule.from_tensor(schedule), name, shape, side_of(shape), rank, seconds_of(schedule))
                )
        return records

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a saved state into this one's tensors; raises ValueError, and changes nothing, where they do not fit."""
        with hooks.around_loading(self, state_dict) as to_load:
            checkpoint.load_optimizer(self, to_load)

    # -- the step ----------------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; traceable, unlike the inherited one."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad = torch.zeros_like(parameter.grad)

    @partial(hooks.hooked, depth=0)
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_placement(self.param_groups, self.state)
        with torch.no_grad():
            pending = self._project_all()
            if pending:
                self._update_all(pending)
            elif torch.compiler.is_dynamo_compiling():
                _refuse_to_trace_nothing()
        return loss

    # LRScheduler asks for it to tell whether a step came before its own first one.  It cannot be set in ``step``, since
    # Dynamo drops assignments to an optimizer's attributes.
    _opt_called = True
    _step_depth = 0  # see hooks.py

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "step" in vars(cls):
            cls._step_depth += 1
            cls.step = hooks.hooked(cls.step, cls._step_depth)  # type: ignore[method-assign]

    def _project_all(self) -> list[_Pending]:
        """Phase one: every gradient, as small as it gets."""
        for index, group in enumerate(self.param_groups):
            groups.check_gradients(group, index)
        pending = []
        position = -1
        for group in self.param_groups:
            for p in group["params"]:
                position += 1
                if p.grad is None:
                    continue
                state = self.state[p]
                low = self._project(p, group, state, position) if "rank" in group else p.grad
                across = None
                if group.rule is not None and group.rule.sketches:
                    side = other_side(side_of(p.shape))
                    across = project(p.grad, _drawn(p, group, state, position, side), side)
                pending.append(_Pending(p, group, state, position, low, across))
        return pending

    def _project(self, p: Tensor, group: Group, state: dict[str, Tensor], position: int) -> Tensor:
        """R in the gradient's dtype, after the refresh if one is due: the GEMM runs in that dtype, and all R of a step
        wait for the last one's norm (6 GiB in float32 at 7B)."""
        assert p.grad is not None
        assert group.rule is not None
        if not layout.projects(group):
            return p.grad
        if group.rule.drawn:
            side = side_of(p.shape)
            return project(p.grad, _drawn(p, group, state, position, side), side)
        projector = layout.projector(p, group, state, p.grad.dtype)
        low = project(p.grad, projector, side_of(p.shape))
        refresh_(
            low, layout.parts_in(state, group.formats), state["schedule"], [p.grad],
            shape=p.shape, rank=layout.rank_of(group, p), form=group.formats.projector,
            method=group["refresh"], power_iterations=group["power_iterations"], rule=group.numbers.rule,
            seed=group["seed"], param=position, moments=groups.moments_that_follow(group, state, group.numbers.betas),
        )  # fmt: skip
        return low

    def _update_all(self, pending: list[_Pending]) -> None:
        """Phase two: clip, decide what may be written, update."""
        each = [_norm_op(item.low) if stay() else _norm(item.low) for item in pending]
        norms = torch.stack(each)
        # of the norm, not of the elements: where a square overflows, the second moment would
        finite = torch.isfinite(norms)
        all_finite = finite.all()
        if self.nonfinite == "skip_parameter":
            norms = torch.where(finite, norms, 0.0)
        norm = torch.linalg.vector_norm(norms)
        self.last_grad_norm.copy_(norm)
        self.skipped_steps.add_(~all_finite)
        clip = None
        if self._limit is not None:
            clip = (self._limit * (norm + 1e-6).reciprocal()).clamp(max=1.0)
        for item, own in zip(pending, each, strict=True):
            # of its own norm, not of the stacked ones: a compiled update need then not wait for the others
            _update(item, clip, torch.isfinite(own) if self.nonfinite == "skip_parameter" else all_finite)


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float32)
    return norm


_norm_op = composite("norm(Tensor x) -> Tensor", lambda x: x.new_empty((), dtype=torch.float32))(_norm)


def _refuse_to_trace_nothing() -> None:
    from qgalore_compile.optim.no_gradient import NoGradientError

    raise NoGradientError(
        "opt.step() finds no gradient in the step that is being compiled, so the compiled step would train nothing. "
        "Call loss.backward() before it, in the same function, on a loss that depends on this optimizer's parameters "
        "(requires_grad, not detached); a step without gradients on purpose runs uncompiled"
    )


# Called while Dynamo traces, not put into the graph: what torch._dynamo.assume_constant_result does, which would load
# Dynamo with the optimizer.
_refuse_to_trace_nothing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _update(item: _Pending, clip: Tensor | None, ok: Tensor) -> None:
    """Steps 4 to 6 for one parameter; where ``ok`` is False every store writes what was there."""
    p, group, state, position, low, across = item
    grad = low.to(torch.float32)
    across = None if across is None else across.to(torch.float32)
    if clip is not None:
        grad = grad * clip
        across = None if across is None else across * clip
    step = state["step"] + 1
    formats = group.formats.moments_of(group, p)
    noise = None
    if formats.rounds and group["rounding"] == "stochastic":
        # along the flattened tensor, as moments are; a stream beside the weight's
        noise = random_bits((grad.numel(),), seed=group["seed"], step=step, param=position | MOMENT_STREAM).view(
            grad.shape
        )
    moments = RuleState(group, p.shape, state, formats, noise, step, ok, low.dtype, across)
    rule = group.rule
    update = moments.adam(grad) if rule is None else _whole(rule.step(grad, moments), item, clip, moments)
    # a graph is of every number
    decays = torch.compiler.is_dynamo_compiling() or group["weight_decay"] != 0
    noise = None
    if group["rounding"] == "stochastic" and (isinstance(p, QuantizedWeight) or p.dtype in rounding.DTYPES):
        noise = _draws(p, group, step, position)
    descend_(p, update, group["lr"], group.numbers.weight_decay if decays else None, noise, ok)
    state["step"].copy_(torch.where(ok, step, state["step"]))


def _whole(written: Written, item: _Pending, clip: Tensor | None, moments: RuleState) -> Tensor:
    """U: what a rule says is to be written, in the weight's shape.  The GEMM runs in the gradient's dtype again."""
    p, group, state, position, *_ = item
    assert p.grad is not None
    assert group.rule is not None
    update: Tensor | None = None
    if written.low is not None:
        back = written.low
        if layout.projects(group):
            projector = layout.projector(p, group, state, p.grad.dtype)
            back = project_back(back.to(p.grad.dtype), projector, side_of(p.shape))
        update = group.numbers.scale * back.to(torch.float32)
    if written.scales is not None:
        gradient = p.grad.to(torch.float32)
        if group.rule.whole:
            gradient = gradient if clip is None else gradient * clip
            form, noise = group.formats.momenta[layout.width_of(p)], None
            if group["rounding"] == "stochastic" and form.rounds:
                noise = random_bits(p.shape, seed=group["seed"], step=moments.step, param=position | MOMENT_STREAM)
            scaled = moments.whole(gradient, form, layout.momentum_names(form), noise) * written.scales
        else:
            scaled = gradient * (written.scales if clip is None else written.scales * clip)
        update = scaled if update is None else update + scaled
    if update is None:
        raise ValueError(f"rule {group['rule']!r} writes nothing: its step must give low, scales, or both")
    return update


def _drawn(p: Tensor, group: Group, state: dict[str, Tensor], position: int, side: Side) -> Tensor:
    """A projector for a side, of entries ±1/√r: a sign for each bit that is drawn, others every ``update_proj_gap``
    steps, or in every step for sketches, where what is off in one should not be so in the next."""
    assert p.grad is not None
    assert group.rule is not None
    m, n = p.shape
    rank = layout.rank_of(group, p)
    rows, columns = (rank, n) if side == "right" else (m, rank)
    turn = state["step"] if group.rule.sketches else state["step"] // group["update_proj_gap"]
    stream = PROJECTOR_STREAM if side == side_of(p.shape) else PROJECTOR_STREAM | MOMENT_STREAM
    words = random_bits((rows, -(-columns // 16)), seed=group["seed"], step=turn, param=position | stream)
    places = torch.arange(16, dtype=torch.int32, device=p.device)
    bits = ((words.unsqueeze(-1) >> places) & 1).view(rows, -1)[:, :columns]
    signs: Tensor = 1 - 2 * bits
    return signs.to(p.grad.dtype).div(rank**0.5)


def _draws(p: Tensor, group: dict[str, Any], step: Tensor, position: int) -> Tensor:
    """16 random bits for each element of a weight.  Those of a weight that is updated at full rank lie along the
    flattened tensor, as its moments do: of rows as short as a convolution's most draws would be left over."""
    shape = p.shape if "rank" in group or isinstance(p, QuantizedWeight) else (p.numel(),)
    return random_bits(shape, seed=group["seed"], step=step, param=position).view(p.shape)
