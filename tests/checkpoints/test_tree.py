"""Nested values go through JSON and named tensors, and come back as they were."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.checkpoints.tree import put_together, taken_apart


def through(value: Any) -> Any:
    """A value taken apart, its JSON written and read, and put together."""
    tree, tensors = taken_apart({"it": value})
    return put_together(json.loads(json.dumps(tree, allow_nan=False)), tensors.__getitem__)["it"]


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text(), st.binary(),
    st.sampled_from([torch.float32, torch.int8, torch.device("cpu")]),
)  # fmt: skip
KEYS = st.one_of(st.text(), st.integers(), st.sampled_from(["$tensor", "$dict", "a/b"]), st.booleans())
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_plain_values_come_back_with_their_types(value: Any) -> None:
    found = through(value)
    assert found == value
    assert repr(found) == repr(value)  # 1 is not True, and a list no tuple


@pytest.mark.parametrize("value", [math.inf, -math.inf, np.float64(2.5), np.int64(3), np.bool_(True)])
def test_numbers_that_json_does_not_have_come_back(value: Any) -> None:
    assert through(value) == value


def test_nan_comes_back() -> None:
    assert math.isnan(through(math.nan))


def test_collections_of_other_kinds_come_back() -> None:
    assert through({3, 1}) == {1, 3}
    found = through(Counter({30: 1, 60: 2}))  # of MultiStepLR
    assert type(found) is Counter
    assert found == Counter({30: 1, 60: 2})
    assert through(OrderedDict(a=1)) == {"a": 1}
    assert through(torch.Size([2, 3])) == (2, 3)


TENSORS = [
    torch.arange(6, dtype=torch.int16).view(2, 3), torch.randn(3, 4).t(), torch.tensor(2.5), torch.empty(0, 3),
    torch.randn(5).bfloat16(), torch.tensor([True, False]), torch.tensor([1 + 2j]).conj(), torch.randn(4)[::2],
]  # fmt: skip


@pytest.mark.parametrize("value", TENSORS, ids=lambda value: f"{value.dtype}{tuple(value.shape)}")
def test_tensors_come_back(value: Tensor) -> None:
    found = through([value])[0]
    assert found.dtype == value.dtype
    assert torch.equal(found, value)


@pytest.mark.parametrize("form", ["int8/4", "nf4/4+double", "e4m3"])
def test_quantised_weights_come_back_in_their_format(form: str) -> None:
    weight = qg.quantize_(nn.Sequential(nn.Linear(6, 5).bfloat16()), format=form)[0].weight  # type: ignore[index]
    found = through({"w": weight})["w"]
    assert type(found) is type(weight.detach())  # type: ignore[union-attr]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.dequantize(), weight.dequantize())  # type: ignore[operator,union-attr]


def test_arrays_come_back_as_arrays() -> None:
    state = np.random.RandomState(0).get_state()
    found = through(state)
    assert isinstance(found[1], np.ndarray)
    assert found[1].dtype == np.uint32
    assert (found[1] == state[1]).all()
    assert (found[0], found[2:]) == (state[0], state[2:])


def test_an_object_stands_for_its_state() -> None:
    scheduler = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([torch.ones(1)], lr=1.0), [3, 7])
    assert through({"scheduler": scheduler}) == {"scheduler": scheduler.state_dict()}


def test_one_memory_is_one_tensor_and_equal_names_are_told_apart() -> None:
    one, other = torch.ones(2), torch.zeros(2)
    tree, tensors = taken_apart({"x": {"a/b": one, "a": {"b": other, "c": one}}})
    assert len(tensors) == 2
    found = put_together(tree, tensors.__getitem__)["x"]
    assert torch.equal(found["a/b"], one)
    assert torch.equal(found["a"]["b"], other)
    assert torch.equal(found["a"]["c"], one)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"f": print}, r"it/f is of type builtin_function_or_method, which has no place"),
        ([1, object()], r"it/1 is of type object"),
        (torch.ones(2, 2).to_sparse(), r"it: a tensor of layout torch\.sparse_coo"),
        (torch.empty(2, device="meta"), "it: it is on the meta device"),
    ],
)
def test_what_has_no_place_is_named(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        taken_apart({"it": value})


def test_what_a_later_version_wrote_is_named() -> None:
    with pytest.raises(ValueError, match=r"'\$later' is not known"):
        put_together({"$later": 1}, {}.__getitem__)
