"""Restoring when what is on S3 is damaged: the next source, an older step, or a clear word."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from chaos.s3_faults import Fault
from chaos.s3_proxy import FaultProxy
from replication.records import ShardKey, ShardRecord, Version
from tests.contract.conftest import SHARED_BUCKET
from tests.unit.tiered.fake_shard import MemoryTier, Shard
from tiered import register
from tiered.config import MIB, S3
from tiered.errors import StepNotFoundError
from tiered.fetch import DurableTier, ShardReader
from tiered.history import ShardSources
from tiered.ledger import read_manifest
from tiered.recovery import _resolve_on_s3
from tiered.s3 import S3Store

pytestmark = pytest.mark.usefixtures("pauses")


@pytest.fixture(scope="module")
def shard() -> Shard:
    return Shard({"x": torch.arange(40_000, dtype=torch.float32)}, chunk_bytes=65_536)


@pytest.fixture
def store(proxy: FaultProxy, root: str, shard: Shard) -> Iterator[S3Store]:
    store = S3Store(S3(f"s3://{SHARED_BUCKET}", part_bytes=5 * MIB, max_attempts=2), root)
    store.upload(key_of(shard), shard.chunks)
    proxy.forget_requests()
    yield store
    store.close()


def key_of(shard: Shard) -> str:
    return register.shard_key(shard.record.key.version, shard.record.key.rank)


def reader_of(store: S3Store, shard: Shard, *others: MemoryTier) -> ShardReader:
    sources = ShardSources(shard.record, (), is_durable=True)
    return ShardReader(sources, [DurableTier(store, sources), *others])


def image_of(reader: ShardReader) -> bytes:
    return b"".join(buffer.tobytes() for chunk in reader.chunks() for buffer in chunk)


def test_each_chunk_is_one_range_and_nothing_else_is_read(
    store: S3Store, shard: Shard, proxy: FaultProxy
) -> None:
    sizes = shard.record.plan.chunk_sizes
    reader_of(store, shard).chunk(1)
    (request,) = proxy.requests
    assert request.headers["range"] == f"bytes={sizes[0]}-{sizes[0] + sizes[1] - 1}"
    assert request.response_bytes == sizes[1]
    proxy.forget_requests()
    assert image_of(reader_of(store, shard)) == shard.image
    assert sum(r.response_bytes for r in proxy.requests) == len(shard.image)


@pytest.mark.parametrize("kind", ["flip", "truncate", "cut_response"])
def test_a_chunk_that_is_damaged_on_its_way_is_read_again(
    store: S3Store, shard: Shard, proxy: FaultProxy, kind: Any
) -> None:
    with proxy.faulted(Fault(kind, "^GetObject ", after=1)):
        assert image_of(reader_of(store, shard)) == shard.image
    assert proxy.count("GetObject") == len(shard.chunks) + 1


def test_a_flipped_byte_on_s3_sends_the_reader_to_the_next_source(
    store: S3Store, shard: Shard, proxy: FaultProxy
) -> None:
    buddy = MemoryTier(shard.chunks, "buddy", "host b")
    with proxy.faulted(Fault("flip", "^GetObject ", times=None)):
        reader = reader_of(store, shard, buddy)
        assert image_of(reader) == shard.image
    assert reader.bytes_by_label == {"buddy": len(shard.image)}


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("flip", "from S3 is corrupt"),
        ("foreign", "from S3 is corrupt"),
        ("truncated", r"the object has \d+ bytes, not the"),
        ("gone", "it is not there|NoSuchKey"),
    ],
)
def test_without_another_source_the_error_says_what_is_wrong(
    store: S3Store, shard: Shard, damage: str, problem: str
) -> None:
    image = bytearray(shard.image)
    image[-5] ^= 0xFF
    other = {
        "flip": bytes(image),
        "foreign": bytes(len(image)),
        "truncated": bytes(image[: len(image) // 2]),
    }
    store.delete([key_of(shard)])
    if damage in other:
        store.upload(key_of(shard), [[np.frombuffer(other[damage], np.uint8)]])
    reader = reader_of(store, shard)
    with pytest.raises(StepNotFoundError, match=problem):
        image_of(reader)
    assert reader.is_rotten, "or the next life would try the same step again"


def test_an_s3_that_refuses_says_nothing_of_what_it_has(
    store: S3Store, shard: Shard, proxy: FaultProxy
) -> None:
    reader = reader_of(store, shard)
    denied = Fault("status", "^GetObject ", status=403, code="AccessDenied", times=None)
    with proxy.faulted(denied), pytest.raises(StepNotFoundError, match="AccessDenied"):
        image_of(reader)
    assert not reader.is_rotten


def test_resolving_goes_past_everything_that_is_not_whole_and_says_so(
    store: S3Store, shard: Shard
) -> None:
    def flush(step: int, image: bytes | None, job: str = store.root) -> None:
        version = Version(1, step)
        record = ShardRecord(ShardKey(job, version, 0), shard.record.plan, shard.record.digests)
        if image is not None:
            store.upload(register.shard_key(version, 0), [[np.frombuffer(image, np.uint8)]])
        data = register.encode_manifest(job, version, [record])
        store.create(register.manifest_key(version), data)

    store.create(register.parent_key(1, None), b"")
    flush(10, shard.image)
    flush(20, None)
    flush(30, shard.image[:-1])
    flush(40, shard.image, job="another-job")
    store.create(register.manifest_key(Version(1, 50)), b"half a manif")
    store.upload(register.shard_key(Version(1, 60), 0), shard.chunks)  # never published

    found = _resolve_on_s3(store.root, store, None, None)
    assert found.version == Version(1, 10)
    told = "\n".join(found.passed_over)
    size = len(shard.image)
    assert "step 20 (generation 1): its manifest cannot be used: rank 0's shard is missing" in told
    assert f"rank 0's shard has {size - 1} bytes, not {size}" in told
    assert "step 40" in told
    assert "step 50 (generation 1): its manifest cannot be used: not a manifest" in told
    assert "step 60" not in told
    with pytest.raises(ValueError, match="it is gone"):
        read_manifest(store, store.root, Version(1, 60))
