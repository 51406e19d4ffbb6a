"""Asking the coordinator while something else is being done."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError

from replication.errors import DeadlineError
from tiered import cluster
from tiered.cluster import Asked


class Actor:
    """Counts its calls, each of which has the next outcome."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *outcomes: Any) -> None:
        self.calls, self.now = 0, 100.0
        left = list(outcomes)

        def get(_: Any, timeout: float) -> Any:
            assert timeout > 0.0
            outcome = left.pop(0)
            if isinstance(outcome, GetTimeoutError):
                self.now += timeout
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(ray, "get", get)
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=lambda _: None)
        monkeypatch.setattr(cluster, "time", clock)

    @property
    def begin(self) -> "Actor":
        return self

    def remote(self) -> None:
        self.calls += 1


def test_an_answer_that_came_in_time_is_taken_though_it_was_asked_for_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The state took longer to be looked at than the coordinator has to answer."""
    actor = Actor(monkeypatch, "answer")
    asked = Asked(actor, "begin", timeout_s=5.0)
    actor.now += 60.0
    assert asked.answer() == "answer"


def test_no_answer_is_an_error_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = ActorUnavailableError("it restarts", actor_id=None)
    actor = Actor(monkeypatch, lost, GetTimeoutError())
    asked = Asked(actor, "begin", timeout_s=0.5)
    with pytest.raises(DeadlineError, match=r"begin of the .* 0.5 s.*no answer"):
        asked.answer()
    assert (actor.calls, actor.now) == (2, 100.5)
