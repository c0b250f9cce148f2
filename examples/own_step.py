"""Q-GaLore for a model of your own, in four calls: quantise, group, optimise, compile."""

import torch
from torch import nn

import qgalore_compile as qg

model = nn.Sequential(nn.Embedding(256, 128), nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 256)))
qg.quantize_(model)  # the linear weights become INT8
optimizer = qg.QGaLoreAdamW(qg.param_groups(model, rank=32, update_proj_gap=50), lr=0.01)


@torch.compile(backend="qgalore", fullgraph=True)
def step(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Forward, backward and update: one graph."""
    loss = nn.functional.cross_entropy(model(inputs), targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


qg.on_progress(lambda p: print(f"{p.seconds:5.1f} s  {p.stage} {p.name}"))  # while the first step is compiled
for number in range(101):
    inputs = torch.randint(256, (64,))
    loss = step(inputs, (inputs * 7 + 3) % 256)  # a function to learn
    if number % 20 == 0:
        print(f"step {number:3d}  loss {loss.item():.3f}")
