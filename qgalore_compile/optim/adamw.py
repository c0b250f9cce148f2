"""``QGaLoreAdamW`` in plain PyTorch: the specification, with ``one_parameter.py``.  Every fused path is tested against
these two files.

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
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qgalore_compile.optim import checkpoint, checks, groups, hooks, layout, operators, settings
from qgalore_compile.optim.hyper_parameters import Group, MaxGradNorm, adopted, trace_groups
from qgalore_compile.optim.one_parameter import Parameter, Projected
from qgalore_compile.optim.placement import check_placement
from qgalore_compile.optim.settings import KEYS
from qgalore_compile.subspace.projection import side_of
from qgalore_compile.subspace.scheduler import Schedule, ScheduleRecord, record_of
from qgalore_compile.subspace.timing import seconds_of


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
        layers = groups.layer_numbers(self.param_groups)[position]
        for index, parameter in enumerate(group["params"]):
            slot = groups.slot_of(group, layers[index]) if "rank" in group else -1
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

    def _project_all(self) -> list[tuple[Parameter, Projected]]:
        """Phase one: every gradient, as small as it gets."""
        for index, group in enumerate(self.param_groups):
            groups.check_gradients(group, index)
        found = []
        position = -1
        for group in self.param_groups:
            told = operators.text_of(group)
            for p in group["params"]:
                position += 1
                if p.grad is not None:
                    parameter = Parameter(p, p.grad, group, self.state[p], position, told)
                    found.append((parameter, operators.project_(parameter)))
        return found

    def _update_all(self, pending: list[tuple[Parameter, Projected]]) -> None:
        """Phase two: clip, decide what may be written, update."""
        norms = torch.stack([projected.norm for _, projected in pending])
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
        for parameter, projected in pending:
            # of its own norm, not of the stacked ones: a compiled update need then not wait for the others
            ok = torch.isfinite(projected.norm) if self.nonfinite == "skip_parameter" else all_finite
            operators.update_(parameter, projected, clip, ok)


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
