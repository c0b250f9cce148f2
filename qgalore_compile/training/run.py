"""A training run in memory: model, optimizer, schedule and the step, compiled as one graph."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from qgalore_compile._torch import counters, dynamo_config
from qgalore_compile.optim.adamw import QGaLoreAdamW
from qgalore_compile.optim.groups import param_groups
from qgalore_compile.subspace.scheduler import ScheduleRecord
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.data import Corpus, training_batch, validation_batches
from qgalore_compile.training.llama import Llama
from qgalore_compile.training.saved_run import check_saved
from qgalore_compile.training.telemetry import StepRecord, Turn, resident_bytes
from qgalore_compile.weights import quantize_, select_linears

AnyOptimizer: TypeAlias = QGaLoreAdamW | torch.optim.AdamW
Step: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(tokens, targets), (A, B, T) int64 each for A micro-batches, to (loss, gradient norm), 0-d fp32 each."""


def make_model(config: TrainConfig) -> Llama:
    """The model with weights drawn from `config.seed`; its blocks' weights are INT8 for the optimizer "qgalore".

    Off the CPU they are drawn where they stay, in `config.dtype`, so that a model needs no more of the host's memory
    than of the device's (7B in float32 is 26 GB); the same seed gives other weights there than on a CPU.
    """
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    apart = device.type != "cpu"
    # Not in bfloat16 on a CPU: the draws would be others than those of every result so far.
    with torch.random.fork_rng(devices=[device] if apart else []), _default_dtype(dtype if apart else torch.float32):
        torch.manual_seed(config.seed)
        with device:
            model = Llama(config.model)
    model.to(device=device, dtype=dtype)
    if config.optimizer == "qgalore":
        quantize_(model, format=config.weight_format)
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_optimizer(model: nn.Module, config: TrainConfig) -> AnyOptimizer:
    """The optimizer that `config.optimizer` names, over all parameters of `model`."""
    if config.optimizer == "adamw":
        decayed = [p for p in model.parameters() if p.dim() >= 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        if config.plain_lr is not None:
            inside = {id(linear.weight) for _, linear in select_linears(model)}
            blocks = [p for p in decayed if id(p) in inside]
            groups[0] = {"params": [p for p in decayed if id(p) not in inside]}
            groups = [{"params": blocks}, *({**group, "lr": config.plain_lr} for group in groups)]
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    quantised = config.optimizer == "qgalore"
    groups = param_groups(
        model,
        **config.projection,
        quant=quantised,
        plain={} if config.plain_lr is None else {"lr": config.plain_lr},
        weight_decay=config.weight_decay,
    )
    return QGaLoreAdamW(
        groups,
        lr=config.lr,
        moments=config.moments or ("8bit" if quantised else "32bit"),
        max_grad_norm=config.max_grad_norm,
        nonfinite=config.nonfinite,
        seed=config.seed,
    )


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> Step:
    """The training step, compiled by `config.backend` as one graph: forward, backward, update, clearing of gradients.

    torch.optim.AdamW does not trace; its step, as any other optimizer's, stays eager behind a compiled forward and
    backward.
    """

    def forward_backward(tokens_ABT: Tensor, targets_ABT: Tensor) -> Tensor:
        losses = []
        for tokens_BT, targets_BT in zip(tokens_ABT.unbind(), targets_ABT.unbind(), strict=True):
            loss = model(tokens_BT, targets_BT) / config.accumulate
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    if isinstance(optimizer, QGaLoreAdamW):

        def whole_step(tokens_ABT: Tensor, targets_ABT: Tensor) -> Tensor:
            loss = forward_backward(tokens_ABT, targets_ABT)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        compiled_step = _compile(whole_step, config.backend)
        return lambda tokens_ABT, targets_ABT: (compiled_step(tokens_ABT, targets_ABT), optimizer.last_grad_norm)

    compiled_forward_backward = _compile(forward_backward, config.backend)
    parameters = list(model.parameters())

    def step(tokens_ABT: Tensor, targets_ABT: Tensor) -> tuple[Tensor, Tensor]:
        loss = compiled_forward_backward(tokens_ABT, targets_ABT)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if config.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss, norm

    return step


def _compile(function: Callable[[Tensor, Tensor], Tensor], backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    if backend == "eager":
        return function
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    if backend == "qgalore":
        return compiled

    def patched(tokens_ABT: Tensor, targets_ABT: Tensor) -> Tensor:
        # Without it Dynamo breaks the graph at backward(). Backend "qgalore" brings it along; Inductor does not.
        with dynamo_config.patch(trace_autograd_ops=True):
            return compiled(tokens_ABT, targets_ABT)

    return patched


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor, config: TrainConfig) -> float:
    """Mean loss, nats per byte, over `config.eval_tokens` bytes of `tokens` (uint8, 1-D), always the same ones."""
    model.eval()
    total, windows = 0.0, 0
    count = -(-config.eval_tokens // config.seq)
    for inputs, targets in validation_batches(tokens, batch=config.batch, seq=config.seq, count=count):
        total += model(inputs.to(config.device), targets.to(config.device)).item() * len(inputs)
        windows += len(inputs)
    model.train()
    return total / windows


def compiled_graphs() -> int:
    """Graphs that Dynamo has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


class Run:
    """The state of a run, and the way from one step to the next.

    Args:
        config: the settings.
        corpus: the text.
        parts: model and optimizer, in place of those that `config` describes: any `torch.optim.Optimizer`.

    Attributes:
        step: steps done, those before a checkpoint included.
        val_loss: of the latest evaluation, NaN before the first.
        compile_seconds: how long the first step of this process took, compilation included; NaN before it.
        compiling_steps: the steps (from 1) in which Dynamo compiled a graph.
    """

    def __init__(
        self, config: TrainConfig, corpus: Corpus, parts: tuple[Llama, torch.optim.Optimizer] | None = None
    ) -> None:
        self.config, self.corpus = config, corpus
        self.model = make_model(config) if parts is None else parts[0]
        self.optimizer = make_optimizer(self.model, config) if parts is None else parts[1]
        self.scheduler = LambdaLR(self.optimizer, lambda step: config.learning_rate_factor(step))
        self._train_step = make_step(self.model, self.optimizer, config)
        self.step = 0
        self.val_loss = math.nan
        self.compile_seconds = math.nan
        self.compiling_steps: list[int] = []
        self._graphs_before = compiled_graphs()
        self._schedule: dict[str, ScheduleRecord] = {}
        self._turns()
        self._timed_steps, self._timed_seconds = 0, 0.0

    @property
    def graphs(self) -> int:
        """Graphs that Dynamo compiled for this run in this process."""
        return compiled_graphs() - self._graphs_before

    @property
    def started(self) -> bool:
        """Whether this process has finished a step."""
        return not math.isnan(self.compile_seconds)

    @property
    def refreshes(self) -> int:
        """Refreshes of all projected weights so far."""
        return sum(record.refreshes for record in self._schedule.values())

    @property
    def skipped_steps(self) -> int:
        """Steps so far in which a gradient was not finite."""
        return int(self.optimizer.skipped_steps) if isinstance(self.optimizer, QGaLoreAdamW) else 0

    @property
    def tokens_per_second(self) -> float:
        """Of all steps of this process but the first, which compiles; NaN before the second."""
        return self._timed_steps * self.config.tokens_per_step / self._timed_seconds if self._timed_steps else math.nan

    def advance(self) -> StepRecord:
        """One step of training and, where it is due, an evaluation."""
        config, device = self.config, self.config.device
        inputs, targets = training_batch(
            self.corpus.train,
            seed=config.seed,
            step=self.step,
            batch=config.accumulate * config.batch,
            seq=config.seq,
        )
        shape_ABT = (config.accumulate, config.batch, config.seq)
        lr, graphs = float(self.optimizer.param_groups[0]["lr"]), self.graphs
        started = time.perf_counter()
        loss, grad_norm = self._train_step(inputs.view(shape_ABT).to(device), targets.view(shape_ABT).to(device))
        loss_value = loss.item()  # waits for the device
        seconds = time.perf_counter() - started
        self.scheduler.step()
        self.step += 1
        first = not self.started
        if first:
            self.compile_seconds = seconds
        else:
            self._timed_steps, self._timed_seconds = self._timed_steps + 1, self._timed_seconds + seconds
        if self.graphs > graphs:
            self.compiling_steps.append(self.step)
        evaluated = self.step % config.eval_every == 0 or self.step == config.steps
        if evaluated:
            self.val_loss = evaluate(self.model, self.corpus.validation, config)
        turns = self._turns()
        return StepRecord(
            step=self.step,
            loss=loss_value,
            lr=lr,
            grad_norm=grad_norm.item(),
            tokens_per_second=config.tokens_per_step / seconds,
            rss=resident_bytes(),
            refreshed=tuple(turn.name for turn in turns if turn.refreshed),
            refreshes=self.refreshes,
            skipped_steps=self.skipped_steps,
            graphs=self.graphs,
            compile_seconds=seconds if first else None,
            val_loss=self.val_loss if evaluated else None,
            turns=turns,
        )

    def _turns(self) -> tuple[Turn, ...]:
        """The weights that had their turn since the last call: those that have spent time in it."""
        if not isinstance(self.optimizer, QGaLoreAdamW):
            return ()
        before, self._schedule = self._schedule, {record.name: record for record in self.optimizer.schedule()}
        turns = []
        for name, earlier in before.items():
            now = self._schedule[name]
            if now.seconds > earlier.seconds:
                refreshed = now.refreshes > earlier.refreshes
                similarity = now.similarities[-1] if refreshed and now.similarities else None
                energy = now.energy if earlier.refreshes else None
                turns.append(Turn(name, refreshed, now.gap, similarity, energy, now.seconds - earlier.seconds))
        return tuple(turns)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, in types that `torch.load(weights_only=True)` accepts."""
        return {
            "step": self.step,
            "val_loss": self.val_loss,
            "config": asdict(self.config),
            "corpus": self.corpus.fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a `state_dict` of a run with the same settings.

        Raises:
            ValueError: a part does not fit this run, or cannot be true; says which. Nothing has changed then.
        """
        check_saved(saved, self.model, self.optimizer, self.scheduler)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.step, self.val_loss = saved["step"], saved["val_loss"]
        self._turns()
