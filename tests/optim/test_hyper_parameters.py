"""Numbers of a group set between steps act at once, compile nothing anew, and are checked when they are set."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from support import Interpreted, tokens, toy, training_step
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.backend.tracing import traced_as_step
from qgalore_compile.optim.hyper_parameters import FIXED, Group

SETTERS: dict[str, Callable[[Any, str, Any], Any]] = {
    "item": lambda group, key, value: group.__setitem__(key, value),
    "update": lambda group, key, value: group.update({key: value}),
    "update by keyword": lambda group, key, value: group.update(**{key: value}),
    "|=": lambda group, key, value: group.__ior__({key: value}),
}
setters = pytest.mark.parametrize("how", SETTERS)


def steps_beside_adamw(how: str, settings: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Two steps with each of the settings, here and by torch.optim.AdamW in float64: the ways that both went."""
    start = torch.linspace(-1, 1, 12)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.double())
    opt = qg.QGaLoreAdamW([p], lr=0.1, moments="32bit")
    other = torch.optim.AdamW([q], lr=0.1, weight_decay=0.0)
    draw = torch.Generator().manual_seed(0)
    for each in settings:
        for key, value in each.items():
            SETTERS[how](opt.param_groups[0], key, value)
            other.param_groups[0][key] = value
        for _ in range(2):
            p.grad = torch.randn(12, generator=draw)
            q.grad = p.grad.double()
            opt.step()
            other.step()
    return p.detach() - start, (q.detach() - start).float()


@setters
def test_betas_eps_and_lr_act_from_the_next_step_on_as_adamw_s_do(how: str) -> None:
    settings = [{}, {"betas": (0.5, 0.9)}, {"eps": 0.3}, {"lr": 0.01}, {"betas": (0.0, 0.99), "lr": 0.2}]
    torch.testing.assert_close(*steps_beside_adamw(how, settings), rtol=1e-5, atol=1e-6)


@setters
def test_weight_decay_comes_and_goes(how: str) -> None:
    p, q = (nn.Parameter(torch.linspace(1, 2, 12)) for _ in range(2))
    opt, plain = qg.QGaLoreAdamW([p], lr=0.1), qg.QGaLoreAdamW([q], lr=0.1)
    for decay in (0.0, 0.5, 0.0):
        SETTERS[how](opt.param_groups[0], "weight_decay", decay)
        p.grad = q.grad = torch.ones(12)
        opt.step()
        plain.step()
        with torch.no_grad():
            q.mul_(1 - 0.1 * decay)
        torch.testing.assert_close(p, q)


@setters
def test_scale_acts_from_the_next_step_on(how: str) -> None:
    ways = []
    for scale in (0.25, 0.5):
        p = nn.Parameter(torch.zeros(6, 4))
        opt = qg.QGaLoreAdamW([{"params": [p], "rank": 2, "refresh": "svd"}], lr=0.1)
        SETTERS[how](opt.param_groups[0], "scale", scale)
        p.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        opt.step()
        ways.append(p.detach())
    torch.testing.assert_close(ways[1], 2 * ways[0])


def test_a_longer_gap_that_is_set_is_that_of_the_refreshes_after_the_next() -> None:
    p = nn.Parameter(torch.zeros(6, 4))
    opt = qg.QGaLoreAdamW([{"params": [p], "rank": 2, "stagger": False, "update_proj_gap": 2, "max_gap": 2}])
    for index in range(13):
        if index == 3:
            opt.param_groups[0].update(update_proj_gap=4, max_gap=4)
        p.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(index))
        opt.step()
        assert opt.schedule()[0].last == max(each for each in (0, 2, 4, 8, 12) if each <= index)


@pytest.mark.parametrize(
    ("keys", "refreshes"),
    [
        (dict(update_proj_gap=2), (0, 8, 16, 24)),
        (dict(update_proj_gap=2, max_gap=2), (0, 8, 16, 18, 20, 22, 24, 26)),
    ],
    ids=["alone", "with the cap"],
)
def test_a_shorter_gap_that_is_set_shortens_those_that_stand_by_the_cap_alone(
    keys: dict[str, Any], refreshes: tuple[int, ...]
) -> None:
    """A gap that stands is what the parameter's own similarities have earned."""
    p = nn.Parameter(torch.zeros(6, 4))
    first = {"update_proj_gap": 8, "max_gap": 8, "shrink_threshold": -1.0}  # no similarity lets it shrink
    opt = qg.QGaLoreAdamW([{"params": [p], "rank": 2, "stagger": False, **first}])
    for index in range(27):
        if index == 11:
            opt.param_groups[0].update(keys)
        p.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(index))
        opt.step()
        assert opt.schedule()[0].last == max(each for each in refreshes if each <= index)


