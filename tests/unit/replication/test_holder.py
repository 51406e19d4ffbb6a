"""The holder's shell, without Ray: what it tells the coordinator, and what it reads again."""

import asyncio
from typing import Any

import numpy as np
import pytest

from replication import messages
from replication.checksum import digest
from replication.holder import Holder
from replication.inventory import Inventory
from replication.records import Chunk, HolderId, ShardKey, ShardPlan, Version
from replication.scrub import Scrub
from replication.wire import Secret

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
        holder._feed(messages.ChunkFoundCorrupt(KEY))
        await holder.hello()
        await until_told(observer, "corrupt")

    asyncio.run(run())
    assert observer.told == [("corrupt", [KEY])]


def test_a_good_copy_in_the_place_of_a_corrupt_one_is_what_is_told(observer: Observer) -> None:
    async def run() -> None:
        holder = holder_with_a_shard()
        holder._feed(messages.ChunkFoundCorrupt(KEY))
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
