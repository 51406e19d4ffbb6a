"""Reading a shard: the nearest intact copy of each chunk, and a name for every one that is not."""

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import GetTimeoutError

from replication.dataplane import Access, Reach
from replication.errors import (
    HolderTimeoutError,
    HolderUnavailableError,
    ProtocolError,
    ShardNotHeldError,
    TieredError,
)
from replication.records import ByteRange, Chunk, ChunkId, Endpoint, HolderId, Way
from replication.sink import Sink
from replication.transport import Source
from replication.wire import Secret
from tests.contract.fake_store import FakeStore
from tests.unit.tiered.fake_shard import MemoryTier, Shard, restore_into
from tiered import fetch, register
from tiered.errors import DurableStoreError, StepNotFoundError
from tiered.fetch import (
    BUDDY,
    DURABLE,
    FORMER_HOST,
    OWN_HOST,
    DurableTier,
    HolderTier,
    tiers_of,
)
from tiered.history import ShardSources
from tiered.pieces import Piece


@pytest.fixture
def shard() -> Shard:
    return Shard({"x": torch.arange(5000, dtype=torch.float32)})


def three_tiers(shard: Shard) -> list[MemoryTier]:
    places = [("own", "host a"), ("buddy", "host b"), ("s3", "S3")]
    return [MemoryTier(shard.chunks, label, name) for label, name in places]


def image_of(chunks: Any) -> bytes:
    return b"".join(buffer.tobytes() for chunk in chunks for buffer in chunk)


def test_everything_comes_from_the_first_tier_when_it_is_whole(shard: Shard) -> None:
    own, buddy, s3 = three_tiers(shard)
    reader = shard.reader(own, buddy, s3)
    assert image_of(reader.chunks()) == shard.image
    assert own.asked == list(range(len(shard.chunks)))
    assert buddy.asked == s3.asked == []
    assert reader.bytes_by_label == {"own": shard.record.plan.size_bytes}
    assert reader.label == "own"
    assert reader.seconds > 0


def test_a_corrupt_chunk_and_all_after_it_come_from_the_next_tier(shard: Shard) -> None:
    own, buddy, s3 = three_tiers(shard)
    own.corrupt = {2}
    reader = shard.reader(own, buddy, s3)
    assert image_of(reader.chunks()) == shard.image
    assert own.asked == [0, 1, 2]  # not asked again
    assert buddy.asked == list(range(2, len(shard.chunks)))
    assert s3.asked == []
    sizes = shard.record.plan.chunk_sizes
    assert reader.bytes_by_label == {"own": sum(sizes[:2]), "buddy": sum(sizes[2:])}
    assert reader.label == "buddy"


def test_a_dead_tier_is_asked_once(shard: Shard, caplog: pytest.LogCaptureFixture) -> None:
    own, buddy, s3 = three_tiers(shard)
    own.is_dead = buddy.is_dead = True
    reader = shard.reader(own, buddy, s3)
    assert image_of(reader.chunks()) == shard.image
    assert own.asked == buddy.asked == [0]
    assert reader.bytes_by_label == {"s3": shard.record.plan.size_bytes}
    assert [r.message.count("trying the next copy") for r in caplog.records] == [1, 1]


def test_copies_damaged_in_different_chunks_make_a_whole_one(shard: Shard) -> None:
    own, buddy, _ = three_tiers(shard)
    own.corrupt, buddy.corrupt = {0, 3}, {1, 4}
    assert image_of(shard.reader(own, buddy).chunks()) == shard.image


def test_it_is_noted_that_s3_has_something_else_than_was_saved(shard: Shard) -> None:
    own, _, s3 = three_tiers(shard)
    s3.label = DURABLE
    own.corrupt, s3.is_dead = {0}, True
    reader = shard.reader(own, s3)
    with pytest.raises(StepNotFoundError):
        reader.chunk(0)
    assert not reader.is_rotten  # it did not answer
    s3.is_dead, s3.corrupt = False, {0}
    with pytest.raises(StepNotFoundError):
        reader.chunk(0)
    assert reader.is_rotten


