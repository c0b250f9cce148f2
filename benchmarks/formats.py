"""What each format costs: errors of encoding, and the loss of `tiny` with it as weight, projector or moments.

    .venv/bin/python benchmarks/formats.py --list
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/formats.py                    # whatever is missing
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/formats.py --backwards        # beside it, on the other core
    .venv/bin/python benchmarks/formats.py --report

Errors are relative and of rounding to nearest, ‖decode(encode(x)) - x‖ / ‖x‖, on draws and on what 100 steps of
`tiny` in float32 end with: weights of the blocks, their projected gradients R, projectors, m and √v.

A run of the study has one format in one role, the default ones in the others: INT8 weights in groups of 256, INT4
projectors in groups of 256, moments in dynamic blocks of 8 bits.  Model, data, learning rates and first weights are
those of the preset's run with the same seed; the seed of stochastic rounding is the same in all.  Steps are eager: 300
of `tiny` take as long as compiling one, and a compiled step computes the same.  Moments of four and of eight bits are
compared over several seeds and all steps of the preset, and on `35m`.

Each result is kept in `runs/formats` as it comes; `--report` puts them together into `results/formats.json`, writes
the tables into `docs/formats.md` and draws `docs/images/formats.png`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from common import RESULTS, command, machine, write_result
from torch import Tensor

import qgalore_compile as qg
from qgalore_compile.formats import Format
from qgalore_compile.optim.adamw import QGaLoreAdamW
from qgalore_compile.subspace.moments import MomentFormats
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.data import Corpus, load_corpus, training_batch
from qgalore_compile.training.run import Run, evaluate, make_model

WORK = Path(__file__).parents[1] / "runs" / "formats"
RESULT = RESULTS / "formats.json"
DOCS = Path(__file__).parents[1] / "docs"
NEAREST = " nearest"
"""Behind moments that a step rounds to nearest, which no key asks for."""

# -- what is compared --------------------------------------------------------------------------------------------------

DEFAULTS = {"weight": "int8/256", "projector": "int4/256+planar", "moments": "8bit"}
STEPS, GAP = 100, 50
"""Of a run with one format in one role: short, and on a quarter of the preset's tokens a step, so that fifty runs take
a quarter of an hour of a core; with half its `update_proj_gap`, so that projectors are replaced on the way."""

FOUR_BITS = ("int4", "int4/64", "nf4", "e2m1", "nf4+double", "int4/64+pow2", "int4/64+rotated", "e3m0")
OTHERS = ("e4m3", "int6", "e2m3", "e5m2", "e3m2")
ROLES: dict[str, tuple[str, ...]] = {
    "weight": (*FOUR_BITS, *OTHERS),
    "projector": ("float32", "bfloat16", "int8", *FOUR_BITS[1:], "int4/64+pow2row", *OTHERS, "official8", "official4",
                  "dynamic8", "dynamic4"),
    "moments": ("4bit", f"4bit{NEAREST}", "32bit", "e4m3", "int8", "nf4", "e2m1", "int4", "bfloat16", *OTHERS[1:],
                "e5m2+pow2", "e3m0", "dynamic4"),
}  # fmt: skip
ENCODED = ("float32", "bfloat16", "int8", "dynamic8", "official8", "e4m3", "e4m3+pow2", "e5m2", "int6", "e2m3", "e3m2",
           *FOUR_BITS, "int4/64+pow2row", "nf4+pow2", "nf4+rotated", "dynamic4", "moment4", "official4")  # fmt: skip
"""What errors are measured of."""


@dataclass(frozen=True)
class Spec:
    """One run: a format in a role, "default" where all are the default ones.

    Attributes:
        preset, seed: of model and data.
        steps: of the run, over which learning rates follow the preset's schedule.
        gap: `update_proj_gap`.
        batch, seq: sequences of a step, and tokens of a sequence.
    """

    role: str
    text: str
    seed: int = 0
    preset: str = "tiny"
    steps: int = STEPS
    gap: int = GAP
    batch: int = 8
    seq: int = 64

    @property
    def name(self) -> str:
        text = self.text.replace("/", "_").replace(" ", "-")
        return f"{self.preset}-{self.steps}-{self.role}-{text}-{self.seed}"

    @property
    def final_tokens(self) -> int:
        """Held-out bytes that it is judged by."""
        return 65_536 if self.steps <= STEPS else 262_144


def plan() -> Iterator[Spec]:
    """All runs, those that tell most first."""
    tiny = TrainConfig.from_preset("tiny")
    for seed in range(3):
        for moments in ("8bit", "4bit", f"4bit{NEAREST}"):
            yield Spec("moments", moments, seed, "tiny", tiny.steps, tiny.update_proj_gap, tiny.batch, tiny.seq)
    for seed in range(3, 6):  # runs that differ in the last bits of a product end 0.02 apart
        for moments in ("8bit", "4bit"):
            yield Spec("moments", moments, seed, "tiny", tiny.steps, tiny.update_proj_gap, tiny.batch, tiny.seq)
    for seed in range(3):
        yield Spec("default", "default", seed)
    for texts in zip_longest(*ROLES.values()):
        for role, text in zip(ROLES, texts, strict=True):
            if text is not None:
                yield Spec(role, text)
    for moments in ("8bit", "4bit"):
        yield Spec("moments", moments, 0, "35m", steps=100, gap=25, batch=4, seq=128)


# -- runs --------------------------------------------------------------------------------------------------------------


def run_of(spec: Spec, corpus: Corpus) -> Run:
    """The run before its first step: the preset's with other formats."""
    given = DEFAULTS | ({} if spec.role == "default" else {spec.role: spec.text})
    config = TrainConfig.from_preset(
        spec.preset,
        optimizer="galore",  # float weights, to be quantised below
        backend="eager",
        steps=spec.steps,
        seed=spec.seed,
        update_proj_gap=spec.gap,
        batch=spec.batch,
        seq=spec.seq,
        eval_every=spec.steps,
    )
    model = make_model(config)
    qg.quantize_(model, format=given["weight"])
    groups = qg.param_groups(model, **{**config.projection, "projector_format": given["projector"]})
    moments = given["moments"].removesuffix(NEAREST)
    return Run(config, corpus, (model, QGaLoreAdamW(groups, lr=config.lr, moments=moments)))


