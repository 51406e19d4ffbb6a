"""The holder's shell, without Ray: what it tells the coordinator, and what it reads again."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from replication import messages
from replication.buffers import ROUND_BYTES, Buffers
from replication.checksum import digest
from replication.errors import (
    ChunkCorruptError,
    FencedError,
    HolderTimeoutError,
    HolderUnavailableError,
)
from replication.fetch_once import AtStore
from replication.holder import COLLECTED_S, Holder
from replication.inventory import Inventory
from replication.pinning import StoreMemory
from replication.records import Chunk, ChunkId, HolderId, ShardKey, ShardPlan, Version
from replication.scrub import Scrub
from replication.sink import Sink
from replication.wire import Secret
from tests.contract.fake_store import FakeStore
from tiered.errors import DurableObjectError

KEY = ShardKey("job", Version(1, 10), 0)
PLAN = ShardPlan(1, (3,))


class Observer:
    """An actor's handle that notes what it is told; the first calls may fail."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.changed = asyncio.Event()
        self.told: list[tuple[str, list[Any]]] = []
        self.report_shards = self._method("shards")
        self.report_corrupt = self._method("corrupt")

    def _method(self, kind: str) -> Any:
        async def call(_: HolderId, items: list[Any]) -> None:
            if self.failures:
                self.failures -= 1
                raise ConnectionError("not now")
            self.told.append((kind, items))
            self.changed.set()

        class Method:
            remote = staticmethod(call)

        return Method()


def chunk(*values: int) -> Chunk:
    return [np.array(values, dtype=np.uint8)]


def holder_with_a_shard(period_s: float = 600.0) -> Holder:
    holder = Holder("node", 100, "observer", Secret(bytes(32)))
    holder._core = Inventory(HolderId("node", "1"), 100, Scrub(period_s))
    copies = Buffers(lambda chunk: (None, [buffer.copy() for buffer in chunk]))  # no Ray
    holder._buffers = holder._arrivals.buffers = copies
    holder._chunks[KEY] = {0: chunk(1, 2, 3)}
    holder._feed(messages.ChunkFetched(KEY, PLAN, 0, digest(chunk(1, 2, 3))))
    return holder


async def until_told(observer: Observer, kind: str) -> None:
    async with asyncio.timeout(5.0):
        while kind not in dict(observer.told):
            observer.changed.clear()
            await observer.changed.wait()


@pytest.fixture
def observer(monkeypatch: pytest.MonkeyPatch) -> Observer:
    observer = Observer()
    monkeypatch.setattr("replication.holder.ray.get_actor", lambda name, namespace: observer)
    monkeypatch.setattr("replication.holder.TICK_S", 0.001)
    monkeypatch.setattr("replication.reports.PAUSE_S", 0.001)
    return observer


def test_a_copy_found_corrupt_is_not_reported_as_whole_but_as_corrupt(observer: Observer) -> None:
    async def run() -> None:
        holder = holder_with_a_shard()  # its report is still to be sent
        holder._chunks[KEY][0] = chunk(1, 2, 4)
        assert await holder.verify([KEY]) == [KEY]
        await holder.hello()
        await until_told(observer, "corrupt")

    asyncio.run(run())
    assert observer.told == [("corrupt", [KEY])]


def test_a_corrupt_copy_is_reported_until_the_observer_answers(observer: Observer) -> None:
    observer.failures = 2

    async def run() -> None:
        holder = holder_with_a_shard()
        holder._feed(messages.ChunkFoundCorrupt(KEY, 0))
        await holder.hello()
        await until_told(observer, "corrupt")

    asyncio.run(run())
    assert observer.told == [("corrupt", [KEY])]


def test_a_good_copy_in_the_place_of_a_corrupt_one_is_what_is_told(observer: Observer) -> None:
    async def run() -> None:
        holder = holder_with_a_shard()
        holder._feed(messages.ChunkFoundCorrupt(KEY, 0))
        holder._feed(messages.ChunkFetched(KEY, PLAN, 0, digest(chunk(1, 2, 3))))
        await holder.hello()
        await until_told(observer, "shards")

    asyncio.run(run())
    assert [kind for kind, _ in observer.told] == ["shards"]


