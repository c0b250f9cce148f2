"""One run of the study of quality, in a process of its own: its peak of memory and its compiled code are its own.

    .venv/bin/python benchmarks/quality_run.py --scale tiny --case qgalore --lr 0.02 --seed 0

Steps of this project's optimizer are one graph each (backend "qgalore"); with the other optimizers forward and backward
are compiled (Inductor) and the step is eager: galore-torch's SVD and Python state do not trace, and torch's AdamW is
fused.  A run that was cut off goes on from its checkpoint, at most CHECKPOINT_SECONDS old; the result is written whole
or not at all.

A seed stands for weights and batches.  The seed of stochastic rounding is always 0: it is a constant of the compiled
code, which runs of one case then share.
"""

from __future__ import annotations

import math
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from common import RESULTS, machine, write_result
from quality_plan import CASES, NANO, SCALES, RunSpec
from torch import Tensor, nn
from torch.optim import Optimizer

import qgalore_compile as qg
from qgalore_compile.optim.adamw import QGaLoreAdamW
from qgalore_compile.training.checkpoint_file import save_checkpoint
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.data import Corpus, load_corpus
from qgalore_compile.training.llama import PRESETS, Llama
from qgalore_compile.training.run import Run, evaluate, make_model
from qgalore_compile.training.telemetry import finite, resident_bytes
from qgalore_compile.weights import select_linears

FOLDER = RESULTS / "quality"
WORK = Path(__file__).parents[1] / "runs" / "quality"
CHECKPOINT_SECONDS = 60


@dataclass
class Measured:
    """What a run has come to so far; it goes with the checkpoint.

    Attributes:
        step_seconds: of each step but a process's first one, which compiles; evaluations apart.
        refresh_seconds, refreshes: in refreshes of subspaces, those of first steps included, and how many.  Of this
            project's optimizer the seconds count stand-ins and looks at the energy too, the number does not.
        first_refresh_seconds: of those, in first steps, which `step_seconds` leaves out.
        curve: (steps done, held-out loss) of each evaluation.
        compile_seconds, wall_seconds: first steps of all processes; everything from the model to the last evaluation.
        peak_rss, peak_rss_steps: most resident memory of a process, bytes; and after its first step, without what
            compiling took and gave back (0 where the system cannot tell).
        processes: that took part.
    """

    step_seconds: list[float] = field(default_factory=list)
    refresh_seconds: float = 0.0
    first_refresh_seconds: float = 0.0
    refreshes: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)
    compile_seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_rss: int = 0
    peak_rss_steps: int = 0
    processes: int = 0


# -- what is trained ---------------------------------------------------------------------------------------------------


def config_of(spec: RunSpec) -> TrainConfig:
    """The settings of the run, as far as `TrainConfig` knows them."""
    scale, case = spec.scale, spec.case
    ours = case.optimizer == "qgalore"
    kind = ("qgalore" if case.int8 else "galore") if ours else "adamw"
    return TrainConfig.from_preset(
        scale.preset,
        optimizer=kind,
        device=scale.device,
        backend=("qgalore" if ours else "inductor") if scale.compiled else "eager",
        steps=scale.steps,
        batch=scale.batch,
        seq=scale.seq,
        update_proj_gap=scale.gap,
        rank=spec.rank,
        lr=spec.lr,
        seed=spec.seed,
        eval_every=math.ceil(scale.steps / scale.evaluations),
        eval_tokens=scale.curve_tokens,
    )


