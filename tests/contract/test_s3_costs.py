"""A flush makes as many requests as `requests_per_flush` says: counted on their way."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from chaos.s3_proxy import FaultProxy
from replication.checksum import digest
from replication.records import Life, ShardKey, ShardPlan, ShardRecord, Version
from tests.contract.conftest import SHARED_BUCKET
from tests.contract.fake_store import FakeStore
from tiered import register
from tiered.config import MIB, S3, JobSettings, Memory
from tiered.ledger import Ledger
from tiered.messages import Claim
from tiered.s3_parts import Requests, requests_per_flush

KINDS = {
    "PutObject": "put",
    "CreateMultipartUpload": "put",
    "UploadPart": "put",
    "CompleteMultipartUpload": "put",
    "ListObjectsV2": "list",
    "ListMultipartUploads": "list",
    "GetObject": "get",
    "HeadObject": "get",
}
SIZES = (100, 5 * MIB, 5 * MIB + 1, 11 * MIB)


@pytest.fixture
def settings() -> JobSettings:
    return JobSettings(Memory(), S3(f"s3://{SHARED_BUCKET}", part_bytes=5 * MIB))


@pytest.mark.parametrize(
    ("generations", "sizes"),
    [
        (1, SIZES),
        (3, SIZES),
        pytest.param(2, (100,) * 1001, marks=pytest.mark.slow, id="1,001 ranks"),
    ],
)
def test_a_flush_costs_what_is_said(
    proxy: FaultProxy,
    root: str,
    settings: JobSettings,
    generations: int,
    sizes: Sequence[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger = Ledger(root)
    monkeypatch.setattr(ledger, "_gcs", FakeStore())  # the register of the cluster
    for generation in range(1, generations + 1):
        assert ledger.claim(Claim(generation, Life("life"), len(sizes), settings)).is_ours
        ledger.record_parent(generation, None)
        ledger.mirror(settings)
    store, version = ledger.store(settings), Version(generations, 40)
    proxy.forget_requests()

    def upload(rank: int) -> ShardRecord:
        image = np.random.default_rng(rank).integers(0, 256, sizes[rank], np.uint8)
        store.upload(register.shard_key(version, rank), [[image]])
        plan = ShardPlan(len(sizes), (sizes[rank],))
        return ShardRecord(ShardKey(root, version, rank), plan, (digest([image]),))

    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(upload, range(len(sizes))))
    assert ledger.publish(generations, version, records, settings) == ""

    kinds = [KINDS[request.operation] for request in proxy.requests]
    bodies = [r for r in proxy.requests if r.operation in ("UploadPart", "PutObject")]
    counted = Requests(
        put=kinds.count("put"),
        list=kinds.count("list"),
        get=kinds.count("get"),
        size_bytes=sum(r.request_bytes for r in bodies if "/data/" in r.target),
    )
    assert counted == requests_per_flush(sizes, 5 * MIB, generations=generations)
    store.close()


def test_a_step_that_is_not_whole_is_not_published(
    proxy: FaultProxy, root: str, settings: JobSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, version = Ledger(root), Version(1, 40)
    monkeypatch.setattr(ledger, "_gcs", FakeStore())
    store = ledger.store(settings)
    image = np.zeros(100, np.uint8)
    plan = ShardPlan(2, (100,))
    records = [
        ShardRecord(ShardKey(root, version, rank), plan, (digest([image]),)) for rank in (0, 1)
    ]
    store.upload(register.shard_key(version, 0), [[image]])
    assert "rank 1's shard is missing" in ledger.publish(1, version, records, settings)
    assert store.keys("index/step/") == []
    store.close()
