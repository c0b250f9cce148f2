"""What several test files share: the backend with an interpreter in place of code generation, and a small model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

import qgalore_compile as qg
from qgalore_compile.backend.dry_run import dry, without_cache
from qgalore_compile.backend.entry import qgalore
from qgalore_compile.backend.tracing import step_backend
from qgalore_compile.optim import layout, one_parameter
from qgalore_compile.optim.one_parameter import Parameter
from qgalore_compile.subspace.projection import Side


@step_backend
class Interpreted:
    """The backend "qgalore" with Inductor's real FX passes, whose graph is then interpreted: no C++ compile.

    Attributes:
        graphs: the final graph of each compilation.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with without_cache():
            return qgalore(gm, example_inputs, options=self.options, inner_compile=dry(self._interpret))

    def _interpret(self, gm: fx.GraphModule) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward

    @property
    def count(self) -> int:
        """Graphs compiled so far."""
        return len(self.graphs)


def compiled(step: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], Interpreted]:
    """A step compiled as one graph by :class:`Interpreted`, and that."""
    backend = Interpreted(**options)
    return torch.compile(step, backend=backend, fullgraph=True), backend


class Toy(nn.Module):
    """Embedding, two linear layers in a block (one projected on the right, one on the left), norm and head."""

    def __init__(self, vocabulary: int = 17, width: int = 12, hidden: int = 20) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([nn.Linear(width, hidden), nn.Linear(hidden, width)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.blocks[1](torch.relu(self.blocks[0](hidden)))
        logits = self.head(self.norm(hidden))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def toy(
    *, int8: bool = True, rank: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any
) -> tuple[Toy, qg.QGaLoreAdamW]:
    """A Toy and its optimizer; ``settings`` go to the optimizer where it takes them, else to the groups."""
    torch.manual_seed(seed)
    model = Toy().to(dtype)
    if int8:
        qg.quantize_(model, group_size=8)
    of_optimizer = {
        key: settings.pop(key) for key in ("max_grad_norm", "nonfinite", "seed", "moments") & settings.keys()
    }
    lr = settings.pop("lr", 1e-2)
    groups = qg.param_groups(model, rank=rank, **{"update_proj_gap": 5, "quant_group_size": 8, **settings})
    return model, qg.QGaLoreAdamW(groups, lr=lr, **of_optimizer)


def tokens(batch: int = 4, length: int = 9, *, seed: int = 1) -> Tensor:
    """A batch of tokens for :class:`Toy`."""
    return torch.randint(0, 17, (batch, length), generator=torch.Generator().manual_seed(seed))


def training_step(model: nn.Module, opt: torch.optim.Optimizer, *, clear: bool = True) -> Callable[..., Tensor]:
    """The whole step: forward, backward and update over one or more micro-batches; ``clear`` the gradients."""
    return _step(model, lambda model, batch, count: model(batch) / count, opt, clear)


def small(*, int8: bool = False, dtype: torch.dtype = torch.float32, **keys: Any) -> tuple[nn.Module, qg.QGaLoreAdamW]:
    """Two linear layers, the first projected."""
    model = nn.Sequential(nn.Linear(8, 6, dtype=dtype), nn.Tanh(), nn.Linear(6, 3, dtype=dtype))
    if int8:
        qg.quantize_(model, group_size=4, targets=["0"])
    return model, qg.QGaLoreAdamW(qg.param_groups(model, rank=2, targets=["0"], **keys), lr=1e-2)


def data(*, dtype: torch.dtype = torch.float32) -> Tensor:
    """A batch for :func:`small`."""
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def step_of(model: Callable[..., Tensor], opt: torch.optim.Optimizer, *, clear: bool = True) -> Callable[..., Tensor]:
    """As :func:`training_step`, of a model that returns no loss but what is to be small."""
    return _step(model, lambda model, batch, _: model(batch).float().square().mean(), opt, clear)


def _step(
    model: Callable[..., Tensor],
    loss_of: Callable[[Callable[..., Tensor], Tensor, int], Tensor],
    opt: torch.optim.Optimizer,
    clear: bool,
) -> Callable[..., Tensor]:
    """Backward from a loss of each micro-batch, which is told how many there are, then the update.  The model is in the
    closure of the step itself, by which reports name its parameters."""

    def step(*batches: Tensor) -> Tensor:
        total = torch.zeros(())
        for batch in batches:
            loss = loss_of(model, batch, len(batches))
            loss.backward()
            total = total + loss.detach()
        opt.step()
        if clear:
            opt.zero_grad()
        return total

    return step


def drawn(opt: qg.QGaLoreAdamW, weight: nn.Parameter, side: Side) -> Tensor:
    """The projector that a step would draw now for an optimizer's only parameter, which has a gradient."""
    assert weight.grad is not None
    return one_parameter._drawn(Parameter(weight, weight.grad, opt.param_groups[0], opt.state[weight], 0), side)


def snapshot(model: nn.Module, opt: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that a step may change, cloned, by a readable name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, qg.Int8Weight):
            for part in ("codes", "scale", "offset"):
                tensors[f"{name}.{part}"] = getattr(parameter, part).clone()
        else:
            tensors[name] = parameter.detach().clone()
    for key, state in opt.state.items():
        for part, value in state.items():
            owner = "global" if part in ("grad_norm", "skipped_steps") else names[id(key)]  # of no single parameter
            tensors[f"{owner}/{part}"] = value.clone()
    return tensors


def assert_unchanged(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in after.items())


def assert_within_contract(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The contract for one step from equal state on the same GEMM results, as `architecture.md` puts it: float values
    within 1e-6 of the tensor's largest, integer codes off by at most one in fewer than 0.2 % of places; likewise what
    is stored in bfloat16 or float16, in steps of the dtype."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        other = found[name]
        if value.dtype == torch.uint8:
            halves = [(other & 15, value & 15), (other >> 4, value >> 4)] if "/projector" in name else [(other, value)]
            for mine, theirs in halves:
                distance = (mine.to(torch.int16) - theirs.to(torch.int16)).abs()
                off, allowed = int((distance > 0).sum()), max(1, int(0.002 * value.numel()))
                assert off <= allowed, f"{name}: {off} of {value.numel()} codes differ, {allowed} may"
                assert int(distance.max()) <= 1, f"{name}: codes differ by {int(distance.max())}"
            continue
        assert torch.equal(other.isnan(), value.isnan()), f"{name}: NaN in other places"
        if value.dtype in (torch.bfloat16, torch.float16):
            distance = (_ordered(other.nan_to_num()) - _ordered(value.nan_to_num())).abs()
            off, allowed = int((distance > 0).sum()), max(1, int(0.002 * value.numel()))
            assert off <= allowed, f"{name}: {off} of {value.numel()} places differ, {allowed} may"
            assert int(distance.max()) <= 1, f"{name}: {int(distance.max())} steps of {value.dtype} apart"
        else:
            other, value = other.double().nan_to_num(), value.double().nan_to_num()  # a schedule's queue has NaN
            error, allowed_error = float((other - value).abs().max()), 1e-6 * float(value.abs().max())
            assert error <= allowed_error, f"{name}: off by {error:.3g}, {allowed_error:.3g} is allowed"


def _ordered(value: Tensor) -> Tensor:
    """Numbers of 16 bits as integers in their order, neighbours one apart."""
    bits = value.view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def moments_of(opt: qg.QGaLoreAdamW, p: Tensor) -> tuple[Tensor, Tensor]:
    """m and v of a parameter, float32."""
    group = next(group for group in opt.param_groups if any(p is each for each in group["params"]))
    formats = group.formats.moments_of(group, p)
    return formats.decode(layout.parts_in(opt.state[p], formats), layout.low_shape(group, p))


def stored_moments(state: dict[str, Tensor]) -> list[Tensor]:
    """What a parameter's moments are stored in, in whatever format."""
    return [state[name] for name in state if name.startswith("exp_avg")]


def decoded(model: nn.Module, opt: qg.QGaLoreAdamW) -> dict[str, Tensor]:
    """Weights and moments as float tensors, for comparing whole steps, whose gradients differ by rounding."""
    values: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        values[name] = (parameter.dequantize() if isinstance(parameter, qg.Int8Weight) else parameter).detach().double()
        m, v = moments_of(opt, parameter)
        values.update({f"{name}/m": m.double(), f"{name}/v": v.double()})
    return {name: value.clone() for name, value in values.items()}


def assert_same_step(
    before: dict[str, Tensor], found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float
) -> None:
    """Two steps from equal state moved every tensor alike: ‖found - expected‖ ≤ tolerance · ‖expected - before‖."""
    for name, value in expected.items():
        moved, apart = float((value - before[name]).norm()), float((found[name] - value).norm())
        assert apart <= tolerance * moved + 1e-12, f"{name} moved by {moved:.3g}, the two steps are {apart:.3g} apart"
