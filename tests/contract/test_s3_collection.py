"""Orphans and old steps on a real store: found, counted, and deleted in the right order."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pytest

import tiered
from chaos.s3_faults import Fault
from chaos.s3_proxy import FaultProxy
from replication.checksum import digest
from replication.records import Life, ShardKey, ShardPlan, ShardRecord, Version
from tests.contract.conftest import SHARED_BUCKET
from tiered import executor as executor_module
from tiered import register
from tiered.collection import Survey, collect, find_garbage, look
from tiered.config import S3, JobSettings, Memory
from tiered.errors import ConfigError, DurableStoreError
from tiered.executor import Executor
from tiered.garbage import GRACE_S, GarbagePlan, plan_garbage
from tiered.job import Job
from tiered.messages import Claim
from tiered.retention import KeepBest, KeepEvery
from tiered.s3 import S3Store

pytestmark = pytest.mark.usefixtures("pauses")

SHARD = np.arange(1000, dtype=np.uint8)
RANKS = 2


@pytest.fixture
def store(proxy: FaultProxy, root: str) -> Iterator[S3Store]:
    store = S3Store(S3(f"s3://{SHARED_BUCKET}", max_attempts=1), root)
    yield store
    store.close()


def begin(store: S3Store, generation: int, parent: Version | None, **said: Any) -> None:
    settings = replace(store.settings, **said)
    claim = Claim(generation, Life("life"), RANKS, JobSettings(Memory(), settings))
    store.create(register.claim_key(generation), register.encode_claim(claim))
    store.create(register.parent_key(generation, parent), b"")


def flush(
    store: S3Store,
    version: Version,
    *,
    ranks: int = RANKS,
    manifest: bool = True,
    loss: float | None = None,
) -> None:
    records = []
    metrics = () if loss is None else (("loss", loss),)
    for rank in range(RANKS):
        plan = ShardPlan(RANKS, (len(SHARD),), metrics=metrics)
        records.append(ShardRecord(ShardKey(store.root, version, rank), plan, (digest([SHARD]),)))
        if rank < ranks:
            store.upload(register.shard_key(version, rank), [[SHARD]])
    if manifest:
        data = register.encode_manifest(store.root, version, records)
        store.create(register.manifest_key(version), data)


def begin_upload(store: S3Store, version: Version, size_bytes: int) -> None:
    key = f"{store.root}/{register.shard_key(version, 0)}"
    client, at = store.link.client(), {"Bucket": SHARED_BUCKET, "Key": key}
    upload_id = client.create_multipart_upload(**at)["UploadId"]
    if size_bytes:
        body = bytes(size_bytes)
        client.upload_part(**at, UploadId=upload_id, PartNumber=1, Body=body)


def plan(survey: Survey, later_s: float = 2 * GRACE_S, **more: Any) -> GarbagePlan:
    given = {"known_generation": survey.newest_generation, "keep": 2, **more}
    now = survey.now + timedelta(seconds=later_s)
    return plan_garbage(survey.steps, survey.parents, now=now, **given)


def test_old_steps_orphans_and_unfinished_uploads_go_and_the_newest_stay(
    store: S3Store, proxy: FaultProxy
) -> None:
    begin(store, 1, None)
    for number in (10, 20, 30, 40):
        flush(store, Version(1, number))
    flush(store, Version(1, 50), manifest=False)
    begin_upload(store, Version(1, 60), 777)
    begin_upload(store, Version(1, 70), 0)
    store.create("data/notes.txt", b"somebody's")
    survey = look(store, store.root, keep=2)
    assert survey.newest_generation == 1
    assert survey.foreign == ("data/notes.txt",)
    assert [s.problem for s in survey.steps] == [None, None, "", "", None, None, None]

    assert {d.version.step for d in plan(survey, 0).deletions} == {10, 20}, "the grace period"
    garbage = plan(survey)
    assert {d.version.step for d in garbage.deletions} == {10, 20, 50, 60, 70}
    manifests = sum(d.size_bytes for d in garbage.deletions if d.kind == "manifest")
    assert garbage.size_bytes == 3 * RANKS * len(SHARD) + 777 + manifests
    proxy.forget_requests()
    collect(store, garbage)
    deletes = [r.request_bytes for r in proxy.requests if r.operation == "DeleteObjects"]
    assert len(deletes) == 2, "manifests, then shards, in batches"

    left = look(store, store.root, keep=2)
    assert [s.version.step for s in left.steps] == [30, 40]
    assert store.uploads("") == []
    assert store.get("data/notes.txt") == b"somebody's"
    assert plan(left).deletions == ()
    collect(store, garbage)


def test_a_step_that_is_half_there_does_not_count_as_one(store: S3Store) -> None:
    begin(store, 1, None)
    flush(store, Version(1, 10))
    flush(store, Version(1, 20))
    flush(store, Version(1, 30), ranks=1)
    store.upload(register.shard_key(Version(1, 20), 1), [[SHARD[:-1]]])
    store.create(register.manifest_key(Version(1, 40)), b"no manifest of ours")
    survey = look(store, store.root, keep=1)
    problems = {s.version.step: s.problem for s in survey.steps}
    assert problems[10] == ""
    assert problems[20] == "rank 1's shard has 999 bytes, not 1000"
    assert problems[30] == "rank 1's shard is missing"
    assert "cannot be used" in (problems[40] or "")
    garbage = plan(survey, keep=1)
    assert garbage.deletions == ()
    assert len(garbage.spared) == 3


def test_when_a_manifest_cannot_be_deleted_no_shard_is(store: S3Store, proxy: FaultProxy) -> None:
    begin(store, 1, None)
    for number in (10, 20, 30):
        flush(store, Version(1, number))
    garbage = plan(look(store, store.root, keep=1), keep=1)
    denied = Fault("status", "^DeleteObjects ", status=403, code="AccessDenied")
    with proxy.faulted(denied), pytest.raises(DurableStoreError, match="AccessDenied"):
        collect(store, garbage)
    assert len(store.keys("data/")) == 3 * RANKS
    with proxy.faulted(replace(denied, after=1)), pytest.raises(DurableStoreError):
        collect(store, garbage)
    survey = look(store, store.root, keep=1)
    assert [s.manifest is None for s in survey.steps] == [True, True, False]
    collect(store, plan(survey, keep=1))
    assert [s.version.step for s in look(store, store.root).steps] == [30]


def test_a_step_that_is_published_after_the_plan_is_left_alone(store: S3Store) -> None:
    begin(store, 1, None)
    flush(store, Version(1, 10))
    flush(store, Version(1, 20), manifest=False)
    garbage = plan(look(store, store.root))
    assert {d.version.step for d in garbage.deletions} == {20}
    flush(store, Version(1, 20))
    collect(store, garbage)
    assert [s.version.step for s in look(store, store.root).steps] == [10, 20]
    assert len(store.keys("data/")) == 2 * RANKS


def steps_of(store: S3Store) -> list[int]:
    return [s.version.step for s in look(store, store.root).steps]


def test_the_garbage_of_a_job_is_told_then_deleted_by_the_jobs_own_retention(
    store: S3Store,
) -> None:
    begin(store, 1, None, keep=2, also_keep=(KeepEvery(20), KeepBest("loss")))
    for number, loss in ((10, 0.9), (20, 0.8), (30, 0.1), (40, 0.7), (50, 0.6), (60, 0.5)):
        flush(store, Version(1, number), loss=loss)
    flush(store, Version(1, 70), manifest=False)
    begin_upload(store, Version(1, 70), 777)
    told = tiered.collect_garbage(store.root, s3=store.settings, dry_run=True)
    assert {d.version.step for d in told.deletions} == {10}
    assert told.size_bytes > RANKS * len(SHARD)
    assert "step 70 (generation 1): no manifest, but it changed 0.0 h ago" in told.spared
    assert steps_of(store) == [10, 20, 30, 40, 50, 60, 70]

    assert tiered.collect_garbage(store.root, s3=store.settings) == told
    assert steps_of(store) == [20, 30, 40, 50, 60, 70]
    tiered.collect_garbage(store.root, s3=store.settings, keep=1)
    assert steps_of(store) == [20, 30, 40, 60, 70]


def test_what_a_job_says_of_retention_is_needed_for_old_steps_and_not_for_orphans(
    store: S3Store,
) -> None:
    for number in range(10, 80, 10):
        flush(store, Version(1, number))
    assert tiered.collect_garbage(store.root, s3=store.settings).deletions == ()
    begin(store, 1, None, keep=None)
    assert tiered.collect_garbage(store.root, s3=store.settings).deletions == ()
    store.create(register.claim_key(2), b"of a later release")
    with pytest.raises(DurableStoreError, match="it does not say what to keep"):
        tiered.collect_garbage(store.root, s3=store.settings)
    assert len(steps_of(store)) == 7


def test_a_coordinator_deletes_orphans_and_nothing_else_and_not_all_at_once(
    store: S3Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begin(store, 1, None)
    for number in (10, 20, 30):
        flush(store, Version(1, number), manifest=number != 20)
    begin_upload(store, Version(1, 20), 777)
    job = Job(store.root)
    settings = JobSettings(Memory(), replace(store.settings, keep=1))
    job.add_claim(Claim(1, Life("life"), RANKS, settings))
    executor = Executor(fleet=None)  # type: ignore[arg-type]
    asyncio.run(executor.collect_orphans(job))
    assert steps_of(store) == [10, 20, 30], "the grace period"

    def later(*args: Any, **more: Any) -> GarbagePlan:
        return find_garbage(*args, **more, grace_s=-10)

    monkeypatch.setattr(executor_module, "find_garbage", later)
    monkeypatch.setattr(executor_module, "ORPHANS_AT_ONCE", 1)
    with caplog.at_level("INFO"):
        asyncio.run(executor.collect_orphans(job))
    assert "1 orphans deleted from S3, 0.0 MB; 2 are left for the next time" in caplog.text
    monkeypatch.setattr(executor_module, "ORPHANS_AT_ONCE", 100)
    asyncio.run(executor.collect_orphans(job))
    assert steps_of(store) == [10, 30]
    assert store.uploads("") == []
    executor.ledger(job).store(settings).close()


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"keep": True}, {"grace_s": -1.0}])
def test_collecting_with_a_wrong_setting_is_refused(store: S3Store, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        tiered.collect_garbage(store.root, s3=store.settings, **wrong)


def test_the_clock_is_the_stores(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(store, 1, None)
    monkeypatch.setattr("time.time", lambda: 0.0)
    survey = look(store, store.root)
    assert survey.now > datetime(2020, 1, 1, tzinfo=survey.now.tzinfo)


def test_a_store_that_does_not_tell_the_time_deletes_nothing(store: S3Store) -> None:
    def forget(parsed: dict[str, Any], **_: Any) -> None:
        parsed["ResponseMetadata"]["HTTPHeaders"].pop("date")

    store.link.client().meta.events.register("after-call.s3.ListObjectsV2", forget)
    with pytest.raises(DurableStoreError, match="Date header"):
        look(store, store.root)
