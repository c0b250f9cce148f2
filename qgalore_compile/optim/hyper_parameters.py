"""A parameter group whose numbers may be set between steps: checked when they are set, and read as tensors by a step.

A compiled step is valid for the Python numbers that it was traced with, so a number in a group that it read would have
it compiled again whenever that changes.  It reads ``group.numbers`` instead: 0-d tensors, written when a key is set,
computed in Python's double precision and rounded once.  They are on the CPU wherever parameters are: a GPU's kernels
take them as arguments.  What a user reads in the group stays the number that was set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from itertools import islice
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from qgalore_compile.optim import checks, groups, settings
from qgalore_compile.optim.layout import GroupFormats, rank_of, texts, width_of
from qgalore_compile.optim.rules.base import Rule as UpdateRule
from qgalore_compile.optim.rules.registry import is_own, rule_of
from qgalore_compile.subspace.moments import least_root
from qgalore_compile.subspace.scheduler import Rule

FIXED = settings.fixed()
"""Keys that the layout of state, or the slots in its schedules, follow from."""


class Numbers(NamedTuple):
    """A group's numbers as a step reads them: 0-d float32, but ``rule`` and ``betas``, which the refresh op reads.

    Attributes:
        beta1, rest1, log1: β1, 1 - β1, ln β1; likewise of β2.
        least_root: κ of :mod:`qgalore_compile.subspace.moments`.
        eps, scale, weight_decay: as the keys.
        betas: float64 (2,).
        rule: float64, a ``Rule`` (:meth:`~qgalore_compile.subspace.scheduler.Rule.to_tensor`); of a group that is not
            projected, zeros.
    """

    beta1: Tensor
    rest1: Tensor
    log1: Tensor
    beta2: Tensor
    rest2: Tensor
    log2: Tensor
    least_root: Tensor
    eps: Tensor
    scale: Tensor
    weight_decay: Tensor
    betas: Tensor
    rule: Tensor

    @classmethod
    def zeros(cls) -> Numbers:
        """Of no group yet."""
        number = partial(torch.zeros, (), dtype=torch.float32, device="cpu")
        wide = partial(torch.zeros, dtype=torch.float64, device="cpu")
        return cls._make([*(number() for _ in cls._fields[:-2]), wide((2,)), wide((len(Rule._fields),))])

    def write_(self, group: Mapping[str, Any]) -> None:
        """Write what a checked group says, in place."""
        values: list[float] = []
        for beta in group["betas"]:
            values += [beta, 1 - beta, math.log(beta) if beta > 0 else -math.inf]
        values += [least_root(group["betas"]), group["eps"], group.get("scale", 0.0), group["weight_decay"]]
        with torch.no_grad():
            for tensor, value in zip(self, values, strict=False):
                tensor.fill_(float(value))
            self.betas.copy_(torch.tensor([float(beta) for beta in group["betas"]], dtype=torch.float64, device="cpu"))
            if "rank" in group:
                self.rule.copy_(groups.refresh_rule(group).to_tensor())


def adopted(given: list[Any], make: Callable[[dict[str, Any]], Group]) -> list[Any]:
    """The same list, what are plain dicts in it replaced by what ``make`` makes of them."""
    given[:] = [group if isinstance(group, Group) else make(group) for group in given]
    return given


class Group(dict[str, Any]):
    """A parameter group: a dict that checks what is set in it.

    Whatever sets keys (``group[key] = value``, ``update``, ``setdefault``, ``|=``) raises ValueError, and changes
    nothing, for a key that no group knows, a value that cannot be, or one of ``FIXED`` that differs.  ``lr`` stays
    one tensor, which a number that is set is written to.
    """

    numbers: Numbers
    formats: GroupFormats
    rule: UpdateRule | None
    """None in a group that is not projected."""
    is_known: bool
    """Whether the rule is one of this package's, whose code is known by its name."""

    def __init__(self, checked: Mapping[str, Any]) -> None:
        super().__init__(texts(dict(checked)))
        # a clone a group: one shared tensor would be scheduled once a group
        super().__setitem__("lr", _own_tensor(self["lr"]))
        self._derive()

    @classmethod
    def restored(cls, values: dict[str, Any]) -> Group:
        """Of a copy or a pickle: with the very tensors in ``values``."""
        group = cls.__new__(cls)
        dict.update(group, values)
        group._derive()
        return group

    def _derive(self) -> None:
        """What a step reads in place of the keys."""
        self.numbers = Numbers.zeros()
        self.numbers.write_(self)
        self.formats = GroupFormats.of(self, set(map(width_of, self["params"])))
        self.rule = rule_of(self["rule"]) if "rank" in self else None
        self.is_known = self.rule is None or is_own(self.rule)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Group.restored, (dict(self),)

    def load(self, values: Mapping[str, Any]) -> None:
        """Take settings over that came with a state, as that was laid out."""
        self._set(values, fixed=())

    # -- what a dict offers to change it ------------------------------------------------------------------------------

    def __setitem__(self, key: str, value: Any) -> None:
        self._set({key: value})

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set several keys, checked together: all of them or none."""
        self._set(dict(*args, **kwargs))

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As a dict's."""
        if key not in self:
            self._set({key: default})
        return self[key]

    def __ior__(self, other: Any) -> Group:  # type: ignore[override,misc]
        self.update(other)
        return self

    def __delitem__(self, key: str) -> None:
        if key in self and key not in checks.SCHEDULERS_KEYS:
            self._refuse_to_remove(key)
        super().__delitem__(key)

    def pop(self, key: str, *default: Any) -> Any:
        """As a dict's, for what schedulers have written; ValueError for what a step reads."""
        if key in self and key not in checks.SCHEDULERS_KEYS:
            self._refuse_to_remove(key)
        return super().pop(key, *default)

    def popitem(self) -> NoReturn:
        """Refused."""
        self._refuse_to_remove(next(reversed(self)))

    def clear(self) -> None:
        """Refused."""
        self._refuse_to_remove(next(iter(self)))

    def _refuse_to_remove(self, key: str) -> NoReturn:
        raise ValueError(f"{self._where()}: {key!r} cannot be removed, for every step reads it; set another value")

    # -- setting ------------------------------------------------------------------------------------------------------

    def _where(self) -> str:
        names = list(islice(groups.names_of(self, 0), 4)) if "param_names" in self else []
        named = f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""
        return f"parameter group{named}"

    def _set(self, values: Mapping[str, Any], fixed: Iterable[str] = FIXED) -> None:
        where = self._where()
        values = texts(dict(values))
        merged = {**self, **values}
        checks.check_keys(merged, where)
        checks.check_values(merged, where)
        for key in fixed:
            if key in values and key in self and values[key] != self[key] and not self._same(key, values[key]):
                raise ValueError(
                    f"{where}: {key} is {self[key]!r} and cannot become {values[key]!r}, for state was laid out by it "
                    "when the optimizer was built; build a new optimizer with the other value"
                )
        if "params" in values or "param_names" in values:
            self._check_parameters(merged, where)
        for key, value in values.items():
            if key == "lr":
                if value is not self["lr"]:
                    with torch.no_grad():
                        self["lr"].fill_(float(value))
            else:
                super().__setitem__(key, tuple(value) if key == "betas" else value)
        if not values.keys() <= {"lr", *checks.SCHEDULERS_KEYS}:
            self.numbers.write_(self)

    def _same(self, key: str, value: Any) -> bool:
        """Whether ranks above the smaller side are clipped to the same."""
        return key == "rank" and all(min(value, *p.shape) == rank_of(self, p) for p in self["params"])

    def _check_parameters(self, merged: Mapping[str, Any], where: str) -> None:
        known = {id(p) for p in self["params"]}
        if not all(id(p) in known for p in merged["params"]):
            raise ValueError(f"{where}: params holds a parameter that has no state here; use add_param_group")
        names = merged.get("param_names")
        if names is not None and len(names) != len(merged["params"]):
            raise ValueError(
                f"{where}: {len(names)} param_names for {len(merged['params'])} parameters; give one each, both in one "
                "update()"
            )


