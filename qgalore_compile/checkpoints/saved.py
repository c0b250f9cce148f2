"""``qg.save`` and ``qg.load``: a model and its optimizer in one file, to go on from bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qgalore_compile.checkpoints.other_optimizers import load_other
from qgalore_compile.checkpoints.tree import put_together, taken_apart
from qgalore_compile.exports.safetensors_file import Source, bytes_in, write_file
from qgalore_compile.exports.tensors import unwrapped
from qgalore_compile.optim.adamw import QGaLoreAdamW
from qgalore_compile.training.saved_run import check_model

FORMAT = "1"
_TREE = "qgalore"
"""The tensor that holds all that is not one, as JSON."""


def save(
    path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer | None = None, /, **extra: Any
) -> None:
    """Write all that training goes on from into one safetensors file, whole or not at all.

    ::

        qg.save("run.safetensors", model, opt, scheduler=scheduler, step=step, data=dataset.position)

    It holds the model's ``state_dict``, quantised weights as they are stored, the optimizer's, PyTorch's random
    generators, and what else is given, with a SHA-256 over all of it.  Nothing in it is pickled.  What stood there
    before is there until the new file is.

    Args:
        path: the file; its folder must exist.
        model: what ``torch.compile`` or DistributedDataParallel has wrapped is looked through.
        optimizer: any of ``torch.optim``'s form, or None.
        extra: numbers, texts, tensors, arrays, and lists, tuples and dicts of these; of an object with a ``state_dict``
            (an LR scheduler, a sampler) that.

    Raises:
        TypeError: a value that has no place in a checkpoint; names it.  Nothing is written.
        ValueError: the path is a folder's.
        OSError: the file cannot be written; what was there is there still.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{path} is a folder, where a file belongs: {file / 'run.safetensors'}, say")
    state = unwrapped(model).state_dict()
    values = {
        "model": state,
        "versions": dict(getattr(state, "_metadata", {})),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "rng": _generators(),
        "extra": extra,
    }
    tree, tensors = taken_apart(values)
    text = json.dumps(tree, allow_nan=False, separators=(",", ":")).encode()
    tensors[_TREE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)  # a header must not exceed 100 MB
    sources = [Source({name: torch.empty_like(value, device="meta")}, partial(dict, {name: value}))
               for name, value in tensors.items()]  # fmt: skip
    metadata = {"format": "pt", "qgalore": FORMAT, "sha256": _digest(sorted(tensors.items()))}
    write_file(file, sources, metadata)


def load(
    path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer | None = None, /
) -> dict[str, Any]:
    """Load what :func:`save` wrote into a model and an optimizer that are built as those were, and PyTorch's random
    generators.

    ::

        extra = qg.load("run.safetensors", model, opt)
        scheduler.load_state_dict(extra["scheduler"])

    The digest is verified and everything is compared before anything changes.  Parameters and states are written in
    place: a compiled step goes on without another compilation.

    Args:
        path: the file.
        model, optimizer: changed in place; without an optimizer the model alone is loaded.

    Returns:
        What was given to :func:`save` beside them, by name; of an object with a ``state_dict`` that.

    Raises:
        ValueError: no such file, or a damaged one, one of another version, or of another model or optimizer.  Nothing
            has changed then.  What another library's optimizer refuses, it says in its own words.
    """
    tree, tensors = _read(Path(path))
    bare = unwrapped(model)
    if any(each.is_meta for each in (*bare.parameters(), *bare.buffers())):
        raise ValueError("the model is on the meta device: give it memory and what no file holds, with "
                         "qg.initialize_(model)")  # fmt: skip
    if optimizer is not None and tree["optimizer"] is None:
        raise ValueError(f"{path} holds no optimizer; load the model alone")
    state = OrderedDict(put_together(tree["model"], tensors.__getitem__))
    state._metadata = put_together(tree["versions"], tensors.__getitem__)  # type: ignore[attr-defined]
    check_model(state, bare)
    _check_tied(bare, tree["model"])
    # The file's pages must not become anyone's state: what is not copied on the way is copied here.
    generators, extra = (put_together(tree[key], lambda name: tensors[name].clone()) for key in ("rng", "extra"))
    if isinstance(optimizer, QGaLoreAdamW):
        optimizer.load_state_dict(put_together(tree["optimizer"], tensors.__getitem__))  # refuses before it changes
    elif optimizer is not None:
        load_other(optimizer, put_together(tree["optimizer"], lambda name: tensors[name].clone()))
    bare.load_state_dict(state)
    _set_generators(generators)
    return extra  # type: ignore[no-any-return]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is no tensor, and the tensors by name, which are the file's pages."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and qg.save writes a file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("qgalore") != FORMAT:
                raise ValueError(_foreign(path, metadata))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    if _TREE not in tensors or _digest(sorted(tensors.items())) != metadata.get("sha256"):
        raise ValueError(f"{path} is damaged: its contents are not those that were written; use another copy")
    tree = json.loads(bytes(tensors.pop(_TREE).numpy()))
    assert isinstance(tree, dict)
    return tree, tensors


def _check_tied(model: nn.Module, saved: dict[str, Any]) -> None:
    """Raise ValueError where names that are one tensor in the model were several when it was saved."""
    first: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        other = first.setdefault(id(value), name)
        if saved[other] != saved[name]:
            raise ValueError(f"the saved model is another one than this: {other} and {name} are one tensor here, and "
                             "were two")  # fmt: skip


def _foreign(path: Path, metadata: Mapping[str, str]) -> str:
    if "qgalore" in metadata:
        return f"{path} is of format {metadata['qgalore']}, and this version reads {FORMAT}"
    return f"{path} is not of qg.save; of a float checkpoint qg.load_pretrained loads the weights"


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over each tensor's name, dtype, shape and elements."""
    digest = hashlib.sha256()
    for name, value in tensors:
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(bytes_in(value))
    return digest.hexdigest()


def _generators() -> dict[str, Any]:
    """The states of PyTorch's random generators: dropout and shuffling go on from them."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": gpus}


def _set_generators(saved: Mapping[str, Any]) -> None:
    torch.set_rng_state(saved["cpu"])
    if torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["cuda"])