def test_a_bit_that_flips_is_found_though_nobody_asks(observer: Observer) -> None:
    async def run() -> None:
        holder = holder_with_a_shard(period_s=0.01)
        await holder.hello()
        await until_told(observer, "shards")
        holder._chunks[KEY][0] = chunk(1, 2, 4)
        await until_told(observer, "corrupt")

    asyncio.run(run())
    assert observer.told[-1] == ("corrupt", [KEY])


# --- chunks that did not change -------------------------------------------------------------------

LATER = ShardKey("job", Version(1, 20), 0)
SOURCE = HolderId("elsewhere", "1")


class NoTransport:
    """A way to other hosts on which every byte is counted, and damaged where it is said so."""

    def __init__(self) -> None:
        self.bytes_read = 0

    def read(self, source: Any, wanted: ChunkId, sink: Sink, timeout_s: float) -> None:
        sink.fill([memoryview(bytes([1, 2, 3]))])
        self.bytes_read += 3


async def settled(holder: Holder) -> None:
    """Wait until nothing is done in the background any more."""
    while holder._background.tasks:
        await asyncio.wait(holder._background.tasks, timeout=5.0)


def test_a_staged_chunk_that_did_not_change_shares_the_earlier_bytes() -> None:
    async def run() -> None:
        holder = holder_with_a_shard()
        own = chunk(1, 2, 3)
        await holder.stage_chunk(LATER, PLAN, 0, own)
        await settled(holder)
        assert holder._chunks[LATER][0] is holder._chunks[KEY][0]
        assert holder._core.shared_bytes == 3
        holder._feed(messages.WatermarkRaised("job", 1, LATER.version))
        assert list(holder._chunks) == [LATER]
        assert digest(holder._chunks[LATER][0]) == holder._core.record(LATER).digests[0]
        assert await holder.verify([LATER]) == []

    asyncio.run(run())


def test_a_chunk_that_changed_keeps_its_own_bytes() -> None:
    async def run() -> None:
        holder = holder_with_a_shard()
        await holder.stage_chunk(LATER, PLAN, 0, chunk(1, 2, 4))
        await settled(holder)
        assert len(holder._core.records()) == 2
        assert holder._core.shared_bytes == 0

    asyncio.run(run())


def test_of_an_offered_chunk_that_is_here_as_an_earlier_one_no_byte_moves(
    observer: Observer,
) -> None:
    async def run() -> None:
        holder = holder_with_a_shard()
        holder._arrivals.transports["auto"] = way = NoTransport()
        expected = digest(chunk(1, 2, 3))
        assert await holder.take_chunks(LATER, PLAN, {0: expected}, SOURCE) == {}
        assert way.bytes_read == 0
        assert holder._chunks[LATER][0] is holder._chunks[KEY][0]
        assert (await holder.traffic()).spared == 3
        assert {record.key for record in await holder.list_shards()} == {KEY, LATER}

    asyncio.run(run())


def test_an_earlier_chunk_that_rotted_is_not_shared_but_told_of(observer: Observer) -> None:
    async def run() -> None:
        holder = holder_with_a_shard()
        holder._chunks[KEY][0] = chunk(1, 2, 4)
        holder._arrivals.transports["auto"] = way = NoTransport()
        expected = digest(chunk(1, 2, 3))
        assert await holder.take_chunks(LATER, PLAN, {0: expected}, SOURCE) == {}
        assert way.bytes_read == 3
        assert [record.key for record in await holder.list_shards()] == [LATER]
        assert await holder.verify([LATER]) == []
        await holder.hello()
        await until_told(observer, "corrupt")

    asyncio.run(run())
    assert ("corrupt", [KEY]) in observer.told


def test_of_chunks_offered_together_each_is_taken_or_refused_for_itself(
    observer: Observer,
) -> None:
    plan = ShardPlan(1, (3, 3, 3))
    bad, good = digest(chunk(9, 9, 9)), digest(chunk(1, 2, 3))

    async def run() -> None:
        holder = holder_with_a_shard()
        holder._arrivals.transports["auto"] = way = NoTransport()
        refused = await holder.take_chunks(LATER, plan, {0: good, 1: bad, 2: good}, SOURCE)
        assert list(refused) == [1]
        assert "checksum" in refused[1]
        assert [holder._core.has_chunk(LATER, index) for index in range(3)] == [True, False, True]
        read_bytes = way.bytes_read
        assert await holder.take_chunks(LATER, plan, {0: good, 2: good}, SOURCE) == {}
        assert way.bytes_read == read_bytes

    asyncio.run(run())


