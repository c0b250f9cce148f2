"""Whole training steps on Triton kernels, in Triton's interpreter, against eager: step by step from equal state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from support import assert_within_contract, step_of, tokens, toy, training_step
from torch import Tensor, fx, nn

pytest.importorskip("triton")

from interpreted import Calls

import qgalore_compile as qg
from qgalore_compile.backend.dry_run import dry, without_cache
from qgalore_compile.backend.entry import qgalore
from qgalore_compile.backend.tracing import step_backend

pytestmark = pytest.mark.triton


def compiled(step: Callable[..., Tensor], calls: Calls, **options: Any) -> Callable[..., Tensor]:
    """The step as one graph, whose kernels are interpreted."""

    @step_backend
    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with without_cache():
            return qgalore(gm, example_inputs, options={"strict": True, **options}, inner_compile=dry(calls.runner))  # type: ignore[arg-type]

    return torch.compile(step, backend=backend, fullgraph=True)


def pair(make: Callable[[], tuple[nn.Module, Any]]) -> tuple[tuple[nn.Module, Any], tuple[nn.Module, Any]]:
    """The same model and optimizer twice."""
    torch.manual_seed(0)
    one = make()
    torch.manual_seed(0)
    return one, make()


def tensors(model: nn.Module, opt: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that a step may change, as it is."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parts = ("codes", "scale", "offset") if isinstance(parameter, qg.Int8Weight) else ("data",)
        found |= {f"{name}.{part}": getattr(parameter, part) for part in parts}
        found |= {f"{name}/{part}": value for part, value in opt.state[parameter].items()}
    return found


def distance(one: Tensor, other: Tensor) -> Tensor:
    """Between codes."""
    return (one.to(torch.int16) - other.to(torch.int16)).abs()


def steps(
    make: Callable[[], tuple[nn.Module, Any]], batch: Callable[[int], Tensor], calls: Calls, count: int = 3,
    step_of: Callable[[nn.Module, Any], Callable[..., Tensor]] = training_step, **options: Any,
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]]:  # fmt: skip
    """(before, found, expected) of some steps, each from eager's state."""
    (eager_model, eager_opt), (model, opt) = pair(make)
    eager, fast = step_of(eager_model, eager_opt), compiled(step_of(model, opt), calls, **options)
    for index in range(count):
        before = {name: value.clone() for name, value in tensors(model, opt).items()}
        loss = eager(batch(index))
        torch.testing.assert_close(fast(batch(index)), loss, rtol=1e-5, atol=0)
        found, expected = tensors(model, opt), tensors(eager_model, eager_opt)
        assert found.keys() == expected.keys()
        yield before, found, expected
        for name, value in expected.items():
            found[name].copy_(value)


