"""What a holder offers to others: which chunks go with one call, and which calls wait."""

import asyncio
from collections.abc import Sequence

import pytest

from replication import outbox
from replication.background import Background
from replication.messages import OfferChunk
from replication.outbox import Outbox
from replication.records import HolderId, ShardKey, ShardPlan, Version

BUDDY, OTHER = HolderId("buddy", "1"), HolderId("other", "1")
ONE, TWO = ShardKey("job", Version(1, 1), 0), ShardKey("job", Version(1, 1), 1)


def offers(
    key: ShardKey, *indexes: int, to: HolderId = BUDDY, rate: int | None = None
) -> list[OfferChunk]:
    """Of chunks of 10 bytes each."""
    plan = ShardPlan(1, (10,) * 64)
    return [OfferChunk(to, key, plan, index, bytes(16), rate) for index in indexes]


class Calls:
    """Calls that end when the test says so."""

    def __init__(self) -> None:
        self.made: list[tuple[HolderId, ShardKey, list[int]]] = []
        self._ends: list[asyncio.Future[None]] = []
        self.background = Background("a test")
        self.now_s = 100.0
        self._asleep: list[tuple[float, asyncio.Future[None]]] = []
        self.unwanted: set[ShardKey] = set()
        self.outbox = Outbox(
            self._send, self.background, self._is_wanted, lambda: self.now_s, self._sleep
        )

    async def _send(self, to: HolderId, chunks: Sequence[OfferChunk]) -> None:
        self.made.append((to, chunks[0].key, [chunk.index for chunk in chunks]))
        assert {chunk.key for chunk in chunks} == {chunks[0].key}
        self._ends.append(asyncio.get_running_loop().create_future())
        await self._ends[-1]

    def _is_wanted(self, chunk: OfferChunk) -> bool:
        return chunk.key not in self.unwanted

    async def _sleep(self, seconds: float) -> None:
        self._asleep.append((self.now_s + seconds, asyncio.get_running_loop().create_future()))
        await self._asleep[-1][1]

    async def wait(self, seconds: float) -> None:
        self.now_s += seconds
        for due_s, waiter in self._asleep:
            if due_s <= self.now_s and not waiter.done():
                waiter.set_result(None)
        await self._settled()

    async def put(self, *chunks: OfferChunk) -> None:
        for chunk in chunks:
            self.outbox.put(chunk)
        await self._settled()

    async def end(self, call: int) -> None:
        self._ends[call].set_result(None)
        await self._settled()

    @property
    def indexes(self) -> list[list[int]]:
        return [indexes for _, _, indexes in self.made]

    async def _settled(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


def test_what_has_waited_goes_together_and_leaves_the_other_call_its_share() -> None:
    async def run() -> None:
        calls = Calls()
        await calls.put(*offers(ONE, 0))
        await calls.put(*offers(ONE, 1))
        await calls.put(*offers(ONE, 2, 3, 4, 5, 6))
        assert calls.indexes == [[0], [1]]
        await calls.end(0)
        assert calls.indexes[2:] == [[2, 3, 4]]
        await calls.end(1)
        assert calls.indexes[3:] == [[5]]
        await calls.end(3)
        assert calls.indexes[4:] == [[6]]
        await calls.end(2)
        await calls.end(4)
        assert not calls.background.tasks

    asyncio.run(run())


def test_shards_go_with_calls_of_their_own() -> None:
    async def run() -> None:
        calls = Calls()
        await calls.put(*offers(ONE, 0), *offers(TWO, 0, 1), *offers(ONE, 1))
        assert calls.made == [(BUDDY, ONE, [0]), (BUDDY, TWO, [0, 1])]
        await calls.end(0)
        assert calls.made[2:] == [(BUDDY, ONE, [1])]

    asyncio.run(run())


def test_a_call_carries_so_many_chunks_and_bytes_and_one_chunk_at_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run(count: int) -> list[list[int]]:
        calls = Calls()
        await calls.put(*offers(ONE, *range(count)))
        return calls.indexes

    assert list(map(len, asyncio.run(run(64)))) == [16, 16]
    monkeypatch.setattr(outbox, "CALL_BYTES", 20)
    assert asyncio.run(run(10)) == [[0, 1], [2, 3]]
    monkeypatch.setattr(outbox, "CALL_BYTES", 5)
    assert asyncio.run(run(10)) == [[0], [1]]


def test_a_peer_that_is_silent_keeps_nobody_elses_chunks_waiting() -> None:
    async def run() -> None:
        calls = Calls()
        await calls.put(*offers(ONE, *range(4)), *offers(ONE, 0, to=OTHER))
        assert [(to, indexes) for to, _, indexes in calls.made] == [
            (BUDDY, [0, 1]), (BUDDY, [2]), (OTHER, [0]),
        ]  # fmt: skip
        await calls.put(*offers(ONE, 9))
        assert len(calls.made) == 3
        await calls.end(1)
        assert calls.made[3:] == [(BUDDY, ONE, [3])]

    asyncio.run(run())


def test_nothing_is_kept_of_a_peer_that_has_it_all() -> None:
    async def run() -> None:
        calls = Calls()
        for index in range(3):
            await calls.put(*offers(ONE, index))
            await calls.end(index)
        assert calls.indexes == [[0], [1], [2]]
        assert calls.outbox._waiting == calls.outbox._calls == {}

    asyncio.run(run())


def test_a_bounded_rate_is_kept_from_the_first_chunk_on() -> None:
    async def run() -> None:
        calls = Calls()
        await calls.put(*offers(ONE, *range(4), rate=10))  # a chunk a second
        assert calls.indexes == [[0]]
        await calls.end(0)
        assert calls.indexes == [[0]]
        await calls.wait(0.9)
        assert calls.indexes == [[0]]
        await calls.wait(0.2)
        assert calls.indexes == [[0], [1]]
        await calls.wait(10.0)  # one call at a time, however long it takes
        assert calls.indexes == [[0], [1]]
        await calls.end(1)
        assert calls.indexes == [[0], [1], [2]]
        await calls.end(2)
        await calls.wait(1.0)
        assert calls.indexes == [[0], [1], [2], [3]]
        await calls.end(3)
        await calls.wait(1.0)
        assert not calls.background.tasks
        assert calls.outbox._waiting == calls.outbox._calls == {}

    asyncio.run(run())


def test_the_rate_is_that_of_all_peers_together_and_saves_do_not_wait_for_it() -> None:
    async def run() -> None:
        calls = Calls()
        await calls.put(*offers(ONE, 0, rate=10), *offers(ONE, 0, to=OTHER, rate=10))
        await calls.put(*offers(TWO, 0, 1))
        assert calls.made == [(BUDDY, ONE, [0]), (BUDDY, TWO, [0]), (BUDDY, TWO, [1])]
        await calls.wait(1.0)
        assert calls.made[3:] == [(OTHER, ONE, [0])]

    asyncio.run(run())


def test_small_chunks_at_a_bounded_rate_go_together() -> None:
    async def run() -> None:
        calls = Calls()
        await calls.put(*offers(ONE, *range(10), rate=600))  # three in a twentieth of a second
        assert calls.indexes == [[0, 1, 2]]
        await calls.end(0)
        await calls.wait(0.05)
        assert calls.indexes == [[0, 1, 2], [3, 4, 5]]

    asyncio.run(run())


def test_what_is_not_wanted_any_more_when_its_turn_comes_takes_no_time() -> None:
    async def run() -> None:
        calls = Calls()
        other = ShardKey("other", Version(1, 1), 0)
        await calls.put(*offers(ONE, 0, 1, 2, rate=10), *offers(other, 0, rate=10))
        await calls.put(*offers(TWO, 0, 1, 2))
        assert calls.made == [(BUDDY, ONE, [0]), (BUDDY, TWO, [0, 1]), (BUDDY, TWO, [2])]
        await calls.end(0)
        calls.unwanted = {ONE, TWO}  # while its turn is waited for; without a bound nobody asks
        await calls.wait(1.0)
        assert calls.made[3:] == [(BUDDY, other, [0])]
        await calls.put(*offers(ONE, 3, rate=10))
        await calls.end(3)
        await calls.wait(1.0)
        assert len(calls.made) == 4
        calls.unwanted = set()
        await calls.put(*offers(ONE, 3, rate=10))
        assert calls.made[4:] == [(BUDDY, ONE, [3])]

    asyncio.run(run())


def test_what_is_offered_again_while_it_waits_goes_once() -> None:
    async def run() -> None:
        calls = Calls()
        await calls.put(*offers(ONE, 0, 1, rate=10))
        await calls.put(*offers(ONE, 1, 2, rate=10))
        for call in range(3):
            await calls.end(call)
            await calls.wait(1.0)
        assert calls.indexes == [[0], [1], [2]]

    asyncio.run(run())
