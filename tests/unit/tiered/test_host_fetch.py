"""Which shards come by way of the reader's own holder, and what happens when that cannot help."""

from typing import Any

import numpy as np
import pytest
import ray
import torch

from replication.errors import HolderUnavailableError
from replication.fetch_once import AtHolder
from replication.records import (
    ActorRef,
    ByteRange,
    Chunk,
    HolderId,
    ShardKey,
    ShardPlan,
    ShardRecord,
    Version,
)
from replication.shared import SharedMemoryTransport
from replication.sink import Sink
from tests.contract.fake_store import FakeStore
from tests.unit.tiered.fake_shard import Shard
from tiered.errors import StepNotFoundError
from tiered.fetch import DurableTier, HolderTier, ShardReader, tiers_of
from tiered.history import ShardSources
from tiered.host_fetch import HostTier, by_own_holder, wanted_often

HERE, THERE, FAR = HolderId("here", "1"), HolderId("there", "2"), HolderId("far", "3")


def sources(rank: int, *digests: bytes) -> ShardSources:
    key = ShardKey("job", Version(1, 2), rank)
    plan = ShardPlan(2, (1, *[100] * (len(digests) - 1)))
    return ShardSources(ShardRecord(key, plan, digests), (THERE,), is_durable=False)


def test_shards_that_have_most_bytes_in_common_are_wanted_often() -> None:
    alike = [sources(0, b"f0", b"x", b"y", b"p"), sources(1, b"f1", b"x", b"y", b"q")]
    other = sources(2, b"f2", b"x", b"r", b"s")
    assert wanted_often([*alike, other], 3) == [True, True, False]


def test_what_a_shard_has_twice_itself_is_not_another_one_s() -> None:
    assert wanted_often([sources(0, b"f0", b"x", b"x"), sources(1, b"f1", b"y", b"z")], 2) == [
        False,
        False,
    ]


def test_fewer_shards_than_ranks_are_wanted_often() -> None:
    shards = [sources(0, b"f0", b"x"), sources(1, b"f1", b"y")]
    assert wanted_often(shards, 3) == [True, True]
    assert wanted_often(shards, 1) == [False, False]
    assert wanted_often([], 4) == []


def test_only_other_hosts_are_read_by_way_of_the_own_holder() -> None:
    shard = Shard({"x": torch.zeros(3)})
    found = ShardSources(shard.record, (THERE, HERE, FAR), is_durable=True)
    tiers = by_own_holder(
        tiers_of(found, HERE.node_id, FakeStore()), HERE.node_id, SharedMemoryTransport()
    )
    kinds = [type(tier) for tier in tiers]
    assert kinds == [
        HolderTier, HostTier, HolderTier, HostTier, HolderTier, HostTier, DurableTier
    ]  # fmt: skip
    own, by_holder, there, _, far, s3_by_holder, s3 = tiers
    assert own.name == "host here"
    assert by_holder.name == "host there, by way of this host's holder"
    assert by_holder.label == there.label
    assert (there.name, far.name) == ("host there", "host far")
    assert (s3_by_holder.name, s3.name) == ("S3, by way of this host's holder", "S3")
    assert s3_by_holder.label == s3.label


class Behind(HolderTier):
    """A buddy whose holder need not be asked how to read from it, and which can be read."""

    def __init__(self, shard: Shard) -> None:
        super().__init__(THERE, ShardSources(shard.record, (THERE,), is_durable=False), "here")
        self.shard = shard

    def origin(self, _index: int) -> AtHolder:
        return AtHolder(THERE, None, "ray")

    def read(self, index: int) -> Chunk:
        return self.shard.chunks[index]


class Near(SharedMemoryTransport):
    """Reads what the holder is to have fetched, or fails."""

    def __init__(self, shard: Shard, problem: Exception | None = None) -> None:
        super().__init__()
        self.shard = shard
        self.problem = problem
        self.asked: list[tuple[Any, ...]] = []

    def read_guest(
        self, host: Any, chunk: Any, expected: bytes, origin: Any, sink: Sink, timeout_s: float
    ) -> None:
        self.asked.append((host.node_id, host.actor, chunk, expected, origin))
        assert timeout_s > 15
        if self.problem is not None:
            raise self.problem
        sink.fill(buffer.data for buffer in self.shard.chunks[chunk.index])


