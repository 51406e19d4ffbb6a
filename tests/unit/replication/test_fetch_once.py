"""What several processes of a host want from another one comes once."""

import asyncio

import numpy as np
import pytest

from replication import fetch_once
from replication.errors import HolderUnavailableError
from replication.fetch_once import FetchOnce
from replication.records import Chunk

SIZE = 100


class Other:
    """Another host; answers when told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.problem: Exception | None = None

    async def fetch(self) -> Chunk:
        self.asked += 1
        await self.may_answer.wait()
        if self.problem is not None:
            raise self.problem
        return [np.zeros(SIZE, dtype=np.uint8)]


async def get(once: FetchOnce, other: Other, checksum: bytes = b"a", room: int = 1000) -> Chunk:
    return await once.get(checksum, SIZE, other.fetch, room)


async def get_at_once(once: FetchOnce, checksum: bytes, room: int = 1000) -> Other:
    other = Other()
    other.may_answer.set()
    await get(once, other, checksum, room)
    return other


def test_all_who_ask_wait_for_one_fetch_and_later_ones_find_it() -> None:
    async def run() -> None:
        once, other = FetchOnce("host"), Other()
        waiting = [asyncio.create_task(get(once, other)) for _ in range(3)]
        await asyncio.sleep(0)
        assert once.held_bytes == SIZE  # on its way
        other.may_answer.set()
        first, *others = await asyncio.gather(*waiting)
        assert all(one is first for one in [*others, await get(once, other)])
        assert other.asked == 1
        assert once.held_bytes == SIZE

    asyncio.run(run())


def test_a_failure_is_everybody_s_who_waits_and_the_next_one_tries_again() -> None:
    async def run() -> None:
        once, other = FetchOnce("host"), Other()
        other.problem = HolderUnavailableError("other", "it is gone")
        waiting = [asyncio.create_task(get(once, other)) for _ in range(2)]
        await asyncio.sleep(0)
        other.may_answer.set()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert outcomes == [other.problem] * 2
        assert once.held_bytes == 0
        other.problem = None
        await get(once, other)
        assert other.asked == 2

    asyncio.run(run())


def test_who_gives_up_takes_it_from_nobody_else() -> None:
    async def run() -> None:
        once, other = FetchOnce("host"), Other()
        hasty, patient = (asyncio.create_task(get(once, other)) for _ in range(2))
        await asyncio.sleep(0)
        hasty.cancel()
        other.may_answer.set()
        assert len(await patient) == 1
        assert other.asked == 1

    asyncio.run(run())


def test_without_room_what_was_asked_for_longest_ago_goes() -> None:
    async def run() -> None:
        once = FetchOnce("host")
        for checksum in (b"a", b"b", b"a", b"c"):
            await get_at_once(once, checksum, room=2 * SIZE)
        assert once.held_bytes == 2 * SIZE
        assert (await get_at_once(once, b"a", room=2 * SIZE)).asked == 0
        assert (await get_at_once(once, b"b", room=2 * SIZE)).asked == 1

    asyncio.run(run())


def test_what_is_on_its_way_keeps_its_room() -> None:
    async def run() -> None:
        once, other = FetchOnce("host"), Other()
        waiting = asyncio.create_task(get(once, other, room=SIZE))
        await asyncio.sleep(0)
        with pytest.raises(HolderUnavailableError, match="no room"):
            await get(once, other, b"b", room=SIZE)
        other.may_answer.set()
        await waiting
        with pytest.raises(HolderUnavailableError, match="no room"):
            await get(once, other, b"c", room=SIZE - 1)
        assert other.asked == 1

    asyncio.run(run())


def test_what_nobody_asks_for_any_more_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        now_s = 100.0
        monkeypatch.setattr(fetch_once.time, "monotonic", lambda: now_s)
        once = FetchOnce("host")
        await get_at_once(once, b"a")
        now_s += 0.6 * fetch_once.KEEP_S
        await get_at_once(once, b"b")
        once.trim(1000)
        assert once.held_bytes == 2 * SIZE
        now_s += 0.6 * fetch_once.KEEP_S
        once.trim(1000)
        assert once.held_bytes == SIZE
        assert (await get_at_once(once, b"b")).asked == 0
        once.trim(0)
        assert once.held_bytes == 0

    asyncio.run(run())
