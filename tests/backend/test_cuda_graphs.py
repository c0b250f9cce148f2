"""A step that is replayed ends in the bits of the step that is launched, whatever happens between the steps.

The device is a stand-in on the CPU (``fake_capture.py``).  Nothing here has run on a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_capture import FakeCapturer, Handed, of_the_host
from support import assert_unchanged, data, small, snapshot, step_of, tokens, toy, training_step
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.backend import capturing, cuda_graphs, host_reads
from qgalore_compile.backend.cuda_graphs import FUTILE, WARM, CudaGraphsWarning
from qgalore_compile.backend.entry import OptionError
from qgalore_compile.subspace.refresh import observed

Act = Callable[["Run", int], None]
Make = Callable[[], tuple[nn.Module, qg.QGaLoreAdamW]]


class Run:
    """A model that is trained, with graphs or without."""

    def __init__(self, graphs: bool, make: Make, step: Any = step_of) -> None:
        torch.manual_seed(0)
        self.model, self.opt = make()
        self.device = FakeCapturer(lambda: of_the_host(self.opt))
        self.backend = Handed(cudagraphs=True) if graphs else Handed()
        self.step = torch.compile(step(self.model, self.opt), backend=self.backend, fullgraph=True)
        self.first = copy.deepcopy((self.model.state_dict(), self.opt.state_dict()))
        self.losses: list[Tensor] = []
        self.batch: Callable[[int], tuple[Tensor, ...]] = lambda number: (data() + number,)

    def load(self, state: Any) -> None:
        self.model.load_state_dict(copy.deepcopy(state[0]))
        self.opt.load_state_dict(copy.deepcopy(state[1]))

    def train(self, act: Act, steps: int) -> None:
        capturing._made[torch.device("cpu")] = self.device
        for number in range(steps):
            act(self, number)
            self.losses.append(self.step(*self.batch(number)))

    @property
    def told(self) -> Any:
        return qg.report(self.step).compilations[-1].cuda_graphs


def pair_of(make: Make, step: Any = step_of) -> tuple[Run, Run]:
    """A run with graphs, and one without."""
    torch._dynamo.reset()
    return Run(True, make, step), Run(False, make, step)


def assert_equal_runs(replayed: Run, launched: Run, act: Act, steps: int = 24) -> None:
    for run in (replayed, launched):
        run.train(act, steps)
    assert_unchanged(snapshot(launched.model, launched.opt), snapshot(replayed.model, replayed.opt))
    # kept by the caller all along, as one keeps losses to print them later
    assert_unchanged(dict(enumerate(launched.losses)), dict(enumerate(replayed.losses)))  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(capturing.CAPTURERS, "cpu", lambda device: pytest.fail("no capturer was put there"))
        yield
    capturing._made.clear()


def usual() -> tuple[nn.Module, qg.QGaLoreAdamW]:
    """Clipping, INT8 weights and a refresh every five steps, in which moments are rotated."""
    model, opt = small(int8=True, update_proj_gap=5, moments_on_refresh="rotate", stagger=False)
    opt.max_grad_norm = 0.5
    return model, opt


def again(*pair: Run) -> tuple[Run, ...]:
    """As at the start, compiled and captured as they are."""
    for run in pair:
        run.load(run.first)
        run.losses.clear()
        run.device.calls.clear()
        run.batch = lambda number: (data() + number,)
        run.opt.max_grad_norm = 0.5
    return pair


def nothing(run: Run, number: int) -> None:
    pass


def set_numbers(run: Run, number: int) -> None:
    for index, group in enumerate(run.opt.param_groups):
        group["lr"] = 1e-2 * (1 + (number + index) % 7)
        group["betas"] = (0.7 + 0.01 * number, 0.99)
        group["weight_decay"] = 0.1 * (number % 3)
    run.opt.param_groups[0]["scale"] = 0.25 + 0.1 * number
    run.opt.max_grad_norm = 0.1 + 0.1 * number


def spoil(run: Run, number: int) -> None:
    run.batch = lambda number: (data() * (torch.nan if number % 4 == 3 else 1),)


def load_in_between(run: Run, number: int) -> None:
    if number == 7:
        run.kept = copy.deepcopy((run.model.state_dict(), run.opt.state_dict()))  # type: ignore[attr-defined]
    if number == 13:
        run.load(run.kept)  # type: ignore[attr-defined]


def move_a_weight(run: Run, number: int) -> None:
    if number == 9:
        bias = run.model[0].bias  # type: ignore[index]
        bias.data = bias.data.clone()


def step_in_eager_mode(run: Run, number: int) -> None:
    if number in (8, 9):
        run.model(data()).square().mean().backward()
        run.opt.step()
        run.opt.zero_grad()


def same_place(run: Run, number: int) -> None:
    batch = data() + number
    if number:
        batch = run.held.copy_(batch)  # type: ignore[attr-defined]
    run.held = batch  # type: ignore[attr-defined]
    run.batch = lambda number: (batch,)


ACTS = (nothing, set_numbers, spoil, load_in_between, move_a_weight, step_in_eager_mode, same_place)


@pytest.mark.slow
def test_replayed_and_launched_steps_end_in_the_same_bits_whatever_comes_between(registered: None) -> None:
    """One compilation for all of them: conftest forgets what is compiled with each test."""
    replayed, launched = pair_of(usual)
    for act in ACTS:
        again(replayed, launched)
        assert_equal_runs(replayed, launched, act)
        # refreshes are at 0, 5, …, and where a NaN or a load puts them
        assert replayed.device.calls.count("replay") >= 14, act.__name__
        assert not launched.device.calls


def test_steps_in_which_a_subspace_is_due_are_launched_and_all_others_replayed(registered: None) -> None:
    replayed, launched = pair_of(usual)
    replayed.train(nothing, 12)
    again(replayed)
    before = copy.copy(replayed.told)
    replayed.train(nothing, 11)
    four = 4 * ["replay"]
    assert replayed.device.calls == ["beside", *four, "beside", *four, "beside"]
    told = replayed.told
    assert (told.due - before.due, told.replays - before.replays) == (3, 8)
    # of both groups lr, decay, eps, scale, three of each beta and the least root; and the limit
    assert (told.numbers, told.schedules) == (2 * 11 + 1, 1)
    text = f"CUDA graphs: captured {told.captures} time(s); {told.replays} steps replayed"
    assert text in str(qg.report(replayed.step))
    launched.train(nothing, 1)
    assert "CUDA graphs" not in str(qg.report(launched.step))


# -- the stand-in finds what a wrong design would do ------------------------------------------------------------------


def _diverges(pair: tuple[Run, Run], act: Act) -> bool:
    try:
        assert_equal_runs(*pair, act)
    except AssertionError:
        return True
    return False


FLAWS: dict[str, tuple[Any, str, Any, Act]] = {
    "a schedule is not counted": (cuda_graphs, "count", lambda schedules: None, nothing),
    "outputs are not copied": (cuda_graphs, "_fresh", lambda output, kept: output, nothing),
    "a weight that moved": (cuda_graphs._Graph, "moved", lambda self, given: False, move_a_weight),
    "a refresh that is due": (cuda_graphs, "anything_due", lambda schedules: False, nothing),
    "old numbers": (
        cuda_graphs.CudaGraphs,
        "_with_numbers",
        lambda self, inputs: [self._numbers.get(place, each) for place, each in enumerate(inputs)],
        set_numbers,
    ),
}


def test_the_stand_in_tells_a_wrong_replay(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of(usual)
    assert not _diverges(pair, nothing)
    for name, (owner, attribute, flaw, act) in FLAWS.items():
        again(*pair)
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, flaw)
            assert _diverges(pair, act), name


def test_the_stand_in_bakes_in_numbers_that_are_left_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = host_reads.planned
    monkeypatch.setattr(host_reads, "planned", lambda *args: plan(*args)._replace(numbers=()))
    assert _diverges(pair_of(lambda: small(update_proj_gap=20)), set_lr)


def set_lr(run: Run, number: int) -> None:
    run.opt.param_groups[0]["lr"] = 1e-2 * (1 + number)


# -- other steps ------------------------------------------------------------------------------------------------------


def test_a_step_of_several_micro_batches_is_replayed(registered: None) -> None:
    replayed, launched = pair_of(lambda: toy(update_proj_gap=4), training_step)
    for run in (replayed, launched):
        run.batch = lambda number: (tokens(seed=number), tokens(seed=100 + number))
    assert_equal_runs(replayed, launched, nothing, 16)
    assert replayed.device.calls.count("replay") >= 6


def test_each_size_of_a_batch_has_a_graph_of_its_own(registered: None) -> None:
    replayed, launched = pair_of(lambda: small(update_proj_gap=50))
    for run in (replayed, launched):
        run.batch = lambda number: (torch.cat([data() + number] * (1 + number % 3)),)
    assert_equal_runs(replayed, launched, nothing, 24)
    # Dynamo's first program is of the first size and is called once; its second has the size as an input
    told = [each.cuda_graphs for each in qg.report(replayed.step).compilations]
    assert [each.captures for each in told if each] == [0, 3]
    assert replayed.device.calls.count("replay") >= 23 - 1 - 3 * WARM


def test_a_group_that_is_added_is_part_of_what_is_captured_next(registered: None) -> None:
    def with_a_scale(model: nn.Module, opt: Any) -> Any:
        return step_of(lambda batch: model(batch) * model.extra, opt)  # type: ignore[call-arg]

    def make() -> tuple[nn.Module, qg.QGaLoreAdamW]:
        model, opt = small(update_proj_gap=50)
        model.extra = nn.Parameter(torch.ones(3), requires_grad=False)
        return model, opt

    def add(run: Run, number: int) -> None:
        if number == 8:
            run.model.extra.requires_grad_(True)  # type: ignore[union-attr,operator]
            run.opt.add_param_group({"params": [("extra", run.model.extra)]})

    replayed, launched = pair_of(make, with_a_scale)
    assert_equal_runs(replayed, launched, add, 16)
    assert not torch.equal(replayed.model.extra, torch.ones(3))  # type: ignore[arg-type]
    assert replayed.device.calls.count("capture") == 2


# -- what goes wrong --------------------------------------------------------------------------------------------------


class Gone(Exception):
    pass


@pytest.mark.parametrize("where", ["in a capture", "in a step that is due"])
def test_after_an_exception_training_goes_on_from_the_same_state(where: str) -> None:
    """In a capture nothing has been done by then: the same step is launched.  In a launched step the exception is the
    caller's, with graphs as without."""
    replayed, launched = pair_of(lambda: small(update_proj_gap=5, stagger=False))

    def fail() -> None:
        raise Gone("the driver said no")

    def stop(*args: Any) -> Any:
        raise Gone

    def act(run: Run, number: int) -> None:
        if where == "in a capture":
            run.device.fails = fail
        elif number == 10:
            with observed(stop), pytest.raises(Gone):
                run.step(data() + number)

    if where == "in a capture":
        said = r"without CUDA graphs, for it cannot be captured: Gone: the driver said no"
        with pytest.warns(CudaGraphsWarning, match=said) as seen:
            assert_equal_runs(replayed, launched, act, 14)
        assert len(seen) == 1
        assert replayed.told.ended is not None
        assert "NOT CAPTURED" in str(qg.report(replayed.step))
        assert replayed.device.calls == ["capture"]
    else:
        assert_equal_runs(replayed, launched, act, 18)
        # what the traceback holds may lie in the pool: the graph is gone, and captured anew
        assert replayed.device.calls.count("capture") == 2