def test_a_shard_that_does_not_fit_is_refused_before_a_byte_moves(observer: Observer) -> None:
    async def run() -> None:
        holder = holder_with_a_shard()
        holder._arrivals.transports["auto"] = way = NoTransport()
        refused = await holder.take_chunks(LATER, ShardPlan(1, (98,)), {0: bytes(16)}, SOURCE)
        assert "98 for" in refused[0]
        assert way.bytes_read == 0

    asyncio.run(run())


class Peer:
    """Another host's holder; by the first chunk of a call, what it answers; then it takes all."""

    def __init__(self, answers: dict[int, dict[int, str] | Exception]) -> None:
        self.asked: list[list[int]] = []

        class Method:
            @staticmethod
            async def remote(
                key: ShardKey, plan: ShardPlan, digests: dict[int, bytes], *_: Any
            ) -> dict[int, str]:
                self.asked.append(list(digests))
                answer = answers.pop(next(iter(digests)), {})
                if isinstance(answer, Exception):
                    raise answer
                return answer

        self.take_chunks = Method()


def test_what_a_buddy_has_not_taken_is_offered_again_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = ShardPlan(1, (3,) * 5)
    peer = Peer({0: {1: "no room", 2: "no room"}, 3: ConnectionError("gone")})
    monkeypatch.setattr("replication.holder.ray.get_actor", lambda name, namespace: peer)

    async def run() -> None:
        holder = Holder("node", 100, "observer", Secret(bytes(32)))
        for index in range(5):
            await holder.stage_chunk(LATER, plan, index, chunk(1, 2, index))
        await settled(holder)
        await holder.set_buddies("job", (SOURCE,), frozenset({SOURCE}))
        await settled(holder)
        assert sorted(peer.asked) == [[0, 1, 2], [3], [4]]
        assert holder._core.shards[LATER].taken == {(SOURCE, 0), (SOURCE, 4)}
        for offer in holder._core.offers.repeat(time.monotonic() + 1.0):
            assert isinstance(offer, messages.OfferChunk)
            holder._outbox.put(offer)
        await settled(holder)
        assert sorted(peer.asked[3:]) == [[1, 2], [3]]
        assert holder._core.shards[LATER].taken == {(SOURCE, index) for index in range(5)}

    asyncio.run(run())
    said = [record.getMessage().split(" not replicated to ")[0] for record in caplog.records]
    assert sorted(said) == [f"{LATER} chunk 3", f"{LATER} chunks 1, 2"]
    assert "yet: no room" in caplog.text
    assert "yet: gone" in caplog.text


def test_a_source_that_let_a_deadline_pass_is_not_waited_for_again(observer: Observer) -> None:
    class Silent(NoTransport):
        def read(self, source: Any, wanted: ChunkId, sink: Sink, timeout_s: float) -> None:
            if wanted.index == 1:
                raise HolderTimeoutError("elsewhere", "silent")
            super().read(source, wanted, sink, timeout_s)

    async def run() -> None:
        holder = holder_with_a_shard()
        holder._arrivals.transports["auto"] = way = Silent()
        offered = dict.fromkeys((3, 1, 0, 2), digest(chunk(1, 2, 3)))
        refused = await holder.take_chunks(LATER, ShardPlan(1, (3,) * 4), offered, SOURCE)
        assert refused.keys() == {1, 0, 2}
        assert all("silent" in reason for reason in refused.values())
        assert way.bytes_read == 3

    asyncio.run(run())


class Reference:
    """To an object of a store that is this process' own memory."""

    def __init__(self, pinned: Chunk) -> None:
        (self.buffer,) = pinned

    def hex(self) -> str:
        return f"object {id(self)}"

    def write(self, *values: int) -> None:
        """As the trainer does, in its own process."""
        self.buffer[: len(values)] = values


