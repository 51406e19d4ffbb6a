"""The core of repair: how much at once, to whom, what ends one, and which copies are too many."""

from itertools import combinations, product

import pytest

from replication.records import HolderId, Life, ShardKey, ShardPlan, ShardRecord, Version
from tests.unit.tiered.test_job import A, B, C, D, begin, begun, of
from tiered import messages as m
from tiered.config import JobSettings, Memory
from tiered.job import Job
from tiered.repair import REPAIR_BASE_S, REPAIRS_AT_ONCE, RESTORES_FIRST_S

E = HolderId("e", "1")
RANKS = REPAIRS_AT_ONCE + 4
VERSION = Version(1, 10)


def shard(rank: int, *, is_replica: bool = False) -> ShardRecord:
    key = ShardKey("job", VERSION, rank)
    return ShardRecord(key, ShardPlan(RANKS, (0,)), (b"d" * 16,), is_replica=is_replica)


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
    assert [r.key.rank for r in asked] == list(range(8))
    assert not repairs(job.handle(m.Ticked(), 2.0))
    job.handle(m.ShardReported(C, shard(0)), 3.0)
    job.handle(m.ShardReported(C, shard(1)), 3.0)
    more = repairs(job.handle(m.Ticked(), 4.0))
    assert [r.key.rank for r in more] == [REPAIRS_AT_ONCE, REPAIRS_AT_ONCE + 1]


def test_a_copy_under_way_is_not_asked_for_once_more_from_or_to_another() -> None:
    job = committed(A, B, C, D)
    job.drop_copy(B, shard(0).key)
    assert [r.key.rank for r in repairs(job.handle(m.Ticked(), 1.0))] == [0]
    assert not repairs(job.handle(m.Ticked(), 2.0))


@pytest.mark.parametrize("cut", [frozenset(), frozenset({("a", "e")})])
def test_the_second_missing_copy_goes_to_another_host_than_the_one_under_way_if_to_any(
    cut: frozenset[tuple[str, str]],
) -> None:
    memory = Memory(every_steps=1, replicas=2, repair_bytes_per_s=1_000_000)
    job = begun(memory, holders=(A, B, C, D, E))
    job.handle(m.LinksCut(cut), 0.0)
    key = ShardKey("job", VERSION, 0)
    for holder in (A, B, C):
        record = ShardRecord(key, ShardPlan(1, (10_000_000,)), (b"d" * 16,), is_replica=holder != A)
        job.handle(m.ShardReported(holder, record), 0.0)
    asked = [*job.handle(m.HolderDown(B), 1.0), *job.handle(m.HolderDown(C), 1.0)]
    for now_s in (2.0, 11.0, 12.0, 21.0):  # a host sends once in 10 s
        asked += job.handle(m.Ticked(), now_s)
    assert sorted(r.to for r in repairs(asked)) == ([D] if cut else [D, E])


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
    job = committed(A, B, C, D)
    job.handle(m.HostLeaving("c"), 1.0)
    job.drop_copy(B, shard(0).key)
    job.handle(m.ShardReported(D, shard(1)), 1.0)  # it has more than the one that leaves
    job.buddies[A] = ()
    assert [r.to for r in repairs(job.repair.repair(2.0))] == [D]


def test_a_copy_that_was_made_and_then_found_corrupt_is_made_again() -> None:
    job = committed(A, B, C)
    job.handle(m.HolderDown(B), 1.0)
    for rank in range(6):  # the others are under way by then, and there is room
        job.handle(m.ShardReported(C, shard(rank)), 2.0)
    job.handle(m.Ticked(), 3.0)
    again = repairs(job.handle(m.CopyFoundCorrupt(C, shard(0).key), 4.0))
    assert [(r.key.rank, r.to) for r in again] == [(0, C)]


def test_a_repair_that_was_not_taken_goes_to_another_host() -> None:
    job = committed(A, B, C, D)
    (first, *_) = repairs(job.handle(m.HolderDown(B), 1.0))
    (again, *_) = repairs(job.handle(m.Ticked(), 100.0))
    assert again.key == first.key
    assert {first.to, again.to} == {C, D}


def resumed(*holders: HolderId) -> Job:
    """The next life of `committed`, whose ranks were just told to read what B has lost."""
    job = committed(*holders)
    begin(job, "two", Memory(every_steps=1), ranks=RANKS)  # at 0 s
    assert not repairs(job.handle(m.HolderDown(B), 1.0))
    return job