def train(spec: Spec, corpus: Corpus) -> dict[str, Any]:
    """The run's result."""
    started = time.perf_counter()
    run = run_of(spec, corpus)
    draws = mock.patch.object(MomentFormats, "rounds", False) if spec.text.endswith(NEAREST) else nullcontext()
    with draws:
        while run.step < spec.steps:
            run.advance()
    loss = evaluate(run.model, corpus.validation, replace(run.config, eval_tokens=spec.final_tokens))
    return {
        **asdict(spec),
        "val_loss": loss,
        "seconds": time.perf_counter() - started,
        "machine": machine(),
    }


# -- errors ------------------------------------------------------------------------------------------------------------


def draws() -> dict[str, list[Tensor]]:
    """A million numbers of each distribution, in rows of 1,024."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heavy = torch.distributions.StudentT(torch.tensor(3.0)).sample((1024, 1024))
        return {"normal": [torch.randn(1024, 1024)], "Student t, 3": [heavy]}


def trained(corpus: Corpus) -> dict[str, list[Tensor]]:
    """What a run of `tiny` in float32 ended with: one tensor a weight of the blocks."""
    config = TrainConfig.from_preset("tiny", optimizer="galore", backend="eager", steps=STEPS)
    model = make_model(config)
    groups = qg.param_groups(model, **{**config.projection, "quant": False})
    optimizer = QGaLoreAdamW(groups, lr=config.lr, moments="32bit")
    run = Run(config, corpus, (model, optimizer))
    while run.step < config.steps:
        run.advance()
    inputs, targets = training_batch(corpus.train, seed=0, step=config.steps, batch=config.batch, seq=config.seq)
    model(inputs, targets).backward()
    found: dict[str, list[Tensor]] = {name: [] for name in ("weights", "R", "projectors", "m", "√v")}
    for p in optimizer.param_groups[0]["params"]:
        state, projector = optimizer.state[p], optimizer.state[p]["projector"]
        right = p.shape[0] >= p.shape[1]
        found["weights"].append(p.detach())
        found["R"].append(p.grad @ projector.t() if right else projector.t() @ p.grad)
        found["projectors"].append(projector)
        found["m"].append(state["exp_avg"])
        found["√v"].append(state["exp_avg_sq"].sqrt())
    return found


def errors(data: dict[str, list[Tensor]]) -> dict[str, dict[str, float]]:
    """By format: bits an element, and the error of each kind of data, moments in groups along the flattened tensor."""
    found: dict[str, dict[str, float]] = {}
    for text in ENCODED:
        own = Format.parse(text)
        row = {"bits": own.bits}
        for kind, tensors in data.items():
            decoded = decoder(own, kind)
            if decoded is None:
                continue
            wrong = sum(float((decoded(x) - x).double().square().sum()) for x in tensors)
            row[kind] = (wrong / sum(float(x.double().square().sum()) for x in tensors)) ** 0.5
        found[text] = row
    return found


def decoder(own: Format, kind: str) -> Callable[[Tensor], Tensor] | None:
    """What becomes of a tensor of that kind; None where the format does not store it."""
    if kind not in ("m", "√v"):
        return lambda x: own.decode(own.encode(x), x.shape)
    if not own.trains or "double" in own.text or own.text.startswith("official"):
        return None
    formats = MomentFormats.parse(own)

    def moment(x: Tensor) -> Tensor:
        zero = torch.zeros_like(x)
        m, v = (x, zero) if kind == "m" else (zero, x * x)
        return formats.decode(formats.encode(m, v), x.shape)[0 if kind == "m" else 1].pow(1 if kind == "m" else 0.5)

    return moment


# -- the command -------------------------------------------------------------------------------------------------------


def kept() -> dict[str, Any]:
    """Results of `results/formats.json` and new ones: errors, None before they are measured, and runs by name."""
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {"errors": None, "runs": {}}
    found = {path.stem: json.loads(path.read_text()) for path in sorted(WORK.glob("*.json"))}
    return {"errors": found.pop("errors", before["errors"]), "runs": before["runs"] | found}


def main(
    show: Annotated[bool, typer.Option("--list", help="Show the plan, and run nothing.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write result and picture, and run nothing.")] = False,
    backwards: Annotated[bool, typer.Option("--backwards", help="Begin with the last run.")] = False,
    only: Annotated[str, typer.Option(help="Pattern of names, as in --list.")] = "*",
) -> None:
    from formats_report import draw, fill

    specs = [spec for spec in plan() if fnmatch(spec.name, only)]
    if show:
        for spec in specs:
            print(spec.name, "done" if spec.name in kept()["runs"] else "")
        return
    if not report:
        corpus = load_corpus()
        if fnmatch("errors", only) and not backwards and kept()["errors"] is None:
            rows = errors(draws() | trained(corpus))
            write_result(WORK / "errors.json", {"rows": rows, "command": command(), "machine": machine()})
        for spec in reversed(specs) if backwards else specs:
            if spec.name not in kept()["runs"]:
                result = train(spec, corpus)
                write_result(WORK / f"{spec.name}.json", result)
                print(spec.name, f"{result['val_loss']:.4f}", f"{result['seconds']:.0f} s", flush=True)
        return
    result = {**kept(), "machine": machine()}
    write_result(RESULT, result, indent=1)
    fill(DOCS / "formats.md", result)
    draw(result, DOCS / "images" / "formats.png")


if __name__ == "__main__":
    typer.run(main)
