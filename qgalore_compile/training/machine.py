"""Whether this machine can do a run at all: the device is there, and what is certainly needed fits into its memory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil
import torch

from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.llama import Llama
from qgalore_compile.words import first_line


def check_device(name: str) -> torch.device:
    """The device called ``name``; ValueError unless tensors can be made, and read, there."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # RuntimeError, AssertionError or NotImplementedError, as the device's code sees fit
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        have = ", ".join(["cpu", *(f"cuda:{index}" for index in range(gpus))])
        raise ValueError(f"--device {name}: {first_line(error)}; this machine has {have}") from error
    return device


def memory_of(device: torch.device) -> int:
    """Bytes that a process can have there at most, used or not; for the CPU a container's limit counts."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = int(psutil.virtual_memory().total)
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max": no limit
            total = min(total, int(Path(limit).read_text()))
    return total


def least_bytes(config: TrainConfig) -> int:
    """What a step certainly needs: weights as they are drawn, AdamW's moments, and of a micro-batch the residual stream
    that every layer keeps for its backward, and the logits.  A real one needs some times as much."""
    with torch.device("meta"):
        model = Llama(config.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    width: int = getattr(torch, config.dtype).itemsize
    drawn = 4 if torch.device(config.device).type == "cpu" else width
    each = drawn + (2 * width if config.optimizer == "adamw" else 0)
    tokens = config.batch * config.seq
    kept = config.model.num_layers * config.model.hidden_size + config.vocab_size
    needed: int = parameters * each + tokens * (kept * width + 16 * config.accumulate)
    return needed


def check_memory(config: TrainConfig, device: torch.device) -> None:
    """ValueError where :func:`least_bytes` is more than the device has."""
    needed, there = least_bytes(config), memory_of(device)
    if needed > there:
        raise ValueError(
            f"this run needs at least {needed / 1e9:,.1f} GB, and {device} has {there / 1e9:,.1f}: --preset "
            f"{config.preset} with --vocab-size {config.vocab_size}, --batch {config.batch}, --seq {config.seq}, "
            f"--accumulate {config.accumulate}; make one of them smaller"
        )
