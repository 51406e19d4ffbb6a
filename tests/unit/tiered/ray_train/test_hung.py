"""Who hangs: only a worker that is silent on a host that is silent, and only after a while."""

import socket
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray

from tiered.ray_train import hung
from tiered.ray_train.hung import Contact, HungWorkers, Watched

AFTER_S = 10.0


@dataclass
class Actors:
    """Actors by name, and who of them does not answer."""

    silent: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def contact(self, name: str) -> Contact:
        def ask() -> str:
            self.asked.append(name)
            return name

        return Contact(ask, lambda question: question not in self.silent)


@pytest.fixture
def actors() -> Actors:
    return Actors()


@pytest.fixture
def watch(actors: Actors) -> HungWorkers:
    workers = [Watched(0, "a", None), Watched(1, "b", None), Watched(2, "no holder", None)]
    contacts = {w.rank: actors.contact(f"worker {w.rank}") for w in workers}
    holders = {host: actors.contact(f"holder {host}") for host in "ab"}
    return HungWorkers(workers, contacts, holders)


def ranks(watch: HungWorkers, *times_s: float) -> list[list[int]]:
    return [[w.rank for w in watch.find(AFTER_S, now_s)] for now_s in times_s]


def test_a_silent_worker_on_a_silent_host_is_found_once(watch: HungWorkers, actors: Actors) -> None:
    assert ranks(watch, 0.0, 2.0) == [[], []]
    actors.silent |= {"worker 1", "holder b"}
    assert ranks(watch, 4.0, 8.0, 11.9, 12.0, 14.0) == [[], [], [], [1], []]


@pytest.mark.parametrize("silent", [{"worker 1"}, {"holder b"}, {"worker 1", "holder a"}])
def test_one_that_answers_for_its_host_is_enough(
    watch: HungWorkers, actors: Actors, silent: set[str]
) -> None:
    ranks(watch, 0.0)
    actors.silent |= silent
    assert ranks(watch, 10.0, 100.0) == [[], []]


def test_a_host_that_wakes_up_has_another_chance(watch: HungWorkers, actors: Actors) -> None:
    ranks(watch, 0.0)
    actors.silent |= {"worker 1", "holder b"}
    assert ranks(watch, 9.0) == [[]]
    actors.silent.clear()
    assert ranks(watch, 11.0) == [[]]
    actors.silent |= {"worker 1", "holder b"}
    assert ranks(watch, 20.0, 21.0) == [[], [1]]


def test_a_host_without_a_holder_is_not_judged(watch: HungWorkers, actors: Actors) -> None:
    ranks(watch, 0.0)
    actors.silent |= {"worker 2"}
    assert ranks(watch, 100.0) == [[]]


def test_a_question_stays_open(watch: HungWorkers, actors: Actors) -> None:
    ranks(watch, 0.0)
    actors.silent |= {"worker 1", "holder b"}
    actors.asked.clear()
    ranks(watch, 1.0, 2.0, 3.0)
    assert actors.asked.count("worker 0") == 3
    assert "worker 1" not in actors.asked


def test_a_host_that_refuses_connections_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listening, socket.socket() as closed:
        for one in (listening, closed):
            one.bind(("127.0.0.1", 0))
        listening.listen()

        def node(node_id: str, one: socket.socket, *, is_alive: bool = True) -> dict[str, Any]:
            address, port = one.getsockname()
            place = {"NodeManagerAddress": address, "NodeManagerPort": port}
            return {"NodeID": node_id, "Alive": is_alive, **place}

        nodes = [node("hangs", listening), node("gone", closed), node("not asked", listening)]
        nodes.append(node("dead to Ray", listening, is_alive=False))
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        began_s = time.monotonic()
        found = hung._accepting({"hangs", "gone", "dead to Ray"}, began_s + 30.0)
        assert found == {"hangs"}
        assert time.monotonic() - began_s < 10.0
