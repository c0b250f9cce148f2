"""``QGaLoreTrainer``: transformers' ``Trainer`` with the whole step, accumulation and update included, one graph."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from rich.filesize import decimal
from torch import Tensor, nn

from qgalore_compile._torch import Unsupported, UserError
from qgalore_compile.checkpoints.saved import load, save
from qgalore_compile.integrations.needed import need
from qgalore_compile.optim.adamw import QGaLoreAdamW
from qgalore_compile.optim.checks import check_keys
from qgalore_compile.optim.groups import param_groups
from qgalore_compile.optim.settings import KEYS
from qgalore_compile.weights.targets import select_linears
from qgalore_compile.weights.tensor import QuantizedWeight
from qgalore_compile.words import first_line, unknown_key

with need("transformers and accelerate", "transformers accelerate"):
    from accelerate.utils import DistributedType
    from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

logger = logging.getLogger("qgalore_compile")

FILE = "qgalore.safetensors"
"""In a checkpoint's folder: weights as they are stored, the optimizer, the LR scheduler."""
_OF_OPTIMIZER = ("moments", "nonfinite", "seed")
_WITH_GRADIENTS = ("on_substep_end", "on_pre_optimizer_step", "on_optimizer_step")
"""Events at which a callback may look at gradients."""


class QGaLoreTrainer(Trainer):  # type: ignore[misc]  # mypy skips its types, which differ between releases
    """A ``Trainer`` that compiles forward, backward, accumulation, clipping and update of a step as one graph.

    ::

        model = qg.load_pretrained(AutoModelForCausalLM, folder)
        trainer = QGaLoreTrainer(model, TrainingArguments("out", learning_rate=1e-4), train_dataset=data,
                                 qgalore=dict(rank=128))
        trainer.train()

    All else is ``Trainer``'s: data, LR schedule, evaluation, callbacks, logs (with ``refreshes``, ``skipped_steps``),
    ``resume_from_checkpoint``, which goes on bit for bit.  A checkpoint holds ``model.safetensors``, in float, for
    ``from_pretrained``, and ``qgalore.safetensors``, to go on from.

    What differs: the gradients exist inside the graph alone, so callbacks cannot read them; the loss of a step that is
    accumulated is known with its last micro-batch; ``max_grad_norm`` and the logged ``grad_norm`` are of projected
    gradients (:class:`~qgalore_compile.QGaLoreAdamW`).  Where the whole step cannot be one graph (several processes, a
    callback between backward and update, Python that cannot be traced), ``opt.step`` alone is compiled, and a warning
    says so in a line.

    Args:
        *args, **kwargs: of ``Trainer``.
        qgalore: keys of :func:`~qgalore_compile.param_groups` (``rank`` is needed, ``targets``, ``plain``, ``rule``, …)
            and ``moments``, ``nonfinite``, ``seed`` of the optimizer.  lr, betas, eps, weight_decay and max_grad_norm
            are the training arguments'.  Left out where ``optimizers`` has a ``QGaLoreAdamW``.
        options: of the backend, as ``torch.compile(options=…)`` takes them.

    Raises:
        ValueError: ``qgalore`` has a key that is none; training arguments that cannot be (``fp16``, ``torch_compile``,
            an ``optim`` of transformers, DeepSpeed, FSDP), or none or two optimizers.
    """

    backend: Any = "qgalore"
    optimizer: Any

    def __init__(
        self,
        *args: Any,
        qgalore: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._keys = None if qgalore is None else dict(qgalore)
        self._options = None if options is None else dict(options)
        self._batches: list[dict[str, Any]] = []
        self._whole: Callable[..., Tensor] | None = None
        self._alone: Callable[..., Any] | None = None
        super().__init__(*args, **kwargs)
        self._check_arguments()
        config: Any = getattr(self.model, "config", None)
        if isinstance(self.model, PreTrainedModel) and getattr(config, "use_cache", False):
            config.use_cache = False
            logger.info("QGaLoreTrainer: use_cache=False, for a step that trains fills no cache of keys and values")
        _tell_float(self.model)
        if self.optimizer is not None:
            _tell_unprojected(self.optimizer)

    def _check_arguments(self) -> None:
        given = isinstance(self.optimizer, QGaLoreAdamW)
        if self.optimizer is not None and not given:
            raise ValueError(f"QGaLoreTrainer trains with QGaLoreAdamW, and optimizers has a "
                             f"{type(self.optimizer).__name__}: use transformers' Trainer for it")  # fmt: skip
        if given == (self._keys is not None):
            raise ValueError("give either qgalore=dict(rank=…), from which the optimizer is built, or "
                             "optimizers=(a QGaLoreAdamW, scheduler or None)")  # fmt: skip
        if self._keys is not None:
            _check_keys(self._keys)
        limit = self.args.max_grad_norm or None
        if given and self.optimizer.max_grad_norm != limit:
            raise ValueError(f"the optimizer clips at max_grad_norm={self.optimizer.max_grad_norm}, the training "
                             f"arguments say {limit}: give both the same (0 in the arguments is None)")  # fmt: skip
        if self.args.torch_compile:
            raise ValueError(
                "torch_compile=True compiles the model alone; leave it out: QGaLoreTrainer compiles the step"
            )
        if self.args.fp16:
            raise ValueError("fp16=True scales the loss, which QGaLoreTrainer does not: use bf16=True, or neither")
        default = TrainingArguments.__dataclass_fields__["optim"].default  # of this release; it is no attribute
        if self.args.optim != default:
            raise ValueError(f"optim={str(self.args.optim.value)!r} is an optimizer of transformers: leave it out, "
                             "QGaLoreAdamW's settings are in qgalore=dict(…)")  # fmt: skip
        kind = self.accelerator.distributed_type
        if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            raise ValueError(f"QGaLoreTrainer does not do {kind.value}: one process, or DistributedDataParallel")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``, without Dynamo's warnings of functions with a cache, which are transformers' own.

        Around all of it: a filter that came and went with each step would have Python show again, in each, every
        warning that it shows once.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
            return super().train(*args, **kwargs)

    # -- optimizer and step ------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that was given, or one from ``qgalore`` and the training arguments."""
        if self.optimizer is None:
            assert self._keys is not None
            keys, args = dict(self._keys), self.args
            own = {key: keys.pop(key) for key in _OF_OPTIMIZER if key in keys}
            groups = param_groups(self.model if model is None else model, **{"weight_decay": args.weight_decay, **keys})
            self.optimizer = QGaLoreAdamW(
                groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon,
                max_grad_norm=args.max_grad_norm or None, **own,
            )  # fmt: skip
            _tell_unprojected(self.optimizer)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Before it: what ``optimizer.step()`` does from here on, which the scheduler will count."""
        self.optimizer.step = MethodType(lambda _, *given: self._after_step(), self.optimizer)  # bound, for schedulers
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def _qgalore(self) -> QGaLoreAdamW:
        """The optimizer inside of accelerate's."""
        found: QGaLoreAdamW = getattr(self.optimizer, "optimizer", self.optimizer)
        return found

    # What follows by a name of Trainer's own with an underscore has no public one: Trainer calls nothing else there.

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Behind it the model is wrapped, and the optimizer there: what a step is made of."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        why = self._not_whole()
        if why is not None:
            self._compile_update(why)
        else:
            self._whole = torch.compile(self._step, backend=self.backend, fullgraph=True, options=self._options)
        return prepared

    def _not_whole(self) -> str | None:
        """Why the whole step is not compiled; None where it is."""
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            return f"{max(self.args.world_size, self.args.n_gpu)} devices"
        for callback in self.callback_handler.callbacks:
            for name in _WITH_GRADIENTS:
                if getattr(type(callback), name) is not getattr(TrainerCallback, name):
                    return f"{type(callback).__name__}.{name} may look at gradients"
        return None

    def _compile_update(self, why: str) -> None:
        logger.warning("QGaLoreTrainer compiles opt.step alone: %s", why)
        self._whole = None
        self._alone = torch.compile(self._qgalore.step, backend=self.backend, options=self._options)

    def _step(self, batches: Sequence[dict[str, Any]], items: Tensor | None) -> Tensor:
        """What is compiled: forward and backward of each micro-batch, and the update."""
        losses = []
        for batch in batches:
            loss = self.compute_loss(self.model_wrapped, dict(batch), num_items_in_batch=items)
            if not self._is_scaled(items):
                loss = loss / len(batches)
            loss.backward()
            losses.append(loss.detach())
        self._qgalore.step()
        self._qgalore.zero_grad()
        return torch.stack(losses).sum()

    def _is_scaled(self, items: Tensor | None) -> bool:
        """Whether a loss is of the whole step's tokens already, as in ``Trainer.training_step``."""
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        return (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of the next step: those that were left where an epoch or a training was broken off are none
        of it."""
        self._batches.clear()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Collect a micro-batch; with the last one of a step, run the step.  The loss is then that of all of them."""
        if self._whole is None:
            own: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return own
        model.train()
        self._batches.append(self._prepare_inputs(inputs))  # to the device, as Trainer's own step does
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches = list(self._batches)
        self._batches.clear()
        items = num_items_in_batch
        if items is not None and not isinstance(items, Tensor):
            items = torch.tensor(items, device=self.args.device)  # a number would be a constant of the graph
        try:
            return self._whole(batches, items)
        except (Unsupported, UserError) as error:  # of tracing: nothing has run
            self._compile_update(first_line(error))
        losses = [super(QGaLoreTrainer, self).training_step(model, batch, num_items_in_batch) for batch in batches]
        return torch.stack(losses).sum()

    def _after_step(self) -> None:
        """In the place of ``optimizer.step()``: a step that was compiled whole has updated already."""
        if self._whole is None and self._alone is not None and self.accelerator.sync_gradients:
            self._alone()

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Where Trainer clips, and gradients are gone: the optimizer has, and keeps the norm until the next step."""
        return self._qgalore.last_grad_norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Tensor:
        """For the log, where Trainer would compute it of gradients."""
        return self._qgalore.last_grad_norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With refreshes of all weights so far, and steps that were skipped for a gradient that was not finite."""
        if "loss" in logs:
            schedule = self._qgalore.schedule()
            logs["refreshes"] = sum(record.refreshes for record in schedule)
            logs["skipped_steps"] = int(self._qgalore.skipped_steps)
        super().log(logs, *args, **kwargs)

    # -- checkpoints: where Trainer would pickle states, and load a float model ----------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            save(os.path.join(output_dir, FILE), self.model, self._qgalore, scheduler=self.lr_scheduler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not (Path(resume_from_checkpoint) / FILE).is_file():
            raise ValueError(f"{resume_from_checkpoint} has no {FILE}: QGaLoreTrainer did not write it, or with "
                             "save_only_model; qg.load_pretrained loads its weights for a new run")  # fmt: skip
        # with the optimizer, once there is one

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            extra = load(os.path.join(checkpoint, FILE), self.model, self._qgalore)
            self.lr_scheduler.load_state_dict(extra["scheduler"])

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None or not (Path(best) / FILE).is_file():
            super()._load_best_model()
            return
        generator = torch.get_rng_state()
        load(os.path.join(best, FILE), self.model)
        torch.set_rng_state(generator)


def _check_keys(keys: Mapping[str, Any]) -> None:
    """Raise ValueError for what ``qgalore`` cannot have, which would else come up when the data is there and training
    begins."""
    known = dict.fromkeys([*KEYS, "targets", "plain", *_OF_OPTIMIZER])
    arguments = TrainingArguments.__dataclass_fields__
    for key in keys:
        if key not in known:
            own = f"; {key} is for TrainingArguments" if key in arguments else ""
            raise ValueError(f"qgalore: {unknown_key(key, known)}{own}")
    if "rank" not in keys:
        raise ValueError("qgalore lacks rank: qgalore=dict(rank=128), say")
    if isinstance(keys.get("plain"), Mapping):
        check_keys(dict(keys["plain"]), "qgalore: plain")


def _tell_float(model: nn.Module) -> None:
    """Warn of a model in which nothing is quantised, where something could be."""
    if any(isinstance(each, QuantizedWeight) for each in model.parameters()):
        return
    try:
        weights = {id(linear.weight): linear.weight for _, linear in select_linears(model)}.values()
    except ValueError:  # none that quantize_ would take by default: it can be no oversight
        return
    there, elements = sum(each.nbytes for each in weights), sum(each.numel() for each in weights)
    dtypes = ", ".join(dict.fromkeys(str(each.dtype).removeprefix("torch.") for each in weights))
    logger.warning(
        "QGaLoreTrainer: the model's weights are not INT8: its %d linear weights take %s as %s, and as INT8 about %s; "
        "for that call qg.quantize_(model), or load it with qg.load_pretrained, before the trainer is made",
        len(weights), decimal(there), dtypes, decimal(elements * 33 // 32),  # a scale and an offset for 256 codes
    )  # fmt: skip


def _tell_unprojected(optimizer: QGaLoreAdamW) -> None:
    """Warn where no weight is projected to fewer numbers than it has; one without a rank is its rule's as a whole."""
    projected = [group for group in optimizer.param_groups if "rank" in group]
    sides = [(group["rank"], min(each.shape)) for group in projected for each in group["params"]]
    if any(rank is None or rank < side for rank, side in sides):
        return
    if not sides:
        why = "no group of the optimizer has a rank; qg.param_groups(model, rank=…) makes groups that have"
    else:
        width = max(side for _, side in sides)
        ranks = ", ".join(str(rank) for rank in dict.fromkeys(rank for rank, _ in sides))
        why = (f"rank={ranks} reaches the smaller side, at most {width}, of all {len(sides)} weights; give a smaller "
               f"one, a quarter of the model's width, say: rank={max(1, width // 4)}")  # fmt: skip
    logger.warning("QGaLoreTrainer: nothing is projected, and moments are as large as without Q-GaLore: %s", why)