NUMBERS: list[dict[str, Any]] = [
    {"betas": (0.8, 0.99), "weight_decay": 0.0, "eps": 1e-3, "scale": 0.25, "lr": 0.01},
    {"betas": (0.7, 0.95), "weight_decay": 0.3, "eps": 2e-3, "scale": 0.75, "lr": 0.02, "update_proj_gap": 3},
    {"betas": (0.0, 0.9), "weight_decay": 0.0, "eps": 1e-2, "scale": -0.5, "lr": 0.005, "gamma_proj": 3,
     "similarity_threshold": 0.2, "shrink_threshold": 0.1, "max_gap": 50, "cos_threshold": 0.9,
     "energy_threshold": 0.5},
    {"betas": (0.9, 0.999), "weight_decay": 0.1, "eps": 1e-3, "scale": 0.25, "lr": 0.01, "update_proj_gap": 1,
     "max_gap": None, "shrink_threshold": None, "trigger": "energy"},
]  # fmt: skip


@pytest.mark.parametrize(("on_refresh", "moments"), [("keep", "8bit"), ("rotate", "32bit")])
def test_a_compiled_step_follows_every_number_and_is_compiled_once(on_refresh: str, moments: str) -> None:
    """A scheduler of the lr beside them; the Python numbers are no part of the graph."""
    runs, count = [], 0
    for compiled in (True, False):
        model, opt = toy(
            int8=False,
            quant=False,
            moments=moments,
            refresh="svd",
            stagger=False,
            update_proj_gap=2,
            moments_on_refresh=on_refresh,
        )
        scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=99, cycle_momentum=False)
        step, backend = training_step(model, opt), Interpreted()
        step = torch.compile(step, backend=backend, fullgraph=True) if compiled else step
        values = []
        for index, numbers in enumerate(NUMBERS * 2):
            scheduler.step()
            for group in opt.param_groups:
                known = {key: value for key, value in numbers.items() if "rank" in group or key in groups_keys()}
                group.update(known)
            step(tokens(seed=index))
            values.append([p.detach().clone() for p in model.parameters()])
        runs.append(values)
        count += backend.count
    assert count == 1
    start = [p.detach() for p in toy(int8=False)[0].parameters()]
    for found, expected in zip(*runs, strict=True):
        for a, b, before in zip(found, expected, start, strict=True):
            assert float((a - b).norm()) <= 0.02 * float((b - before).norm())


def groups_keys() -> tuple[str, ...]:
    """Of a group that is not projected."""
    return ("lr", "betas", "eps", "weight_decay")


def test_a_step_compiled_by_itself_and_by_another_backend_follows_too() -> None:
    for backend in (Interpreted(), "eager"):
        torch._dynamo.reset()
        ways, counters = [], torch._dynamo.utils.counters
        counters.clear()
        for compiled in (True, False):
            p = nn.Parameter(torch.linspace(1, 2, 8))
            opt = qg.QGaLoreAdamW([p], lr=0.1)
            step = torch.compile(opt.step, backend=backend, fullgraph=True) if compiled else opt.step
            for beta in (0.9, 0.5, 0.1):
                opt.param_groups[0]["betas"] = (beta, 0.999)
                p.grad = torch.ones(8)
                step()
            ways.append(p.detach())
        assert counters["stats"]["unique_graphs"] == 1
        torch.testing.assert_close(*ways)


