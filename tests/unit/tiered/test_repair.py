"""The core of repair: how much at once, to whom, and what ends one."""

from replication.records import HolderId, ShardKey, ShardPlan, ShardRecord, Version
from tests.unit.tiered.test_job import A, B, C, D, begun, of
from tiered import messages as m
from tiered.job import Job
from tiered.repair import REPAIR_BASE_S, REPAIRS_AT_ONCE

RANKS = REPAIRS_AT_ONCE + 4
VERSION = Version(1, 10)


def shard(rank: int) -> ShardRecord:
    return ShardRecord(ShardKey("job", VERSION, rank), ShardPlan(RANKS, (0,)), (b"d" * 16,))


def committed(*holders: HolderId) -> Job:
    """A step of so many ranks that not all of it can be repaired at once, all of it on A and B."""
    job = begun(holders=holders, ranks=RANKS)
    for rank in range(RANKS):
        for holder in (A, B):
            job.handle(m.ShardReported(holder, shard(rank)), 0.0)
    assert job.level(VERSION)[0] == "replicated"
    return job


def repairs(commands: list[m.Command]) -> list[m.ReplicateShard]:
    return of(m.ReplicateShard, commands)


def test_a_bounded_number_is_under_way_and_one_that_is_done_makes_room() -> None:
    job = committed(A, B, C)
    asked = repairs(job.handle(m.HolderDown(B), 1.0))
    assert [r.key.rank for r in asked] == list(range(REPAIRS_AT_ONCE))
    assert not repairs(job.handle(m.Ticked(), 2.0))
    job.handle(m.ShardReported(C, shard(0)), 3.0)
    job.handle(m.ShardReported(C, shard(1)), 3.0)
    more = repairs(job.handle(m.Ticked(), 4.0))
    assert [r.key.rank for r in more] == [REPAIRS_AT_ONCE, REPAIRS_AT_ONCE + 1]


def test_one_that_takes_too_long_is_asked_for_again() -> None:
    job = committed(A, B, C)
    job.handle(m.HolderDown(B), 1.0)
    assert not repairs(job.handle(m.Ticked(), REPAIR_BASE_S))
    again = repairs(job.handle(m.Ticked(), REPAIR_BASE_S + 1.0))
    assert [r.key.rank for r in again] == list(range(REPAIRS_AT_ONCE))


def test_one_to_a_host_that_is_lost_goes_to_another_at_once() -> None:
    job = committed(A, B, C, D)
    first = repairs(job.handle(m.HolderDown(B), 1.0))
    (lost,) = {r.to for r in first}
    (left,) = {C, D} - {lost}
    again = repairs(job.handle(m.HolderDown(lost), 2.0))
    assert {r.to for r in again} == {left}
    assert [r.key.rank for r in again] == [r.key.rank for r in first]


def test_nothing_is_sent_to_a_host_that_leaves() -> None:
    job = committed(A, B, C, D)
    job.handle(m.HostLeaving("c"), 1.0)
    assert {r.to for r in repairs(job.handle(m.HolderDown(B), 2.0))} == {D}


def test_a_copy_that_was_made_and_then_found_corrupt_is_made_again() -> None:
    job = committed(A, B, C)
    job.handle(m.HolderDown(B), 1.0)
    for rank in range(6):  # the others are under way by then, and there is room
        job.handle(m.ShardReported(C, shard(rank)), 2.0)
    job.handle(m.Ticked(), 3.0)
    again = repairs(job.handle(m.CopyFoundCorrupt(C, shard(0).key), 4.0))
    assert [(r.key.rank, r.to) for r in again] == [(0, C)]