class MaxGradNorm:
    """``opt.max_grad_norm``: None, or a number that is checked when it is set.

    What is read is what was set.  A step reads ``opt._limit``: None, or a 0-d float32 tensor that a number is written
    to.  To go from None to a number, or back, is another graph.
    """

    KEPT = ("_max_grad_norm", "_limit")
    """Attributes of the optimizer that hold it."""

    def __get__(self, optimizer: Any, owner: Any = None) -> Any:
        return self if optimizer is None else optimizer.__dict__["_max_grad_norm"]

    def __set__(self, optimizer: Any, value: float | None) -> None:
        checks.check_max_grad_norm(value)
        limit = optimizer.__dict__.get("_limit")
        if value is None or limit is None:
            limit = None if value is None else torch.tensor(float(value), dtype=torch.float32, device="cpu")
        else:
            with torch.no_grad():
                limit.fill_(float(value))
        optimizer.__dict__.update(_max_grad_norm=value, _limit=limit)


def _own_tensor(lr: float | Tensor) -> Tensor:
    if isinstance(lr, Tensor):
        return lr.detach().to(torch.float32, copy=True).reshape(())
    return torch.tensor(float(lr), dtype=torch.float32, device="cpu")


def trace_groups() -> None:
    """Let Dynamo trace ``optimizer.param_groups`` of groups that are no plain dicts.

    Where it meets that attribute it reads every value of every group, to set a key "capturable" that this optimizer has
    not; with that it would both fail on these groups and take their numbers for constants.  Optimizers whose groups are
    plain dicts are left to it.
    """
    from qgalore_compile._torch import OptimizerVariable  # with Dynamo, which an optimizer's constructor loads anyway

    original = OptimizerVariable._set_capturable
    if getattr(original, "_knows_groups", False):
        return

    @wraps(original)
    def set_capturable(self: Any, tx: Any) -> None:
        if not any(isinstance(group, Group) for group in self.value.param_groups):
            original(self, tx)

    set_capturable._knows_groups = True  # type: ignore[attr-defined]
    OptimizerVariable._set_capturable = set_capturable  # type: ignore[method-assign]