def test_when_no_tier_has_it_each_is_named_with_its_reason(shard: Shard) -> None:
    own, buddy, s3 = three_tiers(shard)
    own.is_dead, buddy.corrupt, s3.corrupt = True, {0, 2}, {2}
    with pytest.raises(StepNotFoundError) as caught:
        list(shard.reader(own, buddy, s3).chunks())
    error = caught.value
    assert (error.job, error.wanted) == ("job", "rank 0 of step 40 (generation 2)")
    assert len(error.reasons) == 3
    text = str(error)
    assert "host a is not available: it is dead" in text
    assert "chunk 2 of [job gen=2 rank=0 step=40] from host b is corrupt" in text
    assert "from S3 is corrupt" in text


def test_one_bad_tier_alone_is_an_error_and_no_tier_at_all_too(shard: Shard) -> None:
    (tier, _, _) = three_tiers(shard)
    tier.is_dead = True
    with pytest.raises(StepNotFoundError, match="it is dead"):
        list(shard.reader(tier).chunks())
    reader = shard.reader(tier)
    reader.tiers.clear()
    with pytest.raises(StepNotFoundError):
        list(reader.chunks())
    assert reader.label == ""


def test_a_chunk_cut_short_is_corrupt(shard: Shard) -> None:
    own, buddy, _ = three_tiers(shard)
    own.chunks = [[buffer[:-1] for buffer in chunk] for chunk in shard.chunks]
    assert image_of(shard.reader(own, buddy).chunks()) == shard.image


def test_the_next_chunk_is_fetched_while_one_is_used(shard: Shard) -> None:
    seen = threading.Event()

    class Watched(MemoryTier):
        def read(self, index: int) -> Chunk:
            if index == 1:
                seen.set()
            return super().read(index)

    tier = Watched(shard.chunks)
    chunks = shard.reader(tier).chunks()
    next(chunks)
    assert seen.wait(5)
    chunks.close()
    assert len(tier.asked) == 2  # one ahead, no further


def test_a_reader_may_be_read_twice(shard: Shard) -> None:
    reader = shard.reader()
    assert image_of(reader.chunks()) == image_of(reader.chunks()) == shard.image


# --- the tiers themselves -----------------------------------------------------------------------

HERE, THERE, FAR = (HolderId(name * 8, "life") for name in "abc")


def test_tiers_are_nearest_first(shard: Shard) -> None:
    store = FakeStore()
    replicas = frozenset({THERE})
    sources = ShardSources(shard.record, (THERE, HERE, FAR), is_durable=True, replicas=replicas)
    tiers = tiers_of(sources, HERE.node_id, store)
    assert [tier.label for tier in tiers] == [OWN_HOST, BUDDY, FORMER_HOST, DURABLE]
    assert [tier.name for tier in tiers] == [
        "host aaaaaaaa", "host bbbbbbbb", "host cccccccc", "S3",
    ]  # fmt: skip
    outside = tiers_of(sources, None, None)
    assert [tier.label for tier in outside] == [BUDDY, FORMER_HOST, FORMER_HOST]
    moved = tiers_of(sources, THERE.node_id, None)  # a rank that now runs on its buddy's host
    assert (moved[0].label, moved[0].name) == (BUDDY, "host bbbbbbbb")
    memory_only = ShardSources(shard.record, (), is_durable=False)
    assert tiers_of(memory_only, None, store) == []


def test_the_durable_tier_reads_just_the_chunk(shard: Shard) -> None:
    store = FakeStore()
    key = register.shard_key(shard.record.key.version, shard.record.key.rank)
    store.upload(key, shard.chunks)
    tier = DurableTier(store, ShardSources(shard.record, (), is_durable=True))
    reader = shard.reader(tier)  # type: ignore[arg-type]
    assert image_of(reader.chunks()) == shard.image
    assert reader.bytes_by_label == {DURABLE: shard.record.plan.size_bytes}
    del store.objects[key]
    with pytest.raises(DurableStoreError):
        tier.read(0)


