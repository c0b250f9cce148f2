"""Wall time of refreshes: told, and no part of the state."""

from __future__ import annotations

import copy
import gc
import time

import pytest
import torch
from support import Interpreted, tokens, toy, training_step

from qgalore_compile.subspace.timing import _seconds, seconds_of, timed

CPU = torch.device("cpu")


def test_time_adds_up_by_tensor_also_where_the_block_fails() -> None:
    one, other = torch.zeros(3), torch.zeros(3)
    with timed(one, CPU):
        time.sleep(0.01)

    def fails() -> None:
        with timed(one, CPU):
            time.sleep(0.01)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert 0.02 <= seconds_of(one) < 2
    assert seconds_of(other) == 0.0


def test_an_entry_goes_with_its_tensor() -> None:
    tensor = torch.zeros(3)
    with timed(tensor, CPU):
        pass
    before = len(_seconds)
    del tensor
    gc.collect()
    assert len(_seconds) == before - 1


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_only_a_turn_takes_time_and_no_state_knows_of_it(compiled: bool) -> None:
    model, opt = toy(update_proj_gap=3)
    step = training_step(model, opt)
    if compiled:
        step = torch.compile(step, backend=Interpreted(disable=["fuse", "fuse_products", "opaque"]), fullgraph=True)
    seconds = []
    for index in range(3):
        step(tokens(seed=index), tokens(seed=50 + index))  # two micro-batches: gathered where it is compiled
        seconds.append([record.seconds for record in opt.schedule()])
    first, second = zip(*seconds, strict=True)
    assert 0 < first[0] == first[1] == first[2]
    assert 0 < second[0] < second[1] == second[2]
    assert "seconds" not in repr(opt.schedule())
    twin = copy.deepcopy(opt)
    assert twin.schedule() == opt.schedule()
    assert [record.seconds for record in twin.schedule()] == [0.0, 0.0]
    assert opt.state_dict()["state"][0]["schedule"].shape == (10 + 5,)