def test_nothing_is_copied_before_the_last_rank_has_its_state() -> None:
    job = resumed(A, B, C)
    for rank in range(RANKS - 1):
        assert not repairs(job.handle(m.RankRestored(2, rank), 2.0))
        assert not repairs(job.handle(m.Ticked(), 2.0))
    asked = repairs(job.handle(m.RankRestored(2, RANKS - 1), 3.0))
    assert not job.handle(m.RankRestored(2, RANKS - 1), 3.0)  # it said so again
    assert [r.key.rank for r in asked] == list(range(REPAIRS_AT_ONCE))


def test_what_was_under_way_is_asked_for_again_from_the_same_host_to_the_same_one() -> None:
    job = committed(A, B, C, D)
    before = repairs(job.handle(m.HolderDown(B), 1.0))
    begin(job, "two", Memory(every_steps=1), ranks=RANKS)
    assert not repairs(job.handle(m.Ticked(), 2.0))
    for rank in range(RANKS):
        asked = repairs(job.handle(m.RankRestored(2, rank), 3.0))
        if asked:
            break
    assert [(r.source, r.key, r.to) for r in asked] == [(r.source, r.key, r.to) for r in before]
    assert {r.generation for r in asked} == {2}


def test_ranks_of_another_generation_are_not_those_that_read() -> None:
    job = resumed(A, B, C)
    for rank in range(RANKS):
        assert not repairs(job.handle(m.RankRestored(1, rank), 2.0))
    assert not repairs(job.handle(m.Ticked(), 2.0))


def test_ranks_that_read_for_long_are_not_waited_for() -> None:
    job = resumed(A, B, C)
    assert not repairs(job.handle(m.Ticked(), RESTORES_FIRST_S - 0.1))
    assert len(repairs(job.handle(m.Ticked(), RESTORES_FIRST_S))) == REPAIRS_AT_ONCE


def test_a_job_that_fails_again_and_again_is_repaired_half_of_the_time() -> None:
    job = resumed(A, B, C)
    begin(job, "three", Memory(every_steps=1), ranks=RANKS)
    assert not repairs(job.handle(m.Ticked(), RESTORES_FIRST_S - 0.1))
    assert repairs(job.handle(m.Ticked(), RESTORES_FIRST_S))
    for left_alone_s in (0.0, RESTORES_FIRST_S / 3, RESTORES_FIRST_S, 2 * RESTORES_FIRST_S):
        later, begins_s = resumed(A, B, C), RESTORES_FIRST_S + left_alone_s
        later.repair.ranks_read(RANKS, begins_s)
        ends_s = begins_s + min(left_alone_s, RESTORES_FIRST_S)
        assert not repairs(later.handle(m.Ticked(), ends_s - 0.1))
        assert repairs(later.handle(m.Ticked(), ends_s))


def test_restores_that_are_soon_over_go_first_each_time() -> None:
    job = resumed(A, B, C)
    for number in range(12):
        now_s = number * RESTORES_FIRST_S / 5
        job.repair.ranks_read(RANKS, now_s)
        assert not repairs(job.handle(m.Ticked(), now_s + 2.0))
        for rank in range(RANKS):
            job.repair.rank_has_read(rank, now_s + 2.0)
    assert repairs(job.handle(m.Ticked(), now_s + 2.0))


def test_what_a_leaving_host_has_is_copied_although_ranks_read() -> None:
    job = resumed(A, B, C, D)
    assert repairs(job.handle(m.HostLeaving("a"), 2.0))


def test_a_host_that_has_left_is_no_reason_not_to_wait() -> None:
    job = resumed(A, B, C)
    assert not repairs(job.handle(m.HostLeaving("b"), 2.0))
    assert repairs(job.handle(m.Ticked(), RESTORES_FIRST_S))


def test_only_who_would_read_can_be_refused_so_that_nobody_does() -> None:
    job = resumed(A, B, C)
    late = m.BeginAsked(Life("one"), 0, RANKS, JobSettings(Memory(every_steps=1)))
    (answer,) = of(m.AnswerBegin, job.handle(late, 2.0))  # it was overtaken
    assert answer.error is not None
    assert not repairs(job.handle(m.Ticked(), 2.0))


