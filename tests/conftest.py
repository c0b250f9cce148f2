"""What every test may rely on: a clean Dynamo, seeded generators, private caches, and Hypothesis' profiles."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read when torch is imported, so set before. Two test processes on two cores: one thread and no pool of compile
# workers each. In force only under pytest-xdist.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import hypothesis
import pytest
import torch

# What a shell starts in the background (`&`, nohup) ignores these, and so would the programs that tests send them to.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


class _TorchGenerator:
    """torch's default generator, as Hypothesis wants it: each example starts from the same seed, so failures replay."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


# Hypothesis keeps a weak reference only.
_TORCH_GENERATOR = _TorchGenerator()
hypothesis.register_random(_TORCH_GENERATOR)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz",
        type=int,
        default=0,
        metavar="N",
        help="property tests draw N times their usual number of examples, new ones each run",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose the Hypothesis profile; test modules are imported after this.

    A test that needs fewer examples says so relative to the profile, so that ``--fuzz`` reaches it too:
    ``@settings(max_examples=settings().max_examples // 5)``.
    """
    # No deadline: the first example of a test may trace, compile or load a library. 50 examples: the whole suite has
    # fifteen minutes on two cores.
    stock = hypothesis.settings.get_profile("default")  # not the active one: Hypothesis has its own for CI
    default = hypothesis.settings(stock, deadline=None, max_examples=50, print_blob=True)
    # Nobody's run of the suite fails by chance on what is not its cause: `make fuzz` looks for what these draws miss.
    profile = hypothesis.settings(default, derandomize=True, database=None)
    if times := config.getoption("--fuzz"):
        profile = hypothesis.settings(default, max_examples=times * default.max_examples)
    hypothesis.settings.register_profile("suite", profile)
    hypothesis.settings.load_profile("suite")

    # torch formats every graph for its structured trace while that logger has a handler, and pytest gives one to each
    # logger that does not propagate: up to a third of a test's time, for text that is then dropped.
    logging.getLogger("torch.__trace").propagate = True

    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only ``--fuzz`` runs."""
    if not config.getoption("--fuzz"):
        left_out = [item for item in items if item.get_closest_marker("more")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The compile cache of this run: it starts empty, and the processes of the run share it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    path = base / "inductor"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(path))
        yield path


@pytest.fixture(scope="module", autouse=True)
def old_objects_are_not_searched() -> Iterator[None]:
    """By the garbage collector: a sixth of the time of tests that trace many steps, and so make many small objects.

    What is garbage already when a file's tests begin stays until they have run.
    """
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def clean_dynamo() -> None:
    """No test sees the compiled code, the guards, the recompile counts or the graph breaks of another."""
    # torch imports Dynamo when something first compiles: a second that tests of plain functions need not spend.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A file of the benchmarks, which are scripts in a folder and no package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module
