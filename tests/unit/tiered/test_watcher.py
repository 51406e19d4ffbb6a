"""The watcher's thread, and a coordinator that does not answer."""

import logging
from typing import Any

import pytest

from replication.errors import DeadlineError
from tiered.handle import SaveHandle
from tiered.replies import News
from tiered.watcher import Watcher


def test_a_silent_coordinator_is_said_once_and_its_return_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[Any] = [DeadlineError("progress", 5.0)] * 3
    answers += [News({7: ("replicated", "")}, ())]

    def ask(*_: Any, **__: Any) -> News:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("tiered.watcher.cluster.ask", ask)
    coordinator: Any = None
    watcher, handle = (
        Watcher(coordinator, "job", 1, lambda: None),
        SaveHandle(7, is_due_for_s3=False),
    )
    with caplog.at_level(logging.WARNING, "tiered.watcher"):
        watcher.begin(1)
        watcher.watch(handle)
        handle.wait("replicated", timeout_s=10)
        watcher.stop()
    first, last = (record.getMessage() for record in caplog.records)
    assert first.startswith("[job gen=1 rank=1] the coordinator does not answer")
    assert "the coordinator answers again after 0 s" in last