def test_who_saves_has_its_state_although_nobody_said_so() -> None:
    job = resumed(A, B, C)
    job.handle(m.SaveAsked(Version(1, 20)), 2.0)  # of the older life
    assert not repairs(job.handle(m.Ticked(), 2.0))
    job.handle(m.SaveAsked(Version(2, 20)), 2.0)
    assert repairs(job.handle(m.Ticked(), 2.0))


def test_a_fresh_start_has_nothing_to_read() -> None:
    job = begun(holders=(A, B, C), ranks=RANKS)
    for rank in range(RANKS):
        for holder in (A, B):
            job.handle(m.ShardReported(holder, shard(rank)), 0.0)
    assert len(repairs(job.handle(m.HolderDown(B), 1.0))) == REPAIRS_AT_ONCE


def test_a_copy_at_a_low_rate_has_more_time_before_it_counts_as_lost() -> None:
    memory = Memory(every_steps=1, repair_bytes_per_s=2_000_000)
    job = begun(memory, holders=(A, B, C))
    key = ShardKey("job", VERSION, 0)
    for holder in (A, B):
        record = ShardRecord(key, ShardPlan(1, (100_000_000,)), (b"d" * 16,))
        job.handle(m.ShardReported(holder, record), 0.0)
    (asked,) = repairs(job.handle(m.HolderDown(B), 100.0))
    assert (asked.to, asked.bytes_per_s) == (C, 2_000_000)
    lost_s = 100.0 + REPAIR_BASE_S + 100  # twice as long as the rate has it
    assert not repairs(job.handle(m.Ticked(), lost_s - 1.0))
    (again,) = repairs(job.handle(m.Ticked(), lost_s + 1.0))
    assert again == asked


def test_repairs_that_the_buddies_cannot_take_go_to_whoever_has_least() -> None:
    job = committed(A, B, C, D)
    for rank in range(3, RANKS):
        job.handle(m.ShardReported(C, shard(rank, is_replica=True)), 0.5)
    for rank in range(3):
        job.drop_copy(B, shard(rank).key)
    job.buddies[A] = ()
    assert {r.to for r in repairs(job.repair.repair(1.0))} == {D}


def alone(
    holders: tuple[HolderId, ...], *with_copies: HolderId, replicas: int, size_bytes: int = 0
) -> Job:
    """A committed step of one rank, with these copies and nobody's buddies known."""
    job = begun(Memory(every_steps=1, replicas=replicas), holders=holders)
    key = ShardKey("job", VERSION, 0)
    for holder in with_copies:
        record = ShardRecord(key, ShardPlan(1, (size_bytes,)), (b"d" * 16,))
        job.add_copy(holder, record)
    job.commits[VERSION] = True
    job.buddies.clear()
    return job


def test_a_copy_goes_to_the_source_s_buddy_whoever_has_less() -> None:
    job = committed(A, B, C, D)
    (buddy,) = job.buddies[A]
    assert buddy in {C, D}
    job.handle(m.ShardReported(buddy, shard(1)), 0.5)
    job.drop_copy(B, shard(0).key)
    assert [(r.source, r.to) for r in repairs(job.repair.repair(1.0))] == [(A, buddy)]


def test_each_source_is_tried_before_the_next_target() -> None:
    job, tried = alone((A, B, C, D), A, B, replicas=2), []
    for number in range(5):
        (asked,) = repairs(job.repair.repair(number * 100.0))
        tried.append((asked.source, asked.to))
    assert tried == [(A, C), (B, C), (A, D), (B, D), (A, C)]


def test_two_missing_copies_are_asked_for_at_once_where_the_rate_allows_it() -> None:
    job = alone((A, B, C, D), A, replicas=2)
    assert [r.to for r in repairs(job.repair.repair(1.0))] == [B, C]


def test_a_big_shard_is_given_the_time_that_it_takes() -> None:
    job = alone((A, B), A, replicas=1, size_bytes=2_000_000_000)
    takes_s = REPAIR_BASE_S + 100.0
    assert repairs(job.repair.repair(1.0))
    assert not repairs(job.repair.repair(0.9 + takes_s))
    assert repairs(job.repair.repair(1.0 + takes_s))


def test_a_step_below_the_mark_begins_with_its_first_source_again_and_no_other() -> None:
    for mark, expected in ((VERSION, B), (Version(1, 11), A)):
        job = alone((A, B, C), A, B, replicas=2)
        assert [r.source for r in repairs(job.repair.repair(0.0))] == [A]
        job.repair.forget_below(mark)
        assert [r.source for r in repairs(job.repair.repair(100.0))] == [expected]


