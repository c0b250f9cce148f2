"""How far an update is from float64's, after many steps, with Adam's moments in four bits stored in several ways.

    .venv/bin/python benchmarks/moments_rounding.py

Gradients are drawn: normal, or Student's t with two degrees of freedom, of equal elements or of sizes over two decades
in a block of 128; or they are projected gradients of `tiny`, trained by AdamW in float32.  Every 10th step from the
150th of 600 counts: ‖N' − N‖ / ‖N‖, and the cosine, of the update N = m̂ / (√v̂ + ε), with N in float64.  "torchao" is
the idea of its 4-bit AdamW: m in the dynamic map, v itself in sixteen equal steps without a zero, both to nearest.
Writes `results/moments-rounding.json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from common import RESULTS, command, machine, write_result
from torch import Tensor

from qgalore_compile.subspace.moments import MomentFormats, least_root
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.data import load_corpus, training_batch
from qgalore_compile.training.run import make_model

BETAS = (0.9, 0.999)
STEPS, FIRST, EVERY, BLOCK = 600, 150, 10, 128


class Way(NamedTuple):
    """A format of both moments, and which of them are rounded stochastically; without a format "torchao"."""

    formats: MomentFormats | None
    first: bool = False
    second: bool = False


MAPS = {name: MomentFormats.parse(f"{name}/{BLOCK}") for name in ("moment4", "dynamic4", "nf4")}
WAYS = {
    "torchao": Way(None),
    "moment4": Way(MAPS["moment4"], second=True),
    "moment4, all nearest": Way(MAPS["moment4"]),
    "moment4, all stochastic": Way(MAPS["moment4"], first=True, second=True),
    "dynamic4": Way(MAPS["dynamic4"], second=True),
    "dynamic4, all nearest": Way(MAPS["dynamic4"]),
    "dynamic4, all stochastic": Way(MAPS["dynamic4"], first=True, second=True),
    "nf4": Way(MAPS["nf4"], second=True),
}
"""A step of the optimizer rounds √v stochastically and m to nearest."""


def drawn(heavy: bool, unlike: bool) -> Iterator[Tensor]:
    torch.manual_seed(1)
    size = torch.logspace(-2, 0, BLOCK) if unlike else torch.ones(BLOCK)
    while True:
        x = torch.distributions.StudentT(2.0).sample((32, BLOCK)) if heavy else torch.randn(32, BLOCK)
        yield x * size


def of_tiny() -> Iterator[Tensor]:
    """Projected gradients of a weight of each kind, in blocks; the projectors are of the fifth step's gradients."""
    config, rank = TrainConfig.from_preset("tiny", optimizer="galore", backend="eager"), 32
    corpus, model = load_corpus(), make_model(config)
    weights = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name][::3]
    adam, bases = torch.optim.AdamW(model.parameters(), lr=1e-3), list[Tensor]()
    step = 0
    while True:
        inputs, targets = training_batch(corpus.train, seed=0, step=step, batch=8, seq=64)
        adam.zero_grad()
        model(inputs, targets).backward()
        if step == 5:
            bases = [torch.linalg.svd(p.grad, full_matrices=False)[0][:, :rank] for p in weights]
        adam.step()
        step += 1
        if bases:
            yield torch.cat([(basis.t() @ p.grad).reshape(-1, BLOCK) for basis, p in zip(bases, weights, strict=True)])


KINDS = {
    "normal": lambda: drawn(heavy=False, unlike=False),
    "heavy": lambda: drawn(heavy=True, unlike=False),
    "normal, unlike elements": lambda: drawn(heavy=False, unlike=True),
    "heavy, unlike elements": lambda: drawn(heavy=True, unlike=True),
    "tiny": of_tiny,
}


def stored(way: Way, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What a step finds of what the one before has stored."""
    if way.formats is None:
        largest = v.amax(-1, keepdim=True)
        first = MAPS["dynamic4"].first
        return first.decode(first.encode(m), m.shape), (v / largest * 16).round().clamp(1, 16) / 16 * largest
    parts = [
        part
        for form, x, draws in ((way.formats.first, m, way.first), (way.formats.second, v.sqrt(), way.second))
        for part in form.encode(x, torch.randint(1 << 16, x.shape, dtype=torch.int32) if draws else None)
    ]
    return way.formats.decode(parts, m.shape)


def run(kind: str) -> dict[str, dict[str, float]]:
    (beta1, beta2), gradients = BETAS, KINDS[kind]()
    first = next(gradients)
    states = {name: (torch.zeros_like(first), torch.zeros_like(first)) for name in WAYS}
    exact = (torch.zeros_like(first).double(), torch.zeros_like(first).double())
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for step, grad in enumerate(islice(gradients, STEPS), 1):

        def update(m: Tensor, v: Tensor, at: int = step) -> Tensor:
            return (m / (1 - beta1**at)) / ((v / (1 - beta2**at)).sqrt() + 1e-8)

        exact = (beta1 * exact[0] + (1 - beta1) * grad, beta2 * exact[1] + (1 - beta2) * grad.double().square())
        wanted = update(*exact)
        for name, (m, v) in states.items():
            m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad * grad
            if WAYS[name].formats is not None:
                v = torch.maximum(v, (least_root(BETAS) * m).square())
            found = update(m, v).double()
            states[name] = stored(WAYS[name], m, v)
            if step > FIRST and step % EVERY == 0:
                cosine = (found * wanted).sum() / found.norm() / wanted.norm()
                errors[name].append((float((found - wanted).norm() / wanted.norm()), float(cosine)))
    means = {name: [sum(column) / len(rows) for column in zip(*rows, strict=True)] for name, rows in errors.items()}
    return {name: {"error": round(error, 3), "cosine": round(cosine, 3)} for name, (error, cosine) in means.items()}


def main() -> None:
    found = {kind: run(kind) for kind in KINDS}
    for kind, ways in found.items():
        print(
            f"{kind:24}", "  ".join(f"{way} {each['error']:.3f} / {each['cosine']:.3f}" for way, each in ways.items())
        )
    write_result(RESULTS / "moments-rounding.json", {"kinds": found, "command": command(), "machine": machine()})


if __name__ == "__main__":
    main()
