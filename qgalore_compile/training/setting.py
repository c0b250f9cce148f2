"""How a field of ``TrainConfig`` is declared, checked, and shown as an option of ``qgalore train``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from qgalore_compile.optim.settings import KEYS, REQUIRED, Key

LARGEST = 2**31 - 1
"""Of settings that are counts: batches count steps in 32 bits."""
_FLOAT32 = (2.0**-149, (2 - 2.0**-23) * 2.0**127)  # the least number above 0, and the largest

MODEL, STEP, OUTPUT = "Model and data", "Training step", "Run and output"
"""The panels of ``qgalore train --help``."""


@dataclass(frozen=True)
class Setting:
    """A field of ``TrainConfig``.

    Attributes:
        key: type, default, bounds and meaning; it may be narrower than that of a group.
        panel: of the help.
        switch: "--on/--off" of a bool, where it is not "--name/--no-name".
        otherwise: what a run has where the option is left out, if that is not the default; empty where the preset
            decides.
    """

    key: Key
    panel: str
    switch: str = ""
    otherwise: str = ""

    @property
    def help(self) -> str:
        """What the key means, and what is so by default."""
        return f"{self.key.help} [default: {self._shown}]" if self._shown else self.key.help

    @property
    def _shown(self) -> str:
        key = self.key
        if self.otherwise or key.unset or key.default is REQUIRED:
            return self.otherwise or key.unset
        if key.type is not bool:
            return f"{key.default:g}" if key.type is float else f"{key.default}"
        on, _, off = self.switch.partition("/")
        return (on if key.default else off).removeprefix("--")

    def problem(self, value: Any) -> str | None:
        """What follows the option in an error about ``value``; None for a value that can be.

        Counts must fit 32 bits, other numbers float32.

        Raises:
            TypeError: a number is none; the command line has seen to that.
        """
        key = self.key
        if key.check is not None or (value is None and key.unset):
            return key.problem(value)
        if key.choices:
            allowed = "" if value in key.choices else f"one of {', '.join(key.choices)}"
        elif key.type is int:
            least = key.least or 0
            allowed = f"at least {least}" if value < least else f"at most {LARGEST}" if value > LARGEST else ""
        elif key.type is float:
            allowed = _float32(key, value)
        else:
            allowed = "" if isinstance(value, key.type) else key.allowed
        return f"{value!r}: must be {allowed}" if allowed else None


def _float32(key: Key, value: float) -> str:
    """What a number may be, if it is not that; "" if it is."""
    if key.above is not None:
        least, words = max(key.above, _FLOAT32[0]), f"a number{key.bound}, in float32 too"
    else:
        least, words = -_FLOAT32[1] if key.least is None else key.least, f"a number{key.bound}"
    return "" if least <= value <= _FLOAT32[1] else words


def of_group(name: str, **narrower: Any) -> Any:
    """A field that is a key of parameter groups; ``narrower`` is what a run asks or says of it in another way."""
    return _declared(replace(KEYS[name], **narrower), STEP)


def of_run(
    panel: str, kind: type, default: Any, means: str, *, switch: str = "", otherwise: str = "", **more: Any
) -> Any:
    """A field of the run alone: its type, default (or REQUIRED), meaning, and ``more`` of what a ``Key`` may have."""
    return _declared(Key("", kind, default, help=means, **more), panel, switch, otherwise)


def _declared(key: Key, panel: str, switch: str = "", otherwise: str = "") -> Any:
    if key.type is bool and not switch:
        switch = f"{option(key.name)}/{option('no_' + key.name)}"
    default = {} if key.default is REQUIRED else {"default": key.default}
    return field(**default, metadata={"setting": Setting(key, panel, switch, otherwise)})


def option(name: str) -> str:
    """The command-line spelling of a field: ``update_proj_gap`` → ``--update-proj-gap``."""
    return "--" + name.replace("_", "-")
