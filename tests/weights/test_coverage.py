"""param_groups says what it projects, and warns where that is little; sharded and sparse parameters are refused."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qgalore_compile as qg


def wide(*, head: int = 2) -> nn.Sequential:
    """Two linear layers of 16 × 32, nearly all of the model, and a head of its own."""
    return nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16), nn.Sequential(nn.Linear(16, head)))


def frozen() -> nn.Module:
    model = wide()
    model[0].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    return model


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 32, 16))


class Conv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 64))


def parametrised() -> nn.Module:
    model = wide()
    for layer in model[:2]:
        nn.utils.parametrizations.weight_norm(layer)
    return model


LITTLE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "frozen": (frozen, {}, r"2 targets are frozen \(0\.weight, …\)"),
    "all frozen but a bias": (
        lambda: nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8, bias=False).requires_grad_(False),
                              nn.LayerNorm(8)),
        {}, r"0 weights, 0 % of the trainable.*2 targets are frozen"),
    "all frozen": (lambda: wide().requires_grad_(False), {}, r"targets are frozen.*no parameter .* is trainable"),
    "rank": (wide, {"rank": 16}, r"rank 16 reaches the smaller side of 0\.weight, 1\.weight"),
    "targets": (lambda: wide(head=4), {"targets": "2.0"}, r"not projected are 0\.weight \(32, 16\), 1\.weight"),
    "parametrised": (parametrised, {}, r"0 is not projected: its weight is parametrised, computed from parametri"),
    "experts": (lambda: nn.Sequential(nn.Linear(16, 8), Experts()), {}, r"1\.gate_up_proj \(Experts, 3-D\)"),
    "Conv1D": (lambda: nn.Sequential(nn.Linear(16, 8), Conv1D()), {}, r"1\.weight \(Conv1D, 2-D\).*group of your own"),
}  # fmt: skip


@pytest.mark.parametrize("name", LITTLE)
def test_less_than_half_projected_is_a_warning_with_the_reason(name: str) -> None:
    make, keys, words = LITTLE[name]
    with pytest.warns(qg.CoverageWarning, match=f"projected: .*{words}") as caught:
        qg.param_groups(make(), **{"rank": 4, **keys})
    assert caught[0].filename == __file__


@pytest.mark.parametrize("rank", [None, "4", 0.5])
def test_what_is_no_rank_is_refused_by_the_optimizer_in_words(rank: Any) -> None:
    with pytest.raises(
        ValueError, match=r"rank must be (None or )?an integer of at least 1( with rule 'galore')?, got"
    ):
        qg.QGaLoreAdamW(qg.param_groups(wide(), rank=rank))


def test_a_model_that_is_mostly_projected_says_so_in_a_line_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    model = wide()
    qg.quantize_(model, targets=["0", "2.0"])
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, logger="qgalore_compile"):
        warnings.simplefilter("error")
        qg.param_groups(model, rank=2)
    assert caplog.messages == [
        "INT8: 2 weights, 49 % of the parameters; projected: 2 weights, 93 % of the trainable elements, rank 2"
    ]


# -- what is refused where it is met first ----------------------------------------------------------------------------


def test_a_sparse_embedding_is_refused_by_name() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4, sparse=True), "layers": nn.Sequential(nn.Linear(4, 4))})
    with pytest.raises(ValueError, match=r"embed\.weight has a sparse gradient.*sparse=False"):
        qg.param_groups(model, rank=2)


def test_a_sparse_gradient_stops_the_step_before_anything_is_updated() -> None:
    embed, other = nn.Embedding(5, 4, sparse=True), nn.Parameter(torch.ones(3))
    opt = qg.QGaLoreAdamW([{"params": [other, embed.weight], "param_names": ["other", "embed.weight"]}], lr=0.5)
    before = embed.weight.detach().clone()
    embed(torch.tensor([1])).sum().backward()
    other.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"embed\.weight of shape \(5, 4\) has a sparse gradient.*sparse=False"):
        opt.step()
    assert torch.equal(other.detach(), torch.ones(3))
    assert torch.equal(embed.weight.detach(), before)
    assert int(opt.state[other]["step"]) == 0


@pytest.fixture
def one_process(tmp_path: Any) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_parameters_are_refused_by_quantize_param_groups_and_the_optimizer(one_process: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = wide()
    parallelize_module(model, one_process, {"0": ColwiseParallel()})
    words = r"DTensor is sharded over processes \(FSDP, tensor parallel\), which is not supported.*replicate"
    with pytest.raises(ValueError, match=f"0: a {words}"):
        qg.quantize_(model)
    with pytest.raises(ValueError, match=rf"param_groups: 0\.weight: a {words}"):
        qg.param_groups(model, rank=4)
    with pytest.raises(ValueError, match=f"parameter 0 of group 0: a {words}"):
        qg.QGaLoreAdamW([model[0].weight])


def test_fully_sharded_parameters_are_refused_too(one_process: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    model = wide()
    fully_shard(model, mesh=one_process)
    with pytest.raises(ValueError, match="a DTensor is sharded"):
        qg.param_groups(model, rank=4)
