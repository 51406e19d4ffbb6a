"""What the executor makes of S3's silence."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from replication.fleet import Fleet
from tests.unit.tiered.test_job import begun
from tiered import executor
from tiered import messages as m
from tiered.config import S3
from tiered.errors import DurableStoreDownError
from tiered.executor import Executor


def answer_of(probe: Any, monkeypatch: pytest.MonkeyPatch) -> m.Event:
    """How S3's answer, or the lack of one, is told to a job that is being flushed there."""
    ledger = SimpleNamespace(store=lambda settings: SimpleNamespace(probe=probe))
    monkeypatch.setattr(Executor, "ledger", lambda self, job: ledger)
    fleet: Any = object.__new__(Fleet)  # nobody is called
    job = begun(s3=S3("s3://bucket/ckpt"))

    async def ask() -> m.Event:
        return await Executor(fleet).ask_durable(job)

    return asyncio.run(ask())


def test_s3_that_answers_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer_of(lambda: None, monkeypatch) == m.DurableAnswered()


def test_why_s3_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise DurableStoreDownError("s3://bucket", "probe", "connection refused")

    assert answer_of(refuse, monkeypatch) == m.DurableAnswered("connection refused")


def test_an_s3_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "S3_ASK_TIMEOUT_S", 0.01)
    end = threading.Event()
    try:
        found = answer_of(lambda: end.wait(10) and None, monkeypatch)
    finally:
        end.set()
    assert found == m.DurableAnswered("no answer within 0.01 s")