class FakeTransport:
    name, bytes_read = "fake", 0

    def __init__(self, outcome: Exception | Chunk) -> None:
        self.outcome = outcome
        self.calls: list[tuple[Any, ...]] = []
        self.closed = 0

    def fetch(self, *args: Any) -> Chunk:
        self.calls.append(args)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def read(self, source: Source, chunk: ChunkId, sink: Sink, timeout_s: float) -> None:
        sink.fill(buffer.data for buffer in self.fetch(source, chunk, timeout_s))

    def close(self) -> None:
        self.closed += 1


class FakeHandle:
    """Of an actor that tells how to read from it."""

    def __init__(self, name: str, namespace: str) -> None:
        self.name = f"{namespace}/{name}"
        self.access = self

    def remote(self) -> Access:
        return Access(Endpoint("127.0.0.1", 1), Secret(b"s" * 32))


def holder_tier(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, outcome: Exception | Chunk
) -> tuple[HolderTier, FakeTransport]:
    transport = FakeTransport(outcome)
    monkeypatch.setattr(ray, "get_actor", FakeHandle)
    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
    monkeypatch.setattr(fetch, "open_transports", lambda secret, tls: {"auto": transport})
    tier = HolderTier(THERE, ShardSources(shard.record, (THERE,), is_durable=False), None)
    return tier, transport