def test_states_that_move_in_every_step_end_it_in_words() -> None:
    replayed, launched = pair_of(lambda: small(update_proj_gap=50))

    def move(run: Run, number: int) -> None:
        for parameter in run.model.parameters():
            parameter.data = parameter.data.clone()

    with pytest.warns(CudaGraphsWarning, match="live elsewhere in nearly every step") as seen:
        assert_equal_runs(replayed, launched, move, 16)
    assert len(seen) == 1
    assert replayed.device.calls.count("capture") == FUTILE


def test_memory_is_not_shared_with_a_launched_step_that_leaves_something_in_it(registered: None) -> None:
    replayed, launched = pair_of(usual)
    replayed.train(nothing, 8)
    again(replayed)
    replayed.device.left = "a workspace"
    with pytest.warns(CudaGraphsWarning, match="keeps memory apart .* left something alive: a workspace") as seen:
        assert_equal_runs(replayed, launched, nothing, 16)
    assert len(seen) == 1
    assert replayed.device.calls[-8:].count("beside") == 0


# -- where it meets Inductor and the refusals of the entry ------------------------------------------------------------


@pytest.mark.compiles
def test_inductors_own_program_is_handed_over_and_so_is_one_from_its_cache(
    registered: None, monkeypatch: pytest.MonkeyPatch, inductor_cache: object
) -> None:
    monkeypatch.setattr(host_reads, "in_program", lambda text: None)  # a program for a CPU computes on the CPU
    ends = []
    for options in ({"cudagraphs": True}, {"cudagraphs": True}, {}):
        torch._dynamo.reset()
        run = Run(False, lambda: small(update_proj_gap=50))
        run.step = torch.compile(step_of(run.model, run.opt), backend="qgalore", fullgraph=True, options=options)
        run.train(set_lr, 8)
        ends.append((run, snapshot(run.model, run.opt)))
    (first, expected), (cached, from_cache), (_, launched) = ends
    assert first.device.calls == cached.device.calls == ["capture", *5 * ["replay"]]
    assert [qg.report(run.step).compilations[0].from_cache for run in (first, cached)] == [False, True]
    assert_unchanged(expected, from_cache)
    assert_unchanged(launched, expected)


def test_a_program_that_computes_on_the_host_is_refused_before_the_first_update(
    registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_reads, "in_program", lambda text: "it runs cpp_fused_0 on the CPU")
    torch._dynamo.reset()
    run = Run(True, small)
    before = snapshot(run.model, run.opt)
    with pytest.raises(OptionError, match="cannot replay this step: it runs cpp_fused_0 on the CPU; or leave the op"):
        run.train(nothing, 1)
    assert_unchanged(before, snapshot(run.model, run.opt))


def test_a_loss_whose_backward_is_another_graph_is_refused(registered: None) -> None:
    torch._dynamo.reset()
    model, _ = small()
    with pytest.raises(OptionError, match="its backward would be another graph"):
        torch.compile(model, backend=Handed(cudagraphs=True))(data())
