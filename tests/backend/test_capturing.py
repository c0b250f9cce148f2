"""CUDA's side of a capture, as far as a machine without a GPU can tell: which calls it makes of torch, in which order.

Whether a GPU then does what they ask for has not been seen.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch
from torch._inductor import config as inductor_config

from qgalore_compile._torch import CUDAGraphPolicy
from qgalore_compile.backend import capturing
from qgalore_compile.backend.capturing import CudaCapturer, capturer_of

CUDA = torch.device("cuda", 0)


class Calls(list[str]):
    """Calls of torch, in order; contexts are entered and left."""

    def context(self, name: str) -> Any:
        def make(*args: Any, **keys: Any) -> AbstractContextManager[None]:
            entered = mock.MagicMock()
            entered.__enter__.side_effect = lambda *_: self.append(f"enter {name}")
            entered.__exit__.side_effect = lambda *_: self.append(f"leave {name}")
            return entered

        return mock.Mock(side_effect=make)

    def call(self, name: str) -> Any:
        return mock.Mock(side_effect=lambda *args: self.append(name))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    side, here = mock.Mock(), mock.Mock()
    side.wait_stream, here.wait_stream = found.call("side waits"), found.call("current waits")
    pool = mock.Mock(id=(0, 7), snapshot=list)
    graph = mock.Mock(replay=found.call("replay"))
    for name, value in {
        "Stream": lambda device: side, "current_stream": lambda device: here, "MemPool": lambda: pool,
        "CUDAGraph": lambda: graph, "device": found.context("device"), "stream": found.context("stream"),
        "use_mem_pool": found.context("pool"), "graph": found.context("graph"), "current_device": lambda: 0,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(capturing, "clear_cublas_manager", found.context("cublas"))
    monkeypatch.setattr(capturing, "check_memory_pool", mock.Mock())
    return found


def test_a_call_beside_graphs_runs_on_their_stream_and_in_their_pool_and_the_current_one_waits(calls: Calls) -> None:
    def program(inputs: list[Any]) -> list[Any]:
        calls.append("program")
        return inputs

    assert CudaCapturer(CUDA).beside(program, [1]) == [1]
    inside = ["device", "stream", "cublas", "pool"]
    assert calls == [
        "side waits", *(f"enter {each}" for each in inside), "program", *(f"leave {each}" for each in inside[::-1]),
        "current waits",
    ]  # fmt: skip


def test_a_capture_takes_the_pool_and_the_stream_and_leaves_other_threads_alone(calls: Calls) -> None:
    capturer = CudaCapturer(CUDA)
    captured = capturer.capture(lambda inputs: [*inputs, 2], [1])
    assert captured.outputs == [1, 2]
    (_, keys) = torch.cuda.graph.call_args  # type: ignore[attr-defined]
    assert keys == {"pool": (0, 7), "stream": capturer.stream, "capture_error_mode": "thread_local"}
    captured.replay()
    assert calls[-1] == "replay"


def test_something_alive_in_the_pool_refuses_a_capture_and_is_told_of_a_call(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capturing, "check_memory_pool", mock.Mock(side_effect=RuntimeError("1 tensor not tracked")))
    assert CudaCapturer(CUDA).left_alive([]) == "1 tensor not tracked"
    with pytest.raises(RuntimeError, match="1 tensor not tracked"):
        CudaCapturer(CUDA).capture(lambda inputs: inputs, [])


def test_a_device_has_one_capturer_and_a_cpu_none() -> None:
    assert capturer_of(torch.device("cpu")) is None
    assert capturer_of(CUDA) is capturer_of(CUDA)


def test_inductor_hands_programs_over_as_the_policy_takes_them() -> None:
    if not hasattr(inductor_config, "cudagraph_policy"):
        pytest.skip(f"torch {torch.__version__} has no torch._inductor.config.cudagraph_policy")
    assert inductor_config.cudagraph_policy is None
    assert list(inspect.signature(CUDAGraphPolicy.wrap_output).parameters) == ["self", "output_code"]
    assert list(inspect.signature(CUDAGraphPolicy.should_wrap).parameters) == ["self", "compiled_graph"]