# --- copies too many -----------------------------------------------------------------------------


def surplus(
    copies: dict[HolderId, bool], *, domains: str = "", replicas: int = 1, leaving: str = ""
) -> set[HolderId]:
    """Whom a coordinator has let go that sees these copies of one old shard (True: a replica)."""
    memory = Memory(every_steps=1, replicas=replicas)
    job = begun(memory, holders=tuple(copies))
    job.holders.update(zip(sorted(copies), domains, strict=False))
    job.leaving.update(leaving)
    version = Version(0, 7)  # of an older generation
    record = ShardRecord(ShardKey("job", version, 0), ShardPlan(1, (0,)), (b"d" * 16,))
    job.copies[version] = {
        0: {
            holder: ShardRecord(record.key, record.plan, record.digests, is_replica=is_replica)
            for holder, is_replica in copies.items()
        }
    }
    orders = job.repair.release()
    assert not {o.holder for o in orders} & set(job.intact(version, 0))  # counted no more
    return {o.holder for o in orders if o.keys == (record.key,)}


def test_a_copy_more_than_the_policy_asks_for_is_let_go_of_and_the_writers_stays() -> None:
    gone = surplus({A: True, B: False, C: True})
    assert len(gone) == 1
    assert B not in gone
    assert not surplus({A: True, B: False})
    assert not surplus({A: True, B: False, C: True}, replicas=2)


@pytest.mark.parametrize("replicas", [0, 1, 2])
def test_two_coordinators_with_different_views_leave_as_many_as_the_policy_asks_for(
    replicas: int,
) -> None:
    hosts = (A, B, C, D)
    views = [set(v) for n in range(1 + replicas, 5) for v in combinations(hosts, n)]
    for domains in ("", "xxyy", "xyxy", "xxxy"):
        of_host = dict(zip(hosts, domains, strict=False))
        gone = []
        for view in views:
            seen = "".join(of_host.get(h, "") for h in sorted(view))
            gone.append(surplus(dict.fromkeys(view, True), domains=seen, replicas=replicas))
        for one, other in product(range(len(views)), repeat=2):
            left = (views[one] | views[other]) - gone[one] - gone[other]
            assert len(left) >= 1 + replicas


def test_a_copy_on_a_host_that_leaves_makes_none_elsewhere_one_too_many() -> None:
    for leaving in "abc":
        assert not surplus({A: False, B: True, C: True}, leaving=leaving)
    assert len(surplus({A: False, B: True, C: True, D: True}, leaving="a")) == 1


def test_no_copy_goes_that_alone_is_in_another_domain() -> None:
    for domains in ("xxxy", "xxyx", "xyxx", "yxxx"):
        hosts = dict(zip((A, B, C, D), domains, strict=True))
        gone = surplus(dict.fromkeys(hosts, True), domains=domains)
        left = {domain for host, domain in hosts.items() if host not in gone}
        assert gone
        assert left == {"x", "y"}


def test_copies_of_a_step_on_its_way_are_left_to_its_writer() -> None:
    job = committed(A, B, C)
    newer = Version(1, 20)
    for version, holders in ((VERSION, (C,)), (newer, (A, B, C))):
        for holder in holders:
            key = ShardKey("job", version, 0)
            record = ShardRecord(key, ShardPlan(RANKS, (0,)), (b"d" * 16,), is_replica=holder != A)
            job.handle(m.ShardReported(holder, record), 0.0)
    orders = of(m.ReleaseCopies, job.handle(m.Ticked(), 20.0))
    assert {key for o in orders for key in o.keys} == {shard(0).key}
    assert not of(m.ReleaseCopies, job.handle(m.Ticked(), 21.0))


def test_of_every_committed_step_the_copies_too_many_go() -> None:
    job = begun(holders=(A, B, C))
    versions = [Version(1, step) for step in (10, 20)]
    for version in versions:
        for holder in (A, B, C):
            key = ShardKey("job", version, 0)
            record = ShardRecord(key, ShardPlan(1, (0,)), (b"d" * 16,), is_replica=holder != A)
            job.handle(m.ShardReported(holder, record), 0.0)
    orders = job.repair.release()
    assert [key.version for order in orders for key in order.keys] == versions


def test_what_a_trainer_staged_is_never_one_too_many() -> None:
    assert not surplus({A: False, B: False}, replicas=0)
    assert len(surplus({A: False, B: True}, replicas=0)) == 1
