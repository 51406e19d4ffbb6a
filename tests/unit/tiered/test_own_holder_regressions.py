"""What chaos found in how a rank finds its host's holder, and talks to it."""

from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from replication.errors import HolderUnavailableError
from replication.records import HolderId
from tiered import cluster
from tiered.own_holder import Call, OwnHolder


def test_a_holder_that_dies_while_it_is_looked_up_is_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The coordinator had not noticed yet; Ray's ValueError ended the training."""

    def gone(*_: Any) -> None:
        raise ValueError("Failed to look up actor with name 'holder-host'")

    monkeypatch.setattr(cluster, "ask", lambda *_, **__: HolderId("host", "one"))
    monkeypatch.setattr(ray, "get_actor", gone)
    holder = OwnHolder.__new__(OwnHolder)
    holder.node_id, holder._coordinator = "host", None
    with pytest.raises(HolderUnavailableError, match="it has just died") as raised:
        holder._find()
    assert raised.value.retryable


def answering(monkeypatch: pytest.MonkeyPatch, outcomes: list[Exception | None]) -> OwnHolder:
    """A rank's holder whose calls end like this, one after the other."""

    def get(_: Any, timeout: float) -> None:
        assert timeout >= 0.0
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(cluster, "RETRY_PAUSE_S", 0.0)
    holder = OwnHolder.__new__(OwnHolder)
    holder.node_id, holder.deaths, holder.declared_bytes = "host", 0, 7
    holder._actor, holder._silence = None, cluster.Silence()
    monkeypatch.setattr(holder, "_find", lambda: "its successor")
    return holder


def counting(made: list[int], number: int) -> Callable[[], int]:
    return lambda: made.append(number) or number


def lost() -> ActorUnavailableError:
    return ActorUnavailableError("the call may have run", actor_id=None)


def test_calls_that_were_lost_are_made_again_while_the_holder_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One lost call failed the save, and the step could never be committed."""
    made: list[int] = []
    holder = answering(monkeypatch, [None, lost(), lost(), None, None])
    holder.settle([Call(counting(made, number)) for number in range(3)])
    assert made == [0, 1, 2, 1, 1]
    assert (holder.deaths, holder._actor) == (0, None)


def test_a_holder_that_died_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    holder = answering(monkeypatch, [lost(), ActorDiedError()])
    with pytest.raises(HolderUnavailableError, match="it died"):
        holder.settle([Call(counting(made, 0)), Call(counting(made, 1))])
    assert made == [0, 1, 0]
    assert (holder.deaths, holder._actor, holder.declared_bytes) == (1, "its successor", 0)


def test_calls_that_are_lost_again_and_again_end_with_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    holder = answering(monkeypatch, [lost(), lost(), GetTimeoutError()])
    noted: list[str] = []
    monkeypatch.setattr(holder._silence, "note", lambda name, _: noted.append(name))
    holder._actor = Silent()
    with pytest.raises(HolderUnavailableError, match="silent"):
        holder.settle([Call(lambda: None)])
    assert (noted, holder.deaths) == (["host"], 0)


class Silent:
    """An actor's handle."""

    hello = None