def test_users_own_loops_over_the_groups_are_traced_and_bind_no_number() -> None:
    """Clipping by hand inside the compiled function."""
    backend, ways = Interpreted(), []
    for compiled in (True, False):
        p = nn.Parameter(torch.ones(8))
        opt = qg.QGaLoreAdamW([p], lr=0.5)

        def step(x: Tensor, p: nn.Parameter = p, opt: qg.QGaLoreAdamW = opt) -> None:
            (p * x).sum().backward()
            for group in opt.param_groups:
                for each in group["params"]:
                    assert each.grad is not None
                    each.grad.clamp_(-1, 1)
            opt.step()
            opt.zero_grad()

        run = torch.compile(step, backend=backend, fullgraph=True) if compiled else step
        for beta in (0.9, 0.8, 0.7):
            opt.param_groups[0]["betas"] = (beta, 0.99)
            run(torch.full((8,), 3.0))
        ways.append(p.detach())
    assert backend.count == 1
    torch.testing.assert_close(*ways)


def test_a_group_that_is_met_alone_takes_a_number_and_is_compiled_once_a_group() -> None:
    net = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])
    opt = qg.QGaLoreAdamW([{"params": [layer.weight], "seed": seed} for seed, layer in enumerate(net)], lr=0.1)
    graphs: list[Any] = []

    @traced_as_step
    def backend(gm: Any, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    @torch.compile(backend=backend, dynamic=None)
    def set_lr(group: Group, value: Tensor) -> Tensor:
        group["lr"] = 0.5  # which checks all of them: seeds are numbers, not symbols
        return value * group["seed"]

    torch._dynamo.reset()
    found = [float(set_lr(group, torch.ones(()))) for _ in range(2) for group in opt.param_groups]
    assert found == [0.0, 1.0, 2.0] * 2
    assert [float(group["lr"]) for group in opt.param_groups] == [0.5] * 3
    assert len(graphs) == 3


def test_numbers_are_computed_in_double_precision_and_rounded_once() -> None:
    import numpy as np

    opt = qg.QGaLoreAdamW([nn.Parameter(torch.ones(3))], betas=(0.9, 0.999))
    numbers = opt.param_groups[0].numbers
    assert numbers.rest2.item() == float(np.float32(1 - 0.999)) != float(np.float32(1) - np.float32(0.999))
    assert numbers.log2.item() == float(np.float32(np.log(0.999)))
    assert numbers.betas.tolist() == [0.9, 0.999]
    assert {tensor.device.type for tensor in numbers} == {"cpu"}  # wherever parameters are: arguments of kernels


# -- what cannot be ---------------------------------------------------------------------------------------------------


def same(found: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)) for a, b in zip(found, expected, strict=True))


