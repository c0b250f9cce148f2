"""A training step compiled by ``backend="qgalore"`` and nothing else, compared with eager; prints one line of JSON, its
report and what its compilation told included."""

from __future__ import annotations

import copy
import json

import torch
from support import assert_same_step, decoded, tokens, toy, training_step
from torch._dynamo.utils import counters

import qgalore_compile as qg


def main() -> None:
    model, opt = toy(weight_decay=0.01)
    eager = training_step(model, opt)
    step = torch.compile(eager, backend="qgalore", fullgraph=True)
    losses, errors, told = [], [], []
    qg.on_progress(told.append)
    for index in range(7):
        weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
        before = decoded(model, opt)
        step(tokens(seed=index))
        found = decoded(model, opt)
        model.load_state_dict(weights)
        opt.load_state_dict(state)
        losses.append(eager(tokens(seed=index)).item())
        try:
            assert_same_step(before, found, decoded(model, opt), tolerance=0.01)
        except AssertionError as error:
            errors.append(f"step {index}: {error}")
    graphs = counters["stats"]["unique_graphs"]
    report = json.loads(qg.report(step).to_json())
    found = {"losses": losses, "errors": errors, "graphs": graphs, "inductor": counters["inductor"], "report": report}
    found["stages"] = [(event.stage, event.skipped) for event in told]
    found["kernels"] = [event.done for event in told if event.stage in ("kernels", "done") and not event.skipped]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
