"""What the executor makes of the silence of S3 and of holders."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from replication.errors import HolderUnavailableError
from replication.fleet import Fleet
from replication.records import HolderId, ShardKey, Version
from tests.unit.tiered.test_job import A, B, C, begun, record
from tiered import executor
from tiered import messages as m
from tiered.config import S3
from tiered.errors import DurableStoreDownError, DurableStoreError
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


# --- before a life is answered --------------------------------------------------------------------

STEP = Version(1, 10)
KEYS = [ShardKey("job", STEP, rank) for rank in range(3)]


class Asked:
    """A fleet in which B finds its copies corrupt, and C does not answer."""

    async def call(self, holder: HolderId, method: str, _: float, keys: Any) -> Any:
        assert method == "verify"
        if holder == C:
            raise HolderUnavailableError(holder.node_id, "silent")
        return list(keys) if holder == B else []


def verified(
    monkeypatch: pytest.MonkeyPatch, manifest: Any, *holders: HolderId, is_needed: bool = False
) -> m.ShardsVerified:
    """What a job with a step on S3 is told when these holders are to read a shard each."""
    monkeypatch.setattr(Executor, "ledger", lambda self, job: SimpleNamespace(manifest=manifest))
    job = begun(s3=S3("s3://bucket/ckpt"), ranks=3)
    job.durable.add(STEP)
    copies = tuple((holder, (key,)) for holder, key in zip(holders, KEYS, strict=False))
    fleet: Any = Asked()

    async def ask() -> m.Event:
        return await Executor(fleet).verify(job, m.VerifyShards(2, STEP, copies, is_needed))

    event = asyncio.run(ask())
    assert isinstance(event, m.ShardsVerified)
    return event


def never(*_: Any) -> Any:
    raise AssertionError("S3 was asked")


def test_a_copy_that_was_not_read_in_time_is_no_bad_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = verified(monkeypatch, lambda *_: (record(10),), A, B, C)
    assert found.bad == ((B, KEYS[1]),)
    assert found.unread == ((C, KEYS[2]),)


def test_s3_is_asked_for_a_manifest_only_where_memory_may_not_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert verified(monkeypatch, never, A) == m.ShardsVerified(2, STEP, ())
    manifest = (record(10),)
    for holders, is_needed in (((B,), False), ((C,), False), ((), True)):
        found = verified(monkeypatch, lambda *_: manifest, *holders, is_needed=is_needed)
        assert (found.manifest, found.problem) == (manifest, "")


@pytest.mark.parametrize(
    ("error", "problem", "is_transient"),
    [
        (DurableStoreError("s3://bucket", "read", "throttled"), "throttled", True),
        (DurableStoreDownError("s3://bucket", "read", "refused"), "refused", True),
        (ValueError("no records"), "its manifest cannot be used: no records", False),
    ],
)
def test_what_s3_does_not_serve_now_is_not_given_up(
    monkeypatch: pytest.MonkeyPatch, error: Exception, problem: str, is_transient: bool
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    found = verified(monkeypatch, fail, is_needed=True)
    assert (found.manifest, found.problem, found.is_transient) == (None, problem, is_transient)


def test_a_manifest_that_does_not_come_in_time_is_not_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(executor, "S3_INDEX_TIMEOUT_S", 0.01)
    end = threading.Event()
    try:
        found = verified(monkeypatch, lambda *_: end.wait(10), is_needed=True)
    finally:
        end.set()
    assert (found.problem, found.is_transient) == ("no answer within 0.01 s", True)
