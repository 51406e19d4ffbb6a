"""The global generators: a resumed run draws what the lost one would have drawn."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.tiered.fake_shard import Shard, assert_same, read_state, restore_into
from tiered.rng import RngState


@pytest.fixture(autouse=True)
def generators() -> Iterator[None]:
    bits, before = np.random.get_bit_generator(), RngState().state_dict()
    yield
    np.random.set_bit_generator(bits)
    RngState().load_state_dict(before)


def draw() -> list[Any]:
    return [
        torch.rand(3).tolist(), torch.randn(1).item(), random.random(), random.gauss(0, 1),
        np.random.rand(3).tolist(), np.random.standard_normal(), random.randrange(10**30),
    ]  # fmt: skip


def scramble(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def test_every_generator_goes_on_where_it_was() -> None:
    scramble(1)
    draw()  # one gauss of each pair is now held back
    shard = Shard({"rng": RngState()})
    expected = [draw(), draw()]
    scramble(2)
    assert draw() not in expected
    restore_into({"rng": RngState()}, shard.reader())
    assert [draw(), draw()] == expected


def test_the_state_is_whole_and_needs_no_pickle() -> None:
    state = {"rng": RngState()}
    back = read_state(Shard(state).reader())["rng"]
    assert_same(RngState().state_dict(), back)
    assert back.keys() == {"torch", "python", "numpy"}


def test_a_bit_generator_of_the_users_choice_is_saved_too() -> None:
    np.random.set_bit_generator(np.random.PCG64(7))
    shard = Shard({"rng": RngState()})
    expected = draw()
    np.random.set_bit_generator(np.random.PCG64(8))
    restore_into({"rng": RngState()}, shard.reader())
    assert draw() == expected


def test_cuda_generators_are_saved_where_cuda_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.arange(4, dtype=torch.uint8), torch.arange(5, dtype=torch.uint8)]
    loaded: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", loaded.append)
    shard = Shard({"rng": RngState()})
    restore_into({"rng": RngState()}, shard.reader())
    assert_same(states, loaded[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    restore_into({"rng": RngState()}, shard.reader())  # resumed on a host without one
    assert len(loaded) == 1