def handle_of(name: str, namespace: str) -> ActorRef:
    return f"{namespace}/{name}"


@pytest.fixture
def shard(monkeypatch: pytest.MonkeyPatch) -> Shard:
    monkeypatch.setattr(ray, "get_actor", handle_of)
    return Shard({"x": torch.arange(5000, dtype=torch.float32)})


def test_the_own_holder_is_asked_for_a_chunk_by_its_checksum(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[str] = []
    monkeypatch.setattr(
        ray, "get_actor", lambda name, space: looked_up.append(name) or handle_of(name, space)
    )
    near, behind = Near(shard), Behind(shard)
    tier = HostTier(behind, "here", near)
    memory = np.zeros(shard.record.plan.chunk_sizes[1], dtype=np.uint8)
    tier.read_into(1, Sink([ByteRange(0, memory.nbytes)], [memory.data]))
    whole = b"".join(buffer.tobytes() for buffer in shard.chunks[1])
    assert memory.tobytes() == whole
    assert b"".join(buffer.tobytes() for buffer in tier.read(1)) == whole
    expected = shard.record.digests[1]
    origin = AtHolder(THERE, None, "ray")
    asked = "here", "tiered/holder-here", behind.chunk_id(1), expected, origin
    assert near.asked == [asked, asked]
    assert len(looked_up) == 1


def test_when_the_own_holder_cannot_help_the_other_host_is_read(
    shard: Shard, caplog: pytest.LogCaptureFixture
) -> None:
    near = Near(shard, HolderUnavailableError("here", "it has no room"))
    tiers = by_own_holder([Behind(shard)], "here", near)
    reader = ShardReader(ShardSources(shard.record, (THERE,), is_durable=False), tiers)
    image = b"".join(buffer.tobytes() for chunk in reader.chunks() for buffer in chunk)
    assert image == shard.image
    assert len(near.asked) == 1  # it is asked last from then on
    assert [r.message.count("trying the next copy") for r in caplog.records] == [1]


def test_the_own_holder_is_told_where_in_which_object_a_chunk_of_s3_is(shard: Shard) -> None:
    store, near = FakeStore(), Near(shard)
    found = ShardSources(shard.record, (), is_durable=True)
    tier = HostTier(DurableTier(store, found), "here", near)
    tier.read(1)
    ((*_, expected, origin),) = near.asked
    first_bytes, size_bytes, *_ = shard.record.plan.chunk_sizes
    assert expected == shard.record.digests[1]
    assert (origin.store, origin.start) == (store, first_bytes)
    store.objects[origin.object_key] = shard.image
    whole = b"".join(buffer.tobytes() for buffer in shard.chunks[1])
    assert store.read(origin.object_key, origin.start, size_bytes) == whole


@pytest.mark.parametrize("is_damaged_on_s3", [False, True])
def test_what_comes_damaged_by_way_of_the_holder_is_not_thought_to_have_rotted_on_s3(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, is_damaged_on_s3: bool
) -> None:
    """The holder may have let go of the memory while it was read."""
    store, found = FakeStore(), ShardSources(shard.record, (), is_durable=True)
    behind = DurableTier(store, found)
    damaged = bytearray(shard.image)
    damaged[-1] ^= 1
    store.objects[behind.origin(0).object_key] = bytes(damaged) if is_damaged_on_s3 else shard.image
    near = Near(shard)

    def damage(*args: Any) -> None:
        *_, sink, _ = args
        sink.fill([np.zeros(sink.missing_bytes, dtype=np.uint8).data])

    monkeypatch.setattr(near, "read_guest", damage)
    reader = ShardReader(found, by_own_holder([behind], "here", near))
    if is_damaged_on_s3:
        with pytest.raises(StepNotFoundError):
            list(reader.chunks())
    else:
        image = b"".join(buffer.tobytes() for chunk in reader.chunks() for buffer in chunk)
        assert image == shard.image
    assert reader.is_rotten == is_damaged_on_s3


def test_a_host_without_a_holder_is_told_apart(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(name: str, namespace: str) -> ActorRef:
        raise ValueError("Failed to look up actor")

    monkeypatch.setattr(ray, "get_actor", nobody)
    with pytest.raises(HolderUnavailableError, match="it is gone"):
        HostTier(Behind(shard), "here", Near(shard)).read(1)
