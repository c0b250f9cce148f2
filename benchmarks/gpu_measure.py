"""What `gpu.py` measures with: a table of results, a clock for cold caches, ceilings, and kernels by name."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from common import interleaved, machine, spread
from torch._inductor import config as inductor_config
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from qgalore_compile.kernels.triton import kernels as triton_kernels
from qgalore_compile.kernels.triton.gemm import Product
from qgalore_compile.kernels.triton.kernels import Kernel
from qgalore_compile.kernels.triton.targets import Target, UnknownTargetError

_CLOCK_HZ = 2e9  # no GPU's is much higher: waits of so many cycles are not shorter than was asked for
_LONGEST_WAIT_S = 0.2


# -- results ----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One figure: of what, on which side, in which unit; `low` and `high` are the deciles, or the limits allowed."""

    section: str
    what: str
    side: str
    value: float | int | str
    unit: str
    low: float | None = None
    high: float | None = None


class Results:
    """All rows of a run, written anew after each section, so that a run that is cut short leaves what it found."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[Row] = []

    def add(self, section: str, what: str, side: str, value: float | int | str, unit: str = "") -> None:
        self.rows.append(Row(section, what, side, value, unit))

    def spread(self, section: str, what: str, side: str, values: Sequence[float], unit: str) -> dict[str, float]:
        """Median and deciles of a figure's rounds; returned too."""
        found = spread(list(values) if len(values) > 1 else 2 * list(values))
        self.rows.append(Row(section, what, side, found["median"], unit, found["p10"], found["p90"]))
        return found

    def write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Row._fields)
            for row in self.rows:
                writer.writerow([f"{each:.6g}" if isinstance(each, float) else each for each in row])


