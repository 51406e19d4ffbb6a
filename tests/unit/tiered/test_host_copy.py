"""What training changes after the copy was made is not in it."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardOf
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.unit.tiered.fake_shard import assert_same
from tiered.host_copy import copied


class Pair(NamedTuple):
    left: torch.Tensor
    right: int


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_plain_values_keep_their_types_and_share_nothing() -> None:
    state: dict[str, Any] = {
        "plain": torch.ones(3),
        "strided": torch.arange(6.0).reshape(2, 3).t(),
        "empty": torch.empty(0, 2),
        "deep": [{"tuple": (torch.ones(2), 1)}, torch.ones(1)],
        "array": np.ones(2),
        "number": 3,
    }
    expected = copy.deepcopy(state)
    found = copied(state)
    for tensor in (state["plain"], state["strided"], state["deep"][0]["tuple"][0]):
        tensor.zero_()
    state["array"][0] = 7
    state["deep"].append("later")
    assert_same(found, expected)


def test_a_named_tuple_and_a_parameter() -> None:
    state = {"pair": Pair(torch.ones(2), 1), "weight": torch.nn.Parameter(torch.ones(2))}
    found = copied(state)
    with torch.no_grad():
        state["weight"].zero_()  # type: ignore[union-attr]
        state["pair"].left.zero_()  # type: ignore[union-attr]
    assert type(found["pair"]) is Pair
    assert found["pair"].left.tolist() == found["weight"].tolist() == [1, 1]
    assert not found["weight"].requires_grad


def test_what_is_tied_stays_tied() -> None:
    weight = torch.ones(4)
    found = copied({"a": weight, "b": weight.detach(), "half": weight[:2]})
    assert found["a"].data_ptr() == found["b"].data_ptr() != weight.data_ptr()
    assert found["half"].tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning")
@pytest.mark.filterwarnings("ignore:DTensor random operators")
def test_tensors_that_are_sharded(mesh: DeviceMesh) -> None:
    local = Shard.from_tensor_and_offsets(torch.ones(3, 2), [0, 0], 0)
    state = {
        "dtensor": DTensor.from_local(torch.ones(4), mesh, [ShardOf(0)], run_check=False),
        "sharded": init_from_local_shards([local], 3, 2),
    }
    found = copied(state)
    state["dtensor"].zero_()
    local.tensor.zero_()
    assert found["dtensor"].placements == state["dtensor"].placements
    assert found["dtensor"].to_local().tolist() == [1, 1, 1, 1]
    assert found["sharded"].local_shards()[0].tensor.tolist() == [[1, 1]] * 3
    assert found["sharded"].metadata() == state["sharded"].metadata()
