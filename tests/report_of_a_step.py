"""A program for `test_report.py`: compile a step, run it, print its report as one line of JSON."""

from __future__ import annotations

import json

import torch
from support import tokens, toy, training_step

import qgalore_compile as qg

model, opt = toy()
step = torch.compile(training_step(model, opt), backend="qgalore", fullgraph=True)
step(tokens())
print(json.dumps(json.loads(qg.report(step).to_json())))