class Lender:
    """A holder whose store's memory can be lent without Ray, and what it has lent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(StoreMemory, "holds", lambda *_: True)
        self.holder = Holder("node", 1 << 20, "observer", Secret(bytes(32)))
        self.buffers = self.holder._buffers = self.holder._arrivals.buffers = Buffers(self._put)

    @staticmethod
    def _put(chunk: Chunk) -> tuple[Reference, Chunk]:
        pinned = [buffer.copy() for buffer in chunk]
        return Reference(pinned), pinned

    async def lend(
        self, rank: int = 0, generation: int = 1, kept: Sequence[str] = (), job: str = "job"
    ) -> Any:
        """Memory for one chunk."""
        (reference,) = await self.holder.prepare(job, rank, generation, kept, [3])
        return reference

    async def can_stage(self, *names: str, rank: int = 0, generation: int = 1) -> bool:
        """Whether the holder takes these chunks, all of one step."""
        self.steps = getattr(self, "steps", 0) + 1
        key = ShardKey("job", Version(generation, self.steps), rank)
        plan = ShardPlan(1, (3,) * len(names))
        try:
            await self.holder.stage_prepared(key, plan, dict(enumerate(names)))
        except HolderUnavailableError:
            return False
        return True


@pytest.fixture
def lender(monkeypatch: pytest.MonkeyPatch) -> Lender:
    return Lender(monkeypatch)


def test_memory_that_was_lent_becomes_a_chunk_with_one_call(lender: Lender) -> None:
    async def run() -> None:
        holder, memory = lender.holder, await lender.lend()
        memory.write(1, 2, 3, 4)  # it has room to spare
        await holder.stage_prepared(KEY, PLAN, {0: memory.hex()})
        await holder.stage_prepared(KEY, PLAN, {0: memory.hex()})  # asked again, it says the same
        await settled(holder)
        assert holder._core.record(KEY).digests == (digest(chunk(1, 2, 3)),)
        (kept,) = await holder.read_chunk(KEY, 0)
        assert kept.tolist() == [1, 2, 3]
        assert holder._lending.lent_bytes == 0

    asyncio.run(run())


def test_memory_of_a_step_that_was_collected_is_lent_for_the_next(lender: Lender) -> None:
    plan, keys = ShardPlan(1, (ROUND_BYTES,)), [ShardKey("job", Version(1, n), 0) for n in (1, 2)]

    async def run() -> None:
        holder, lent = lender.holder, list[Any]()
        for key in keys:
            lent.append(await lender.lend())
            lent[-1].write(key.version.step)
            await holder.stage_prepared(key, plan, {0: lent[-1].hex()})
            await settled(holder)
        assert lender.buffers.free_bytes == 0  # nobody writes to a step that is held
        await holder.collect("job", 1, keys[1].version)
        assert lender.buffers.free_bytes == ROUND_BYTES
        assert await lender.lend() is lent[0]
        await holder.forget("job")
        assert lender.buffers.free_bytes == 0  # of what is held no more nothing is kept

    asyncio.run(run())


def test_memory_of_a_step_that_is_just_being_collected_is_waited_for(lender: Lender) -> None:
    plan, keys = ShardPlan(1, (ROUND_BYTES,)), [ShardKey("job", Version(1, n), 0) for n in (1, 2)]

    async def run() -> None:
        holder, lent = lender.holder, list[Any]()
        for key in keys:
            lent.append(await lender.lend())
            lent[-1].write(key.version.step)
            await holder.stage_prepared(key, plan, {0: lent[-1].hex()})
            await settled(holder)
        asked = asyncio.create_task(lender.lend())  # the trainer has heard of the commit first
        await asyncio.sleep(0)
        await holder.collect("job", 1, keys[1].version)
        assert await asked is lent[0]
        began_s = time.monotonic()
        assert await lender.lend() not in lent  # nothing is collected: it is made anew
        assert time.monotonic() - began_s >= COLLECTED_S
        other = await lender.lend(rank=1)  # of which nothing is here that could be collected
        assert other not in lent

    asyncio.run(run())


def test_prepared_memory_that_is_not_known_is_not_staged() -> None:
    async def run() -> None:
        holder = Holder("node", 100, "observer", Secret(bytes(32)))
        with pytest.raises(HolderUnavailableError, match="does not know the memory"):
            await holder.stage_prepared(KEY, PLAN, {0: "a"})
        assert holder._chunks == {}

    asyncio.run(run())


def test_only_memory_that_is_still_named_stays_lent(lender: Lender) -> None:
    async def run() -> None:
        first = await lender.lend()
        second = await lender.lend(kept=[first.hex()])
        others = await lender.lend(rank=1)
        third = await lender.lend(kept=[second.hex(), "unknown"])
        assert not await lender.can_stage(second.hex(), first.hex())
        assert await lender.can_stage(second.hex(), third.hex())
        await lender.holder.release("job", 0)
        assert await lender.can_stage(others.hex(), rank=1)
        assert lender.holder._lending.lent_bytes == 0

    asyncio.run(run())


def test_a_fence_ends_what_was_lent_to_older_generations(lender: Lender) -> None:
    async def run() -> None:
        old, new = await lender.lend(), await lender.lend(rank=1, generation=2)
        other = await lender.lend(job="other")
        await lender.holder.fence("job", 2)
        with pytest.raises(FencedError):
            await lender.lend()
        assert not await lender.can_stage(old.hex(), generation=2)
        assert await lender.can_stage(new.hex(), rank=1, generation=2)
        await lender.lend(generation=2)
        await lender.holder.forget("job")
        assert lender.holder._lending.lent_bytes == ROUND_BYTES
        key = ShardKey("other", Version(1, 1), 0)
        await lender.holder.stage_prepared(key, PLAN, {0: other.hex()})

    asyncio.run(run())


@pytest.mark.parametrize("what", ["release", "forget", "prepare"])
def test_memory_that_is_made_too_late_is_not_lent(lender: Lender, what: str) -> None:
    async def run() -> None:
        holder = lender.holder
        late = asyncio.create_task(holder.prepare("job", 0, 1, [], [3]))
        await asyncio.sleep(0)  # it is being made
        if what == "release":
            await holder.release("job", 0)
        elif what == "forget":
            await holder.forget("job")
        else:  # the trainer has given up on the first, and asks again
            reference = await lender.lend()
        assert await late == []
        assert holder._lending.lent_bytes == (ROUND_BYTES if what == "prepare" else 0)
        if what == "prepare":
            assert await lender.can_stage(reference.hex())

    asyncio.run(run())


def test_an_older_generation_ends_no_loan_of_a_newer_one(lender: Lender) -> None:
    async def run() -> None:
        memory = await lender.lend(generation=2)
        with pytest.raises(FencedError):
            await lender.lend(generation=1)
        assert await lender.can_stage(memory.hex(), generation=2)

    asyncio.run(run())


def test_a_fence_that_comes_while_memory_is_made_ends_that_too(lender: Lender) -> None:
    async def run() -> None:
        asked = asyncio.create_task(lender.lend())
        await asyncio.sleep(0)  # it is being made
        await lender.holder.fence("job", 2)
        with pytest.raises(FencedError):
            await asked
        assert lender.holder._lending.lent_bytes == 0

    asyncio.run(run())


def test_a_chunk_of_the_durable_store_is_brought_once_for_all_readers() -> None:
    async def run() -> None:
        holder, store = holder_with_a_shard(), FakeStore()
        store.objects["shard"] = b"front and more"
        wanted, origin = ChunkId(KEY, 1, 3), AtStore(store, "shard", 6)
        expected = digest(chunk(*b"and"))
        calls = [holder.bring(wanted, expected, origin) for _ in range(3)]
        await asyncio.gather(*calls)
        guest = await holder._arrivals._guests.get(expected, 3, nothing, 100)
        assert [buffer.tobytes() for buffer in guest] == [b"and"]
        assert store.calls == [("read", "shard")]

        store.objects["shard"] = b"front or more!"
        other = digest(chunk(*b"xyz"))
        with pytest.raises(ChunkCorruptError, match="durable store"):
            await holder.bring(wanted, other, origin)
        with pytest.raises(DurableObjectError, match="not there"):
            await holder.bring(wanted, other, AtStore(store, "none", 6))

    async def nothing() -> Chunk:
        raise AssertionError("it is here")

    asyncio.run(run())


def test_of_a_rank_the_newest_whole_shard_is_located() -> None:
    async def run() -> None:
        holder = holder_with_a_shard()
        assert await holder.newest_places(KEY.job, KEY.rank) == (KEY, [None])  # in no shared memory
        await holder.stage_chunk(LATER, PLAN, 0, chunk(4, 5, 6))
        await settled(holder)
        assert await holder.newest_places(KEY.job, KEY.rank) == (LATER, [None])
        assert await holder.newest_places(KEY.job, KEY.rank + 1) is None
        assert await holder.newest_places("another", KEY.rank) is None

    asyncio.run(run())