def make_optimizer(model: nn.Module, spec: RunSpec) -> Optimizer:
    """The case's optimizer over all parameters; betas (0.9, 0.999), eps 1e-8, no decay, for all alike."""
    case = spec.case
    if case.optimizer == "qgalore":
        groups = qg.param_groups(model, rank=spec.rank, **spec.keys)
        return QGaLoreAdamW(groups, lr=spec.lr, moments=case.moments)
    blocks = [linear.weight for _, linear in select_linears(model)]
    inside = {id(weight) for weight in blocks}
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    if case.optimizer == "galore-torch":
        from galore_torch import GaLoreAdamW

        groups = [{"params": blocks, "rank": spec.rank, **spec.keys}, {"params": others}]
        return GaLoreAdamW(groups, lr=spec.lr, eps=1e-8, no_deprecation_warning=True)
    scale = spec.keys.get("scale", 1.0)
    return torch.optim.AdamW(
        [{"params": blocks, "lr": spec.lr * scale}, {"params": others}], lr=spec.lr, weight_decay=0.0, fused=True
    )


# -- what is measured --------------------------------------------------------------------------------------------------


@contextmanager
def timed_refreshes(measured: Measured) -> Iterator[None]:
    """Count and time refreshes of galore-torch."""
    if "galore_torch" not in sys.modules:
        yield
        return
    from galore_torch.galore_projector import GaLoreProjector

    def theirs(decompose: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        _wait()
        started = time.perf_counter()
        found = decompose(*args, **kwargs)
        _wait()
        measured.refreshes += 1
        measured.refresh_seconds += time.perf_counter() - started
        return found

    timed = partialmethod(partial(theirs, GaLoreProjector.get_orthogonal_matrix))
    with mock.patch.object(GaLoreProjector, "get_orthogonal_matrix", timed):
        yield


def _wait() -> None:
    """For the device, so that a time is of what was asked for in it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def told_refreshes(measured: Measured, optimizer: Optimizer, earlier: float) -> None:
    """Take the refreshes of this project's optimizer from its schedule; ``earlier``: seconds in other processes."""
    if isinstance(optimizer, QGaLoreAdamW):
        records = optimizer.schedule()
        measured.refreshes = sum(record.refreshes for record in records)
        measured.refresh_seconds = earlier + sum(record.seconds for record in records)


def live_bytes(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Bytes of the weights and of the optimizer's state, which live between steps."""
    weights = sum(_bytes(parameter) for parameter in model.parameters())
    return {"weights": weights, "state": sum(_bytes(state) for state in optimizer.state.values())}


def _bytes(value: Any) -> int:
    if isinstance(value, qg.Int8Weight):
        return _bytes([value.codes, value.scale, value.offset])
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_bytes, value))
    return _bytes(vars(value)) if hasattr(value, "__dict__") else 0  # galore-torch's projector is an object


def restart_peak() -> bool:
    """Forget the process's peak of resident memory; False where the system cannot (it is Linux's)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_since_restart() -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# -- the run -----------------------------------------------------------------------------------------------------------


def train(spec: RunSpec, corpus: Corpus, *, folder: Path, work: Path) -> Path:
    """Train, and write the result into `folder`; `work` holds the checkpoint in between.  Returns the result's file."""
    if spec.case.optimizer == "galore-torch":
        import galore_torch  # noqa: F401  # it brings transformers along, which is no memory of the run's
    started, before = time.perf_counter(), resident_bytes()
    config = config_of(spec)
    model: Llama = make_model(config)
    run = Run(config, corpus, (model, make_optimizer(model, spec)))
    checkpoint = work / f"{spec.name}.pt"
    measured = _resume(run, spec, checkpoint)
    earlier, measured.processes = measured.wall_seconds, measured.processes + 1
    refreshing = measured.refresh_seconds
    peak, can_restart, saved = 0, False, time.perf_counter()
    with timed_refreshes(measured):
        while run.step < config.steps:
            first = not run.started
            record = run.advance()
            if first:
                told_refreshes(measured, run.optimizer, refreshing)
                measured.first_refresh_seconds += measured.refresh_seconds - refreshing
                measured.compile_seconds += run.compile_seconds
                peak, can_restart = _peak(), restart_peak()
            else:
                measured.step_seconds.append(config.tokens_per_step / record.tokens_per_second)
            if record.val_loss is not None:
                measured.curve.append((record.step, record.val_loss))
            if time.perf_counter() - saved > CHECKPOINT_SECONDS:
                measured.wall_seconds = earlier + time.perf_counter() - started
                told_refreshes(measured, run.optimizer, refreshing)
                state = {"settings": spec.settings(), "run": run.state_dict(), "measured": asdict(measured)}
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                save_checkpoint(checkpoint, state)
                saved = time.perf_counter()
    told_refreshes(measured, run.optimizer, refreshing)
    if can_restart:
        measured.peak_rss_steps = max(measured.peak_rss_steps, peak_since_restart())
    measured.peak_rss = max(measured.peak_rss, peak, _peak())
    loss = evaluate(model, corpus.validation, replace(config, eval_tokens=spec.scale.final_tokens))
    measured.wall_seconds = earlier + time.perf_counter() - started
    result = _result(spec, run, measured, loss, before)
    path = folder / f"{spec.name}.json"
    write_result(path, result, indent=1)
    checkpoint.unlink(missing_ok=True)
    return path