def assert_rounded_alike(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Codes off by at most one in one place of a hundred, or in one; floats within `tolerance` of the largest.

    Other random bits would change every other code.
    """
    for name, value in expected.items():
        if value.dtype == torch.uint8 and "projector" not in name:
            apart = distance(found[name], value)
            assert int(apart.max()) <= 1, name
            assert int((apart > 0).sum()) <= max(1, value.numel() // 100), name
        elif value.is_floating_point():
            # a projector is what is left of a gradient's singular vectors, which its rounding turns
            limit = (tolerance * (30 if "projector" in name else 1)) * value.double().nan_to_num().abs().max()
            assert ((found[name].double() - value.double()).nan_to_num().abs() <= limit).all(), name


# -- this project's optimizer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "float"])
def test_steps_with_both_sides_an_embedding_and_a_refresh_are_eagers(int8: bool, calls: Calls) -> None:
    refreshed = []
    for before, found, expected in steps(
        lambda: toy(int8=int8, update_proj_gap=2, stagger=False, max_grad_norm=1.0),
        lambda index: tokens(2, 5, seed=index),
        calls,
    ):
        assert_rounded_alike(found, expected)
        refreshed.append(sum(not torch.equal(before[name], expected[name]) for name in before if "/projector" in name))
    assert [count > 0 for count in refreshed] == [True, False, True]


def test_moments_that_the_refresh_rotates_are_read_and_written_by_the_kernels_behind_it(calls: Calls) -> None:
    settings: dict[str, Any] = {"update_proj_gap": 1, "moments_on_refresh": "rotate", "quant": False}
    for _, found, expected in steps(
        lambda: toy(int8=False, **settings), lambda index: tokens(2, 5, seed=index), calls, count=2
    ):
        assert_rounded_alike(found, expected, tolerance=1e-4)


@pytest.mark.parametrize("rule", ["fira", "apollo", "muon"])
def test_steps_by_another_rule_are_eagers(rule: str, calls: Calls) -> None:
    """Every layer is fused, which the option `strict` asks for."""
    settings: dict[str, Any] = {"update_proj_gap": 3, "rule": rule, "quant": False}
    for _, found, expected in steps(
        lambda: toy(int8=True, **settings), lambda index: tokens(2, 5, seed=index), calls, count=2
    ):
        assert_rounded_alike(found, expected, tolerance=1e-4)


def linears(dtype: torch.dtype) -> tuple[nn.Module, qg.QGaLoreAdamW]:
    """One layer projected on the right and one on the left."""
    model = nn.Sequential(nn.Linear(48, 80, bias=False), nn.SiLU(), nn.Linear(80, 32, bias=False)).to(dtype)
    qg.quantize_(model, group_size=16)
    group = {"params": list(model.parameters()), "rank": 8, "update_proj_gap": 2, "quant_group_size": 16}
    return model, qg.QGaLoreAdamW([group], lr=1e-2, weight_decay=0.1)


def batch_of(dtype: torch.dtype) -> Callable[[int], Tensor]:
    return lambda index: torch.randn(16, 48, generator=torch.Generator().manual_seed(index)).to(dtype)


def test_a_layers_update_is_three_launches_and_its_products_one_each(calls: Calls) -> None:
    """Down, region and up; the forwards of both, and the gradient of what is between them."""
    for _ in steps(lambda: linears(torch.float32), batch_of(torch.float32), calls, 1, step_of):
        assert (calls.counted.count("region"), calls.counted.count("gemm")) == (2, 2 * 2 + 2 + 1)


def test_in_bfloat16_only_the_rounding_of_the_update_is_left_out(calls: Calls) -> None:
    """Eager rounds U to bfloat16; a kernel's epilogue takes it in float32.  All else is within the contract on the same
    products, unless a gradient is taken apart.

    So a new weight, and the ends of its group, lie within δ = 2⁻⁹ of what the largest weight moved.  Its code, in
    units of the group's scale, moves by 3 δ / scale at most, which is how probable another rounding is.
    """
    for before, found, expected in steps(
        lambda: linears(torch.bfloat16), batch_of(torch.bfloat16), calls, 3, step_of, reassociate="never"
    ):
        states = [{name: value for name, value in of.items() if "/" in name} for of in (found, expected)]
        assert_within_contract(*states)
        for name in ("0.weight", "2.weight"):
            (old, new) = (of[f"{name}.codes"] * of[f"{name}.scale"].repeat_interleave(16, -1)
                          + of[f"{name}.offset"].repeat_interleave(16, -1) for of in (before, expected))  # fmt: skip
            scale = expected[f"{name}.scale"]
            moved = float((new - old).abs().max())  # a rounding of the weight included
            probable = 3 * 2**-9 * moved * float((1 / scale).mean())
            apart = distance(found[f"{name}.codes"], expected[f"{name}.codes"])
            likely = probable * apart.numel()
            assert int(apart.max()) <= 1
            assert int((apart > 0).sum()) <= likely + 4 * likely**0.5
            assert ((found[f"{name}.scale"] - scale).abs() <= 2 * 2**-9 * moved / 255 + 1e-6 * scale).all()


def test_in_bfloat16_a_gradient_that_is_taken_apart_is_rounded_elsewhere(calls: Calls) -> None:
    """dY P is rounded where eager rounds G, either by 2⁻⁹.  Of what is left where terms cancel that is more: at the
    first step, where Adam moves everything by ± lr, a few signs change.  So steps agree in the norm."""
    for index, (before, found, expected) in enumerate(
        steps(lambda: linears(torch.bfloat16), batch_of(torch.bfloat16), calls, 2, step_of)
    ):
        for name in ("0.weight", "2.weight"):
            apart = distance(found[f"{name}.codes"], expected[f"{name}.codes"])
            assert float((apart > 0).float().mean()) <= 0.05
            assert int(apart.max()) <= (4 if index == 0 else 2)
        assert before.keys() == found.keys()


# -- optimizers that are not ours -------------------------------------------------------------------------------------


class GaLore(torch.optim.Optimizer):
    """GaLore around any rule, in a fixed random subspace, as somebody may write it; other parameters by plain SGD."""

    def __init__(self, params: Any, rule: str, rank: int = 4) -> None:
        super().__init__(params, {"rule": rule})
        for p in self.param_groups[0]["params"]:
            if p.dim() == 2:
                m, n = p.shape
                right = m >= n
                self.state[p]["basis"] = torch.linalg.qr(torch.randn(n if right else m, rank))[0].to(p.dtype)
                self.state[p]["momentum"] = torch.zeros((m, rank) if right else (rank, n))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is None:
                continue
            if p.dim() != 2:
                p.sub_(0.01 * p.grad)
                continue
            basis, momentum = self.state[p]["basis"], self.state[p]["momentum"]
            right = p.shape[0] >= p.shape[1]
            low = (p.grad @ basis if right else basis.t() @ p.grad).float()
            if self.param_groups[0]["rule"] == "lion":
                update = torch.sign(0.9 * momentum + 0.1 * low)
                momentum.mul_(0.99).add_(low, alpha=0.01)
            else:
                momentum.mul_(0.9).add_(low)
                update = momentum
            update = update.to(p.dtype)
            p.sub_(0.01 * (update @ basis.t() if right else basis @ update))

    step.hooked = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["lion", "sgd"])
def test_somebody_elses_optimizer_runs_on_the_same_kernels(rule: str, dtype: torch.dtype, calls: Calls) -> None:
    def make() -> tuple[nn.Module, GaLore]:
        model = nn.Sequential(nn.Linear(20, 36), nn.Tanh(), nn.Linear(36, 12)).to(dtype)
        return model, GaLore(list(model.parameters()), rule)

    def batch(index: int) -> Tensor:
        return torch.randn(8, 20, generator=torch.Generator().manual_seed(index)).to(dtype)

    def step_of(model: nn.Module, opt: Any) -> Callable[..., Tensor]:
        def step(x: Tensor) -> Tensor:
            loss = model(x).float().square().mean()
            loss.backward()
            opt.step()
            for parameter in model.parameters():
                parameter.grad = None
            return loss.detach()

        return step

    for before, found, expected in steps(make, batch, calls, 3, step_of):
        for name, value in expected.items():
            if name.endswith("basis"):
                continue
            one, other, old = (of[name].double() for of in (found, expected, before))
            # in bfloat16 a weight is rounded to 2⁻⁹ of itself, and each of the gradient's two products
            tolerance = 1e-4 if dtype == torch.float32 else 3e-2
            rounding = 1e-7 if dtype == torch.float32 or value.dtype == torch.float32 else 2**-9
            limit = tolerance * float((other - old).norm()) + rounding * float(old.norm())
            assert float((one - other).norm()) <= limit, name
        assert calls.counted.count("region") == 2
        assert len(calls.counted) == 4
        calls.counted.clear()
