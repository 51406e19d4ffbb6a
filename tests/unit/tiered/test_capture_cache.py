"""Capturing a state again with what was remembered gives what capturing it anew gives."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tiered.errors import StateError
from tiered.image import lay_out
from tiered.state import CaptureCache, Captured, capture


def model() -> dict[str, Any]:
    shared = torch.arange(6.0)
    return {
        "model": {f"w{i}": torch.full((2, 3), float(i)) for i in range(4)},
        "optimizer": {"state": {0: {"m": torch.ones(3), "v": torch.zeros(3)}}, "lr": 0.1},
        "tied": {"a": shared, "b": shared},
        "empty": {"x": torch.empty(0), "y": torch.empty(0)},
        "step": 1,
    }


def assert_same(one: Captured, other: Captured) -> None:
    assert one.tree == other.tree
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.data_ptr() == other.tensors[name].data_ptr(), name
        assert tensor.shape == other.tensors[name].shape
        assert not tensor.requires_grad


def replace(state: dict[str, Any]) -> None:
    state["model"]["w1"] = torch.zeros(2, 3)


def reshape(state: dict[str, Any]) -> None:
    state["model"]["w1"] = state["model"]["w1"].view(3, 2)


def retype(state: dict[str, Any]) -> None:
    state["model"]["w1"] = state["model"]["w1"].view(torch.int32)


def transpose(state: dict[str, Any]) -> None:
    state["model"]["w0"] = torch.zeros(3, 3)
    state["model"]["w0"] = state["model"]["w0"].t()


def add(state: dict[str, Any]) -> None:
    state["model"]["w9"] = torch.zeros(1)


def remove(state: dict[str, Any]) -> None:
    del state["model"]["w0"]


def rename(state: dict[str, Any]) -> None:
    state["model"]["w9"] = state["model"].pop("w0")


def tie(state: dict[str, Any]) -> None:
    state["optimizer"]["state"][0]["m"] = state["optimizer"]["state"][0]["v"]


def tie_across(state: dict[str, Any]) -> None:
    state["late"] = {"alias": state["model"]["w2"], "own": torch.ones(2)}


def tie_before(state: dict[str, Any]) -> None:
    first = {"alias": state["model"]["w2"]}
    late = dict(state)
    state.clear()
    state.update({"first": first, **late})


def untie(state: dict[str, Any]) -> None:
    state["tied"]["b"] = state["tied"]["b"].clone()


def no_tensor(state: dict[str, Any]) -> None:
    state["model"]["w1"] = 3


def grow(state: dict[str, Any]) -> None:
    state["empty"]["x"] = torch.ones(2)


def need_gradients(state: dict[str, Any]) -> None:
    state["model"]["w1"].requires_grad_()


def values(state: dict[str, Any]) -> None:
    state["model"]["w1"].add_(1)
    state["step"] = 2


CHANGES = [
    values, replace, reshape, retype, transpose, add, remove, rename, tie, tie_across, tie_before,
    untie, no_tensor, grow, need_gradients,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_remembered_never_shows(change: Callable[[dict[str, Any]], None]) -> None:
    state, cache = model(), CaptureCache()
    for _ in range(2):
        assert_same(capture(state, cache=cache), capture(state))
    change(state)
    for _ in range(2):
        assert_same(capture(state, cache=cache), capture(state))


@pytest.mark.parametrize("change", CHANGES)
def test_an_equal_signature_means_an_equal_layout(
    change: Callable[[dict[str, Any]], None],
) -> None:
    state, cache = model(), CaptureCache()
    before = capture(state, cache=cache)
    assert capture(state, cache=cache).signature == before.signature
    change(state)
    after = capture(state, cache=cache)
    if after.signature == before.signature:
        assert lay_out(after).spans == lay_out(before).spans
        assert lay_out(after).entries == lay_out(before).entries
    else:
        assert change not in (values, replace, need_gradients)


def test_an_empty_tensor_on_another_device_is_another_one() -> None:
    state, cache = model(), CaptureCache()
    capture(state, cache=cache)
    state["empty"]["x"] = torch.zeros(0, device="meta")
    with pytest.raises(StateError, match=r"empty\.x"):
        capture(state, cache=cache)


@pytest.mark.parametrize("kind", ["sparse", "nested", "meta"])
def test_what_cannot_be_saved_is_named_where_something_was_remembered(kind: str) -> None:
    state, cache = model(), CaptureCache()
    capture(state, cache=cache)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state["model"]["w1"] = {
            "sparse": lambda: torch.eye(2).to_sparse(),
            "nested": lambda: torch.nested.nested_tensor(
                [torch.zeros(2), torch.zeros(3)], layout=torch.strided
            ),
            "meta": lambda: torch.zeros(2, 3, device="meta"),
        }[kind]()
    with pytest.raises(StateError, match=r"model\.w1"):
        capture(state, cache=cache)


def test_nothing_of_the_state_is_kept_alive() -> None:
    state, cache = model(), CaptureCache()
    capture(state, cache=cache)
    remembered = [known for known in cache.values() if known.names[0].startswith("model")]
    assert remembered
    assert not any(
        isinstance(value, torch.Tensor) for known in remembered for value in known.packed().values()
    )