def facts(device: torch.device) -> dict[str, str]:
    """What the figures depend on beside the code."""
    found = {"device": device_name(device), **machine(), "triton": triton.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["runtime"] = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        found["driver"] = _driver()
        found["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        found["multiprocessors"] = str(properties.multi_processor_count)
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def slug(name: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return found[0] if found else "unknown"


# -- time -------------------------------------------------------------------------------------------------------------


class Times(NamedTuple):
    """Milliseconds by round: `device`, what a GPU worked, and `host`, until the call returned."""

    device: list[float]
    host: list[float]


class Clock:
    """Times calls with a cold L2 cache.

    On a GPU a kernel that only waits runs before each call, for longer than the host needs to queue the call: what the
    events then measure is the GPU's work alone, and the host's share is told apart.  A call that synchronises shows
    its gaps.  On a CPU both are the same time, and no cache is flushed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.scratch: torch.Tensor | None = None
        if device.type == "cuda":
            cached = torch.cuda.get_device_properties(device).L2_cache_size
            self.scratch = torch.empty(max(4 * cached, 256 << 20), dtype=torch.uint8, device=device)

    def flush(self) -> None:
        """Replace what the L2 cache holds."""
        if self.scratch is not None:
            self.scratch.zero_()

    def once(self, call: Callable[[], Any], expected_host_ms: float) -> tuple[float, float]:
        """(the device's ms, the host's ms) of one call, which the host is expected to queue in so long."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            call()
            passed = 1e3 * (time.perf_counter() - started)
            return passed, passed
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.flush()
        torch.cuda._sleep(int(_CLOCK_HZ * min(_LONGEST_WAIT_S, 2e-4 + 2e-3 * expected_host_ms)))
        start.record()
        started = time.perf_counter()
        call()
        host = 1e3 * (time.perf_counter() - started)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), host

    def rounds(self, sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Times]:
        """Each side once a round, the first rounds dropped."""
        hosts = dict.fromkeys(sides, 1.0)

        def measure(name: str, _: int) -> tuple[float, float]:
            device, hosts[name] = self.once(sides[name], hosts[name])
            return device, hosts[name]

        found = interleaved({name: partial(measure, name) for name in sides}, rounds)
        return {name: Times([d for d, _ in values], [h for _, h in values]) for name, values in found.items()}


# -- ceilings ---------------------------------------------------------------------------------------------------------


class Ceiling(NamedTuple):
    """`unit` a second, measured by round, and the peak of the chip's data sheet where the chip is known."""

    values: list[float]
    unit: str
    peak: float | None


def ceilings(clock: Clock, chip: Target | None, rounds: int, *, quick: bool) -> dict[str, Ceiling]:
    """What copies and products of this device reach: "copy" in bytes read and written, the others in operations."""
    device = clock.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 << 30
    count = 1 << 20 if quick else min(1 << 29, free // 16)
    copied = [4e3 * count / ms for ms in _copies(clock, count, rounds)]
    found = {"copy": Ceiling(copied, "bytes/s", chip and chip.dram_bytes_per_second)}
    size = 256 if quick else 8192 if free > 4 << 30 else 4096
    before = torch.get_float32_matmul_precision()
    for name, dtype, precision, peak in (
        ("bf16", torch.bfloat16, before, chip and chip.bf16_flops),
        ("tf32", torch.float32, "high", chip and chip.tf32_flops),
        ("fp32", torch.float32, "highest", chip and chip.fp32_flops),
    ):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        torch.set_float32_matmul_precision(precision)
        try:
            times = clock.rounds({name: lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, rounds)[name].device
        finally:
            torch.set_float32_matmul_precision(before)
        found[name] = Ceiling([2e3 * size**3 / ms for ms in times], "operations/s", peak)
    return found


def _copies(clock: Clock, count: int, rounds: int) -> list[float]:
    """Milliseconds of copying so many bfloat16 numbers."""
    source = torch.ones(count, dtype=torch.bfloat16, device=clock.device)
    target = torch.empty_like(source)
    return clock.rounds({"copy": lambda: target.copy_(source)}, rounds)["copy"].device


def chip_of(device: torch.device) -> Target | None:
    """The data sheet that kernels for a device are made by; None for a CPU and for chips that nothing is known of."""
    if device.type != "cuda":
        return None
    try:
        return triton_kernels.target_of(device)
    except UnknownTargetError:
        return None


def as_measured(chip: Target, found: dict[str, Ceiling]) -> Target:
    """A chip with the measured ceilings in place of the data sheet's, which no kernel reaches."""
    rates = {name: median(each.values) for name, each in found.items()}
    flops = {f"{name}_flops": rates[name] for name in ("bf16", "tf32", "fp32")}
    return replace(chip, dram_bytes_per_second=rates["copy"], **flops)


# -- kernels ----------------------------------------------------------------------------------------------------------


@contextmanager
def watched() -> Iterator[dict[str, Kernel]]:
    """The generated kernels of what is compiled meanwhile from an empty cache, by the names that profiles show."""
    called: dict[int, Kernel] = {}
    found: dict[str, Kernel] = {}
    tune, define = triton_kernels.called, PythonWrapperCodegen.define_user_defined_triton_kernel

    def remember(kernel: Kernel) -> Any:
        called[id(triton_kernels.load(kernel))] = kernel
        return tune(kernel)

    def name(self: Any, kernel: Any, *args: Any, **keys: Any) -> Any:
        result = define(self, kernel, *args, **keys)
        if id(kernel) in called:
            found[result[0]] = called[id(kernel)]
        return result

    with (
        mock.patch.object(triton_kernels, "called", remember),
        mock.patch.object(PythonWrapperCodegen, "define_user_defined_triton_kernel", name),
        inductor_config.patch({"triton.unique_user_kernel_names": True}),
    ):
        yield found


def writes_back(kernel: Kernel) -> bool:
    """Whether it is a product with an epilogue: an update's last kernel."""
    return isinstance(kernel.work, Product) and kernel.work.program.epilogue is not None


def launches(
    step: Callable[[], Any], repeats: int, before: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Microseconds of each launch of each kernel in `repeats` calls of a step, those of `before` each call included."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            before()
            step()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    return found
