"""Transformers' Trainer, one graph a step: a small Llama learns to write Python, from the standard library's source."""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import qgalore_compile as qg
from qgalore_compile.integrations import QGaLoreTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--out", default="trainer-run")
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
options = parser.parse_args()

files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = torch.tensor(list(b"".join(each.read_bytes() for each in files)))
rows = text[: len(text) // 129 * 129].view(-1, 129)  # bytes are the tokens
data = [{"input_ids": row, "labels": row} for row in rows[:-64]]
held_out = [{"input_ids": row, "labels": row} for row in rows[-64:]]

torch.manual_seed(0)
sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
model = qg.quantize_(LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)))
arguments = TrainingArguments(
    options.out, max_steps=options.steps, per_device_train_batch_size=8, gradient_accumulation_steps=2,
    learning_rate=0.01, lr_scheduler_type="cosine", warmup_steps=5, logging_steps=10, eval_strategy="steps",
    eval_steps=30, save_steps=30, report_to=[], use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
trainer = QGaLoreTrainer(model, arguments, train_dataset=data, eval_dataset=held_out,
                         qgalore=dict(rank=32, update_proj_gap=20))  # fmt: skip
qg.on_progress(lambda p: print(f"{p.seconds:5.1f} s  {p.stage} {p.name}") if p.stage != "passes" else None)
trainer.train(resume_from_checkpoint=options.resume)
