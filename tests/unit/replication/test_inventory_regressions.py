"""Defects of the holder's core that the simulator found, each as the events that showed it."""

import pytest

from replication.errors import FencedError, MemoryBudgetError
from replication.inventory import (
    BuddiesChanged,
    ChunkFetched,
    ChunkFoundCorrupt,
    ChunkHashed,
    ChunkNotTaken,
    ChunkStaged,
    FenceRaised,
    Inventory,
    JobForgotten,
    ReportShard,
    Reservation,
    Ticked,
    WatermarkRaised,
)
from replication.records import HolderId, ShardKey, ShardPlan, Version

KEY = ShardKey("job", Version(1, 10), 0)
PLAN = ShardPlan(1, (1, 1))


def test_what_is_pinned_below_the_watermark_stays_until_it_is_released() -> None:
    core = Inventory(HolderId("a", "1"), 100)
    keys = [ShardKey("job", Version(1, step), 0) for step in (0, 5, 10)]
    for key in keys:
        core.handle(ChunkStaged(key, ShardPlan(1, (1,)), 0), 0.0)
    pinned = (keys[0].version,)
    core.handle(WatermarkRaised("job", 1, keys[2].version, pinned), 0.0)
    assert list(core.shards) == [keys[0], keys[2]]
    assert core.handle(ChunkStaged(keys[0], ShardPlan(1, (1,)), 0), 0.0) == []  # told again
    core.handle(WatermarkRaised("job", 1, keys[1].version, pinned), 0.0)  # late
    assert list(core.shards) == [keys[0], keys[2]]
    core.handle(WatermarkRaised("job", 1, keys[2].version), 0.0)
    assert list(core.shards) == [keys[2]]


def test_an_offer_of_a_chunk_that_was_found_corrupt_is_not_repeated() -> None:
    core, peer = Inventory(HolderId("a", "1"), 100), HolderId("b", "1")
    core.handle(BuddiesChanged("job", (peer,)), 0.0)
    for index in range(2):
        core.handle(ChunkStaged(KEY, PLAN, index), 0.0)
        core.handle(ChunkHashed(KEY, index, b"%016d" % index), 0.0)
    core.handle(ChunkFoundCorrupt(KEY), 0.0)
    core.handle(ChunkFetched(KEY, PLAN, 0, b"%016d" % 0), 0.0)
    core.handle(ChunkNotTaken(peer, KEY, 1), 0.0)
    assert core.handle(Ticked(), 100.0) == []


def test_a_peers_copy_of_what_a_new_generation_resumed_from_is_taken() -> None:
    core = Inventory(HolderId("a", "1"), 100)
    core.handle(FenceRaised("job", 2), 0.0)
    core.check_copy(KEY, PLAN)
    with pytest.raises(FencedError):
        core.check_write(KEY, PLAN)


def test_a_corrupt_copy_is_replaced_by_a_verified_one() -> None:
    core = Inventory(HolderId("a", "1"), 100)
    for index in range(2):
        core.handle(ChunkStaged(KEY, PLAN, index), 0.0)
        core.handle(ChunkHashed(KEY, index, b"%016d" % index), 0.0)
    core.handle(ChunkFoundCorrupt(KEY), 0.0)
    assert not core.has_chunk(KEY, 0)
    assert core.handle(ChunkFetched(KEY, PLAN, 0, b"%016d" % 0), 0.0) == []
    assert core.records() == []
    commands = core.handle(ChunkFetched(KEY, PLAN, 1, b"%016d" % 1), 0.0)
    assert commands == [ReportShard(core.record(KEY))]


def test_what_an_ended_job_holds_counts_and_what_it_declared_does_not() -> None:
    core = Inventory(HolderId("a", "1"), 100)
    core.reserve("old", 0, Reservation(1, 80, "80"))
    with pytest.raises(MemoryBudgetError, match="80 belong to other jobs"):
        core.reserve("new", 0, Reservation(1, 40, "40"))
    key = ShardKey("old", Version(1, 10), 0)
    core.handle(ChunkStaged(key, ShardPlan(1, (30,)), 0), 0.0)
    core.release("old", 0)
    core.reserve("new", 0, Reservation(1, 40, "40"))
    with pytest.raises(MemoryBudgetError, match="40 are declared by other ranks"):
        core.reserve("new", 1, Reservation(1, 40, "40"))
    core.handle(JobForgotten("old"), 0.0)
    core.reserve("new", 1, Reservation(1, 40, "40"))
