"""Who this process is: who is asked first, and what is said when the answer makes no sense."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch.distributed as dist

from replication.records import Owner
from tiered.errors import ConfigError
from tiered.worker import Worker, find_worker, new_life, ranks_on_host


def in_ray_train(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 10)
    train = SimpleNamespace(get_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray.train", train)
    monkeypatch.setattr(ray, "train", train, raising=False)


def in_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 20)


def under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "30")


PLACES: list[Callable[[pytest.MonkeyPatch], None]] = [
    in_ray_train, in_torch_distributed, under_a_launcher,
]  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray.train", raising=False)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_nobody_else_is_rank_0_of_1() -> None:
    assert find_worker(None, None) == Worker(0, 1)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_places_are_asked_in_order(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    for place in PLACES[first:]:
        place(monkeypatch)
    assert find_worker(None, None) == Worker(first + 1, 10 * (first + 1))
    assert find_worker(0, 4) == Worker(0, 4)  # what the user says goes before them all


def test_ray_train_imported_but_not_running_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> Any:
        raise RuntimeError("`get_context` must be called inside of a training function")

    in_ray_train(monkeypatch)
    monkeypatch.setattr(sys.modules["ray.train"], "get_context", refuse)
    assert find_worker(None, None) == Worker(0, 1)


def test_ray_train_is_not_imported_for_the_question() -> None:
    find_worker(None, None)
    assert "ray.train" not in sys.modules


@pytest.mark.parametrize(("rank", "world_size"), [(0, None), (None, 1)])
def test_one_without_the_other_is_refused(rank: int | None, world_size: int | None) -> None:
    with pytest.raises(ConfigError, match="both rank= and world_size=, or neither"):
        find_worker(rank, world_size)


@pytest.mark.parametrize(
    ("rank", "world_size"),
    [(1, 1), (-1, 2), (0, 0), (0, -1), (True, 2), (0, True), (0.0, 1), ("0", "1"), (0, "1")],
)
def test_what_does_not_fit_is_refused_with_both_values(rank: Any, world_size: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        find_worker(rank, world_size)
    assert f"rank={rank!r} " in str(caught.value)
    assert f"world_size={world_size!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("rank", "world_size"),
    [
        ("x", "2"),
        ("2", "2"),
        ("-1", "2"),
        ("", "1"),
        ("0", ""),
        ("0", "0"),
        ("1.0", "2"),
        ("²", "9"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused_with_both_values(
    monkeypatch: pytest.MonkeyPatch, rank: str, world_size: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(ConfigError) as caught:
        find_worker(None, None)
    assert f"RANK={rank!r} and WORLD_SIZE={world_size!r}" in str(caught.value)
    assert find_worker(0, 1) == Worker(0, 1)


@pytest.mark.parametrize(
    ("said", "count"),
    [("4", 4), ("30", 30), ("31", 30), ("0", 30), ("-1", 30), ("x", 30), ("", 30)],
)
def test_the_launcher_says_how_many_ranks_a_host_has(
    monkeypatch: pytest.MonkeyPatch, said: str, count: int
) -> None:
    assert ranks_on_host(Worker(3, 30)) == 30  # to be on the safe side
    monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
    assert ranks_on_host(Worker(3, 30)) == count


def test_ray_train_says_how_many_ranks_a_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    in_ray_train(monkeypatch)
    context = sys.modules["ray.train"].get_context()
    monkeypatch.setattr(context, "get_local_world_size", lambda: 5, raising=False)
    monkeypatch.setattr(sys.modules["ray.train"], "get_context", lambda: context)
    assert ranks_on_host(Worker(1, 10)) == 5


OWNER = Owner("run", "node", "host", 7, 1.5, "mark")


def test_a_single_rank_names_its_own_life() -> None:
    names = {new_life(Worker(0, 1), None)[0] for _ in range(100)}
    assert len(names) == 100
    assert all(len(name) == 32 for name in names)
    assert new_life(Worker(0, 1), OWNER)[1] == OWNER


def test_several_ranks_need_a_process_group() -> None:
    with pytest.raises(ConfigError, match=r"4 ranks have to agree.*init_process_group\(\)"):
        new_life(Worker(0, 4), None)


def test_all_ranks_take_the_name_and_the_process_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast(said: list[Any], src: int) -> None:
        assert (len(said), src) == (1, 0)
        said[0] = ("of rank 0", OWNER)

    in_torch_distributed(monkeypatch)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    assert new_life(Worker(2, 20), None) == ("of rank 0", OWNER)