def _resume(run: Run, spec: RunSpec, checkpoint: Path) -> Measured:
    if not checkpoint.exists():
        return Measured()
    classes = []
    if spec.case.optimizer == "galore-torch":
        from galore_torch.galore_projector import GaLoreProjector

        classes = [GaLoreProjector]
    with torch.serialization.safe_globals(classes):
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if saved["settings"] != spec.settings():
        return Measured()
    run.load_state_dict(saved["run"])
    return Measured(**saved["measured"])


def _peak() -> int:
    """Most resident memory of the process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _result(spec: RunSpec, run: Run, measured: Measured, loss: float, before: int) -> dict[str, Any]:
    seconds = measured.step_seconds
    training = sum(seconds) + measured.first_refresh_seconds  # the other refreshes are within the steps
    tokens = run.config.tokens_per_step
    command = ["benchmarks/quality_run.py", "--scale", spec.scale.name, "--case", spec.case.name]
    refreshes = measured.refreshes
    result = {
        "name": spec.name,
        "scale": spec.scale.name,
        "case": spec.case.name,
        "title": spec.case.title,
        "lr": spec.lr,
        "seed": spec.seed,
        "val_loss": loss,
        "curve": [[step, finite({"loss": value})["loss"]] for step, value in measured.curve],
        "refreshes": refreshes,
        "refreshes_a_weight": refreshes / max(1, len(select_linears(run.model))),
        "refresh_seconds": measured.refresh_seconds,
        "refresh_share": measured.refresh_seconds / training if training else 0.0,
        "tokens_per_second": tokens * len(seconds) / sum(seconds),
        "median_step_ms": 1e3 * statistics.median(seconds),
        "rss_before": before,
        "peak_rss": measured.peak_rss,
        "peak_rss_steps": measured.peak_rss_steps or None,
        "peak_device": torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None,
        "live_bytes": live_bytes(run.model, run.optimizer),
        "graphs": run.graphs,
        "compile_seconds": measured.compile_seconds,
        "wall_seconds": measured.wall_seconds,
        "processes": measured.processes,
        "skipped_steps": run.skipped_steps,
        "settings": spec.settings(),
        "machine": machine(),
        "command": shlex.join([*command, "--lr", f"{spec.lr:g}", "--seed", str(spec.seed)]),
    }
    return finite(result)


def main(
    case: Annotated[str, typer.Option(help=f"One of {', '.join(CASES)}.")],
    lr: Annotated[float, typer.Option(help="Peak learning rate.")],
    scale: Annotated[str, typer.Option(help=f"One of {', '.join(SCALES)}.")] = "tiny",
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
    folder: Annotated[Path, typer.Option(help="Of the result.")] = FOLDER,
    work: Annotated[Path, typer.Option(help="Of the checkpoint.")] = WORK,
) -> None:
    PRESETS.setdefault("nano", NANO)
    train(RunSpec(SCALES[scale], CASES[case], lr, seed), load_corpus(), folder=folder, work=work)


if __name__ == "__main__":
    typer.run(main)
