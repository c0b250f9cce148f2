"""How far an update is from float64's, after many steps, with Adam's moments in four bits rounded in several ways.

    .venv/bin/python benchmarks/moments_rounding.py

Gradients are drawn: normal, or Student's t with two degrees of freedom, of equal elements or of sizes over two decades
in a block of 128.  Every 10th step from the 150th of 600 counts: ‖N' − N‖ / ‖N‖, and the cosine, of the update
N = m̂ / (√v̂ + ε), with N in float64.  "torchao" is the idea of its 4-bit AdamW: m in the dynamic map, v itself in
sixteen equal steps without a zero, both to nearest.  Writes `results/moments-rounding.json`.
"""

from __future__ import annotations

import torch
from common import RESULTS, command, machine, write_result
from torch import Tensor

from qgalore_compile.formats import Format
from qgalore_compile.subspace.moments import MomentFormats, least_root

BETAS = (0.9, 0.999)
OURS = MomentFormats.parse("4bit")
STEPS, FIRST, EVERY, BLOCK = 600, 150, 10, 128
WAYS = ("torchao", "to nearest", "√v stochastic", "both stochastic")
KINDS = ("normal", "heavy", "normal, unlike elements", "heavy, unlike elements")


def gradient(kind: str) -> Tensor:
    size = torch.logspace(-2, 0, BLOCK) if "unlike" in kind else torch.ones(BLOCK)
    shape = (32, BLOCK)
    drawn = torch.distributions.StudentT(2.0).sample(shape) if "heavy" in kind else torch.randn(shape)
    return drawn * size


def kept(form: Format, x: Tensor, stochastic: bool) -> Tensor:
    noise = torch.randint(1 << 16, x.shape, dtype=torch.int32) if stochastic else None
    return form.decode(form.encode(x, noise), x.shape)


def stored(way: str, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What a step finds of what the one before has stored."""
    if way == "torchao":
        largest = v.amax(-1, keepdim=True)
        return kept(OURS.first, m, False), (v / largest * 16).round().clamp(1, 16) / 16 * largest
    root = kept(OURS.second, v.sqrt(), way != "to nearest")
    return kept(OURS.first, m, way == "both stochastic"), root * root


def run(kind: str) -> dict[str, dict[str, float]]:
    torch.manual_seed(1)
    beta1, beta2 = BETAS
    states = {way: (torch.zeros(32, BLOCK), torch.zeros(32, BLOCK)) for way in WAYS}
    exact = (torch.zeros(32, BLOCK, dtype=torch.float64), torch.zeros(32, BLOCK, dtype=torch.float64))
    errors: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for step in range(1, STEPS + 1):
        grad = gradient(kind)

        def update(m: Tensor, v: Tensor, at: int = step) -> Tensor:
            return (m / (1 - beta1**at)) / ((v / (1 - beta2**at)).sqrt() + 1e-8)

        exact = (beta1 * exact[0] + (1 - beta1) * grad, beta2 * exact[1] + (1 - beta2) * grad.double().square())
        wanted = update(*exact)
        for way, (m, v) in states.items():
            m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad * grad
            if way != "torchao":
                v = torch.maximum(v, (least_root(BETAS) * m).square())
            found = update(m, v).double()
            states[way] = stored(way, m, v)
            if step > FIRST and step % EVERY == 0:
                cosine = (found * wanted).sum() / found.norm() / wanted.norm()
                errors[way].append((float((found - wanted).norm() / wanted.norm()), float(cosine)))
    means = {way: [sum(column) / len(rows) for column in zip(*rows, strict=True)] for way, rows in errors.items()}
    return {way: {"error": round(error, 3), "cosine": round(cosine, 3)} for way, (error, cosine) in means.items()}


def main() -> None:
    found = {kind: run(kind) for kind in KINDS}
    for kind, ways in found.items():
        print(
            f"{kind:24}", "  ".join(f"{way} {each['error']:.3f} / {each['cosine']:.3f}" for way, each in ways.items())
        )
    write_result(RESULTS / "moments-rounding.json", {"kinds": found, "command": command(), "machine": machine()})


if __name__ == "__main__":
    main()