BAD: list[tuple[str, Any, str]] = [
    ("beta", (0.9, 0.99), "unknown key 'beta', closest to 'betas'; known keys: .*betas"),
    ("weight_decy", 0.1, "unknown key 'weight_decy'"),
    ("betas", (0.9, 1.0), r"both betas must be in \[0, 1\)"),
    ("betas", 0.9, "betas must be two numbers"),
    ("betas", ("a", "b"), "betas must be two numbers"),
    ("eps", -1.0, "eps must not be negative"),
    ("eps", "small", "eps must be a number"),
    ("lr", float("nan"), "lr must not be negative, NaN or infinite"),
    ("lr", -0.1, "lr must not be negative"),
    ("lr", None, "lr must be a number"),
    ("weight_decay", float("inf"), "weight_decay must not be"),
    ("scale", float("nan"), "scale must be a finite number"),
    ("update_proj_gap", 0, "update_proj_gap must be an integer of at least 1"),
    ("update_proj_gap", 2.5, "update_proj_gap must be an integer"),
    ("max_gap", 2, "max_gap must be None or an integer of at least update_proj_gap=5"),
    ("gamma_proj", 0.5, "gamma_proj must be a finite number of at least 1"),
    ("cos_threshold", "high", "cos_threshold must be a finite number"),
    ("similarity_threshold", float("nan"), "similarity_threshold must be a finite number"),
    ("refresh", "lanczos", "refresh must be one of"),
    ("rounding", "up", "rounding must be one of"),
    ("trigger", "never", "trigger must be one of"),
    ("rank", 3, "rank is 4 and cannot become 3, for state was laid out by it.*build a new optimizer"),
    ("quant", False, "quant is True and cannot become False"),
    ("quant_n_bit", 8, "quant_n_bit is 4 and cannot become 8"),
    ("quant_group_size", 16, "quant_group_size is 8 and cannot become 16"),
    ("queue_size", 7, "queue_size is 5 and cannot become 7"),
    ("moments", "32bit", "moments is '8bit' and cannot become '32bit'"),
    ("similarity", "official", "similarity is 'subspace' and cannot become 'official'"),
    ("stagger", False, "stagger is True and cannot become False"),
    ("params", [nn.Parameter(torch.ones(2, 2))], "no state here; use add_param_group"),
    ("param_names", ["one"], "1 param_names for 2 parameters"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD, ids=[f"{key}={value!r:.20}" for key, value, _ in BAD])
@setters
def test_what_cannot_be_is_refused_where_it_is_set_and_changes_nothing(
    key: str, value: Any, message: str, how: str
) -> None:
    group = toy()[1].param_groups[0]
    was, numbers = dict(group), [tensor.clone() for tensor in group.numbers]
    lr = float(group["lr"])
    with pytest.raises(ValueError, match=rf"parameter group \(blocks\.0\.weight, blocks\.1\.weight\): .*{message}"):
        SETTERS[how](group, key, value)
    assert {k: v for k, v in group.items() if k != "lr"} == {k: v for k, v in was.items() if k != "lr"}
    assert group["lr"] is was["lr"]
    assert float(group["lr"]) == lr
    assert same(group.numbers, numbers)


def test_of_several_keys_all_are_set_or_none() -> None:
    group = toy()[1].param_groups[0]
    with pytest.raises(ValueError, match="eps"):
        group.update(scale=0.5, betas=(0.1, 0.2), eps=-1.0)
    assert (group["scale"], group["betas"], float(group.numbers.scale)) == (0.25, (0.9, 0.999), 0.25)
    group.update(update_proj_gap=50, max_gap=60)  # either of them alone, in one order, could not be
    assert group.numbers.rule.tolist()[3:5] == [60, 50]


def test_a_setting_that_the_state_follows_may_be_set_to_what_it_is() -> None:
    group = toy()[1].param_groups[0]
    group.update({key: group[key] for key in FIXED})
    group["rank"] = group["rank"]


REMOVALS: dict[str, Callable[[Any], Any]] = {
    "pop": lambda group: group.pop("betas"),
    "pop with a default": lambda group: group.pop("eps", None),
    "del": lambda group: group.__delitem__("lr"),
    "popitem": lambda group: group.popitem(),
    "clear": lambda group: group.clear(),
}


@pytest.mark.parametrize("how", REMOVALS)
def test_what_a_step_reads_cannot_be_removed(how: str) -> None:
    group = toy()[1].param_groups[0]
    was = set(group)
    with pytest.raises(ValueError, match="cannot be removed"):
        REMOVALS[how](group)
    assert set(group) == was


def test_what_schedulers_write_for_themselves_may_come_and_go() -> None:
    group = toy()[1].param_groups[0]
    assert group.setdefault("initial_lr", 0.5) == group.setdefault("initial_lr", 0.7) == group.pop("initial_lr") == 0.5
    assert group.pop("initial_lr", None) is None
    with pytest.raises(KeyError):
        group.pop("max_lr")
    with pytest.raises(ValueError, match="unknown key 'momentum'"):
        group.setdefault("momentum", 0.9)


# -- max_grad_norm ----------------------------------------------------------------------------------------------------


def clipped_run(backend: Interpreted | None, limits: list[float | None], **settings: Any) -> tuple[list[Tensor], Any]:
    """Weights after a step with each of the limits, set between them."""
    model, opt = toy(int8=False, quant=False, moments="32bit", refresh="svd", max_grad_norm=limits[0], **settings)
    step = training_step(model, opt)
    step = step if backend is None else torch.compile(step, backend=backend, fullgraph=True)
    for index, limit in enumerate(limits):
        opt.max_grad_norm = limit
        step(tokens(seed=index))
    return [p.detach() for p in model.parameters()], opt


@pytest.mark.parametrize(
    ("limits", "graphs"),
    [([1e-3, 1e-9, 5, 1e-3, 1e-6], 1), ([None, 1e-3, 1e-9, None, 1e-3], 2)],
    ids=["numbers", "none and numbers"],
)
def test_a_limit_of_the_norm_acts_at_once_and_a_number_after_a_number_compiles_nothing(
    limits: list[float | None], graphs: int
) -> None:
    backend = Interpreted()
    found, _ = clipped_run(backend, limits)
    assert backend.count == graphs
    expected, _ = clipped_run(None, limits)
    other, _ = clipped_run(None, limits[:1] * len(limits))
    for a, b, c in zip(found, expected, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(b, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), 1e-60, "1", True, torch.ones(2)], ids=str)