def test_a_holder_is_asked_for_a_chunk_with_a_deadline(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, transport = holder_tier(shard, monkeypatch, shard.chunks[1])
    assert image_of([tier.read(1)]) == image_of([shard.chunks[1]])
    ((source, chunk, timeout_s),) = transport.calls
    assert THERE.node_id in source.actor.name
    assert source.endpoint == Endpoint("127.0.0.1", 1)
    assert source.node_id == THERE.node_id
    size_bytes = shard.record.plan.chunk_sizes[1]
    assert chunk == ChunkId(shard.record.key, 1, size_bytes)
    assert 15 <= timeout_s < 16


def test_a_holder_is_asked_once_how_to_read_from_it(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, transport = holder_tier(shard, monkeypatch, shard.chunks[1])
    calls = []
    monkeypatch.setattr(ray, "get", lambda answer, timeout: calls.append(timeout) or answer)
    memory = bytearray(shard.record.plan.chunk_sizes[1])
    for _ in range(2):
        sink = Sink([ByteRange(0, len(memory))], [memoryview(memory)])
        tier.read_into(1, sink)
    assert memory == image_of([shard.chunks[1]])
    assert len(calls) == 1
    tier.close()
    assert transport.closed == 1
    tier.read(1)
    assert len(calls) == 2


@pytest.mark.parametrize(("way", "is_near", "asked"), [
    ("auto", False, 0), ("auto", True, 1), ("ray", True, 0), ("ray", False, 0),
])  # fmt: skip
def test_a_holder_that_is_known_already_is_not_looked_for(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, way: Way, *, is_near: bool, asked: int
) -> None:
    _, network = holder_tier(shard, monkeypatch, shard.chunks[1])
    monkeypatch.setattr(ray, "get_actor", None)
    calls = []
    monkeypatch.setattr(ray, "get", lambda answer, timeout: calls.append(timeout) or answer)
    handle = FakeHandle("known", "one")
    reach = Reach(handle, replace(handle.remote(), endpoint=Endpoint("127.0.0.2", 5)))
    near: Any = FakeTransport(HolderUnavailableError("b", "its memory is not mapped here"))
    near.access_beside = lambda node_id, key: None  # so its holder may be silent
    sources = ShardSources(shard.record, (THERE,), is_durable=False)
    node_id = THERE.node_id if is_near else HERE.node_id
    (tier,) = tiers_of(sources, node_id, None, way, near, {THERE: reach})
    origin = tier.origin(1)
    assert len(calls) == asked
    if way == "auto":
        asked_or_told = Endpoint("127.0.0.1", 1) if is_near else Endpoint("127.0.0.2", 5)
        assert origin.endpoint == asked_or_told
        assert image_of([tier.read(1)]) == image_of([shard.chunks[1]])
        assert network.calls[0][0].actor is handle


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("is_readable", [True, False])
def test_the_own_host_is_asked_how_it_is_reached_unless_it_has_said_so(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, *, is_readable: bool, is_known: bool
) -> None:
    _, network = holder_tier(shard, monkeypatch, shard.chunks[1])
    calls = []
    monkeypatch.setattr(ray, "get", lambda answer, timeout: calls.append(timeout) or answer)
    unmapped = HolderUnavailableError("b", "its memory is not mapped here")
    near: Any = FakeTransport(shard.chunks[1] if is_readable else unmapped)
    access = FakeHandle("any", "one").remote() if is_known else None
    near.access_beside = lambda node_id, key: access
    first = ChunkId(shard.record.key, 1, shard.record.plan.chunk_sizes[1])
    near.is_mapped = lambda node_id, chunk: (
        is_readable and (node_id, chunk) == (THERE.node_id, first)
    )
    sources = ShardSources(shard.record, (THERE,), is_durable=False)
    (tier,) = tiers_of(sources, THERE.node_id, None, near=near)
    assert not tier.is_at_hand(1)  # nobody has asked the holder yet
    for _ in range(2):
        assert image_of([tier.read(1)]) == image_of([shard.chunks[1]])
    assert len(calls) == (0 if is_known else 1)
    assert (len(near.calls), len(network.calls)) == (2, 0 if is_readable else 2)
    assert [tier.is_at_hand(index) for index in (1, 2)] == [is_readable, False]
    for way, node_id in (("ray", THERE.node_id), ("auto", "elsewhere")):
        (other,) = tiers_of(sources, node_id, None, way, near)
        other.origin(1)  # asks how it is reached
        assert not other.is_at_hand(1)


def test_a_host_without_a_data_plane_is_read_by_its_own_ranks(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, network = holder_tier(shard, monkeypatch, shard.chunks[1])
    near: Any = FakeTransport(shard.chunks[1])
    access = replace(FakeHandle("any", "one").remote(), endpoint=None)
    near.access_beside = lambda node_id, key: access
    sources = ShardSources(shard.record, (THERE,), is_durable=False)
    (tier,) = tiers_of(sources, THERE.node_id, None, near=near)
    assert image_of([tier.read(1)]) == image_of([shard.chunks[1]])
    assert (len(near.calls), len(network.calls)) == (1, 0)


def test_a_holder_that_does_not_answer_is_waited_for_once(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, _ = holder_tier(shard, monkeypatch, [])
    calls = []

    def silent(answer: object, timeout: float) -> None:
        calls.append(timeout)
        raise GetTimeoutError

    monkeypatch.setattr(ray, "get", silent)
    for _ in range(3):
        with pytest.raises(HolderTimeoutError, match="no answer within"):
            tier.read(0)
    assert len(calls) == 1


def test_by_ray_no_holder_is_asked_for_its_secret(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder_tier(shard, monkeypatch, [])
    fake = FakeTransport(shard.chunks[1])
    monkeypatch.setattr(fetch, "RayTransport", lambda: fake)
    monkeypatch.setattr(ray, "get", None)
    sources = ShardSources(shard.record, (THERE,), is_durable=False)
    (tier,) = tiers_of(sources, None, None, "ray")
    assert image_of([tier.read(1)]) == image_of([shard.chunks[1]])
    assert fake.calls[0][0].endpoint is None


def test_a_holder_that_is_gone_is_unavailable(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(name: str, namespace: str) -> None:
        raise ValueError("Failed to look up actor")

    tier, _ = holder_tier(shard, monkeypatch, [])
    monkeypatch.setattr(ray, "get_actor", gone)
    with pytest.raises(HolderUnavailableError, match="it is gone"):
        tier.read(0)


@pytest.mark.parametrize(
    "failure",
    [
        ShardNotHeldError("b", "shard"),
        HolderUnavailableError("b", "silent"),
        HolderTimeoutError("b", "hung"),
        ProtocolError("b", "another size"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_fails_at_a_holder_the_next_copy_is_read(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    tier, transport = holder_tier(shard, monkeypatch, failure)
    with pytest.raises(TieredError):
        tier.read(0)
    (buddy, _, _) = three_tiers(shard)
    reader = shard.reader(tier, buddy)  # type: ignore[arg-type]
    assert image_of(reader.chunks()) == shard.image
    assert len(transport.calls) == 2


def data_of(shard: Shard) -> bytes:
    """The image without its first chunk: all tensors' bytes."""
    return shard.image[shard.record.plan.chunk_sizes[0] :]


def test_a_chunk_fills_memory_from_the_first_tier_that_has_it_intact(shard: Shard) -> None:
    own, buddy, _ = three_tiers(shard)
    own.corrupt = {2}
    reader = shard.reader(own, buddy)
    data = data_of(shard)
    memory = np.empty(len(data), dtype=np.uint8)
    reader.fill([Piece(0, memory)])
    assert memory.tobytes() == data
    assert sum(reader.bytes_by_label.values()) == len(data)
    assert reader.bytes_by_label["buddy"] >= shard.record.plan.chunk_sizes[2]
    assert reader.seconds > 0
    reader.close()
    assert (own.closed, buddy.closed) == (1, 1)


@pytest.mark.parametrize(
    ("ranges", "chunks"),
    [
        ([(0, 1)], [1]),
        ([(4095, 4097)], [1, 2]),
        ([(4096, 8192)], [2]),
        ([(10, 20), (20, 30), (40, 40), (8000, 8001), (19_999, 20_000)], [1, 2, 5]),
        ([(100, 19_000)], [1, 2, 3, 4, 5]),
        ([(7, 7)], []),
        ([], []),
    ],
)
def test_of_ranges_only_their_chunks_are_read(
    shard: Shard, ranges: list[tuple[int, int]], chunks: list[int]
) -> None:
    (tier, _, _) = three_tiers(shard)
    pieces = [Piece(low, np.zeros(high - low, dtype=np.uint8)) for low, high in ranges]
    shard.reader(tier).fill(pieces)
    found = [piece.into.tobytes() for piece in pieces]
    assert found == [data_of(shard)[low:high] for low, high in ranges]
    assert sorted(tier.asked) == chunks


def test_a_range_is_not_believed_where_the_rest_of_its_chunk_is_damaged(shard: Shard) -> None:
    own, buddy, _ = three_tiers(shard)
    own.corrupt = {1}  # its last byte, which nobody wants
    piece = Piece(5, np.zeros(10, dtype=np.uint8))
    reader = shard.reader(own, buddy)
    reader.fill([piece])
    assert set(reader.bytes_by_label) == {"buddy"}
    assert piece.into.tobytes() == data_of(shard)[5:15]


def test_ranges_that_overlap_or_go_back_are_refused(shard: Shard) -> None:
    memory = np.zeros(10, dtype=np.uint8)
    for second in (5, 0):
        with pytest.raises(ValueError, match="are wanted after"):
            shard.reader().fill([Piece(1, memory), Piece(second, memory)])


def test_what_no_tier_has_intact_ends_the_filling(shard: Shard) -> None:
    tier = MemoryTier(shard.chunks)
    tier.corrupt = {1}
    with pytest.raises(StepNotFoundError, match="chunk 1 of"):
        shard.reader(tier).fill([Piece(0, np.empty(20_000, dtype=np.uint8))])


class FrozenTier(MemoryTier):
    """As Ray hands them out: views that cannot be written."""

    def read(self, index: int) -> Chunk:
        chunk = super().read(index)
        for buffer in chunk:
            buffer.flags.writeable = False
        return chunk


def test_the_bytes_of_a_chunk_may_be_read_only(shard: Shard) -> None:
    tier = FrozenTier(shard.chunks)
    assert image_of(shard.reader(tier).chunks()) == shard.image
    restored = {"x": torch.zeros(5000)}
    restore_into(restored, shard.reader(FrozenTier(shard.chunks)))
    assert restored["x"].tolist() == list(range(5000))