def test_a_limit_that_cannot_be_is_refused_where_it_is_set(bad: Any) -> None:
    _, opt = toy(max_grad_norm=0.5)
    with pytest.raises(ValueError, match="max_grad_norm must be None or a number above 0 in float32, got "):
        opt.max_grad_norm = bad
    assert (opt.max_grad_norm, float(opt._limit)) == (0.5, 0.5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copy", "pickle"])
def test_a_copy_has_its_own_limit(copied: Callable[[Any], Any]) -> None:
    _, opt = toy(max_grad_norm=0.5)
    other = copied(opt)
    assert other.max_grad_norm == 0.5
    other.max_grad_norm = 2
    assert (float(other._limit), float(opt._limit), opt.max_grad_norm) == (2.0, 0.5, 0.5)
    opt.max_grad_norm = None
    assert opt.max_grad_norm is None


# -- copies and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copy", "pickle"])
def test_a_copy_has_its_own_numbers(copied: Callable[[Any], Any]) -> None:
    _, opt = toy()
    opt.param_groups[0].update(betas=(0.5, 0.6), lr=0.3)
    other = copied(opt)
    group, own = other.param_groups[0], opt.param_groups[0]
    assert isinstance(group, Group)
    assert same(group.numbers, own.numbers)
    group.update(betas=(0.1, 0.2), lr=0.7)
    assert (own["betas"], float(own["lr"]), float(own.numbers.beta1)) == ((0.5, 0.6), pytest.approx(0.3), 0.5)
    assert float(group["lr"]) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="unknown key"):
        group["beta"] = 1


def test_a_state_dict_holds_plain_values_and_loads_with_weights_only() -> None:
    _, opt = toy()
    opt.param_groups[0].update(betas=(0.5, 0.6), scale=0.125, lr=0.3)
    saved = opt.state_dict()
    assert all(type(group) is dict for group in saved["param_groups"])
    kinds = {type(value) for group in saved["param_groups"] for value in group.values()}
    assert kinds <= {int, float, str, bool, list, tuple, type(None), Tensor}
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    _, other = toy(seed=1)
    lr = other.param_groups[0]["lr"]
    other.load_state_dict(torch.load(file, weights_only=True))
    group = other.param_groups[0]
    assert (group["betas"], group["scale"], float(group.numbers.beta2)) == ((0.5, 0.6), 0.125, pytest.approx(0.6))
    assert group["lr"] is lr
    assert float(lr) == pytest.approx(0.3)


def test_a_list_assigned_to_param_groups_is_taken_over_and_checked() -> None:
    _, opt = toy()
    opt.param_groups = list(reversed(opt.param_groups))
    params = [p for group in opt.param_groups for p in group["params"]]
    opt.param_groups = [{"params": params[-2:], "rank": 4, "lr": 0.5, "quant_group_size": 8}]
    assert isinstance(opt.param_groups[0], Group)
    assert float(opt.param_groups[0]["lr"]) == 0.5
    with pytest.raises(ValueError, match="no state in this optimizer; use add_param_group"):
        opt.param_groups = [{"params": [nn.Parameter(torch.ones(3))]}]
    assert len(opt.param_groups) == 1


def test_a_plain_dict_put_into_the_list_is_refused_by_the_step() -> None:
    model, opt = toy()
    opt.param_groups[1] = dict(opt.param_groups[1])
    model(tokens()).backward()
    was = [p.detach().clone() for p in model.parameters() if not isinstance(p, qg.Int8Weight)]
    with pytest.raises(RuntimeError, match=r"group 1 of param_groups is a dict .*use add_param_group"):
        opt.step()
    assert all(map(torch.equal, was, (p for p in model.parameters() if not isinstance(p, qg.Int8Weight))))
