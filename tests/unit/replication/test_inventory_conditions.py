"""Conditions of the holder's core, one by one: each test fails without the one it names."""

import pytest

from replication.errors import FencedError, MemoryBudgetError, ShardNotHeldError
from replication.inventory import REMIND_S, Inventory, Reservation
from replication.messages import (
    BuddiesChanged,
    ChunkFetched,
    ChunkFoundCorrupt,
    ChunkHashed,
    ChunkKnown,
    ChunkNotTaken,
    ChunkRead,
    ChunkStaged,
    ChunkTaken,
    Command,
    CopiesReleased,
    DropShard,
    FenceRaised,
    HashChunk,
    JobForgotten,
    OfferChunk,
    ReadChunk,
    ReadTwin,
    ReplicationRequested,
    ReportCorrupt,
    ReportShard,
    ShareChunk,
    StepDropped,
    Ticked,
    TwinRead,
    WatermarkRaised,
)
from replication.offers import OFFER_BACKOFF_S
from replication.records import ChunkId, HolderId, ShardKey, ShardPlan, Version
from replication.scrub import Scrub

A, B, C = (HolderId(name, "1") for name in "abc")
PLAN = ShardPlan(1, (1, 1))


def key(step: int = 10, rank: int = 0, *, generation: int = 1, job: str = "job") -> ShardKey:
    return ShardKey(job, Version(generation, step), rank)


def digest(index: int) -> bytes:
    return b"%016d" % index


def holder(capacity_bytes: int = 100, scrub: Scrub | None = None) -> Inventory:
    return Inventory(A, capacity_bytes, scrub)


def stage(core: Inventory, shard: ShardKey, plan: ShardPlan = PLAN) -> list[Command]:
    """A trainer's shard, hashed at once."""
    commands: list[Command] = []
    for index in range(len(plan.chunk_sizes)):
        core.handle(ChunkStaged(shard, plan, index), 0.0)
        commands += core.handle(ChunkHashed(shard, index, digest(index)), 0.0)
    return commands


def fetch(core: Inventory, shard: ShardKey, plan: ShardPlan = PLAN) -> list[Command]:
    """A copy from another holder."""
    commands: list[Command] = []
    for index in range(len(plan.chunk_sizes)):
        commands += core.handle(ChunkFetched(shard, plan, index, digest(index)), 0.0)
    return commands


def offers(commands: list[Command]) -> list[tuple[HolderId, ShardKey, int]]:
    return [(c.to, c.key, c.index) for c in commands if isinstance(c, OfferChunk)]


# --- what is here, and what is told of it --------------------------------------------------------


def test_only_what_is_whole_here_has_a_record() -> None:
    core = holder()
    with pytest.raises(ShardNotHeldError):
        core.record(key())
    core.handle(ChunkFetched(key(), PLAN, 0, digest(0)), 0.0)
    with pytest.raises(ShardNotHeldError):
        core.record(key())
    core.handle(ChunkFetched(key(), PLAN, 1, digest(1)), 0.0)
    assert core.record(key()).digests == (digest(0), digest(1))
    core.handle(ChunkFoundCorrupt(key(), 0), 0.0)
    with pytest.raises(ShardNotHeldError):
        core.record(key())


def test_a_record_says_whether_the_copy_is_the_trainer_s_own() -> None:
    core = holder()
    stage(core, key(10))
    fetch(core, key(10, 1))
    assert [r.is_replica for r in core.records()] == [False, True]


def test_records_are_those_of_the_job_asked_for_in_order() -> None:
    core = holder()
    for shard in (key(20), key(10), key(10, job="other")):
        fetch(core, shard)
    assert [r.key for r in core.records("job")] == [key(10), key(20)]
    assert [r.key for r in core.records()] == [key(10), key(20), key(10, job="other")]


def test_a_shard_counts_once_every_chunk_is_hashed_not_once_it_is_staged() -> None:
    core = holder()
    for index in (0, 1):
        assert core.handle(ChunkStaged(key(), PLAN, index), 0.0) == [HashChunk(key(), index)]
    assert core.handle(ChunkHashed(key(), 1, digest(1)), 0.0) == []
    assert not core.records()
    assert core.handle(ChunkHashed(key(), 0, digest(0)), 0.0) == [ReportShard(core.record(key()))]
    assert core.record(key()).digests == (digest(0), digest(1))


def test_a_chunk_is_hashed_once_however_often_it_is_staged() -> None:
    core = holder()
    core.handle(ChunkStaged(key(), PLAN, 0), 0.0)
    assert core.handle(ChunkStaged(key(), PLAN, 0), 0.0) == []
    core.handle(ChunkHashed(key(), 0, digest(0)), 0.0)
    assert core.handle(ChunkHashed(key(), 0, digest(7)), 0.0) == []
    core.handle(ChunkStaged(key(), PLAN, 1), 0.0)
    core.handle(ChunkHashed(key(), 1, digest(1)), 0.0)
    assert core.record(key()).digests == (digest(0), digest(1))


def test_a_chunk_that_comes_twice_is_the_first_one() -> None:
    core = holder()
    core.handle(ChunkFetched(key(), PLAN, 0, digest(0)), 0.0)
    before = dict(core.shards[key()].blocks)
    assert core.handle(ChunkFetched(key(), PLAN, 0, digest(7)), 0.0) == []
    assert core.shards[key()].blocks == before
    core.handle(ChunkFetched(key(), PLAN, 1, digest(1)), 0.0)
    assert core.record(key()).digests == (digest(0), digest(1))


def test_which_chunks_are_here() -> None:
    core = holder()
    assert not core.has_chunk(key(), 0)
    core.handle(ChunkStaged(key(), PLAN, 0), 0.0)
    assert [core.has_chunk(key(), index) for index in (0, 1)] == [True, False]
    core.handle(ChunkFoundCorrupt(key(), 0), 0.0)
    assert not core.has_chunk(key(), 0)


def test_a_shard_that_was_made_here_stays_the_trainer_s_when_a_peer_replaces_a_corrupt_copy() -> (
    None
):
    core = holder()
    core.handle(BuddiesChanged("job", (B,)), 0.0)
    stage(core, key())
    core.handle(ChunkFoundCorrupt(key(), 0), 0.0)
    fetch(core, key())
    assert not core.record(key()).is_replica


# --- fence, watermark, dropped steps -------------------------------------------------------------


def test_a_write_of_the_fence_s_own_generation_is_let_in_and_of_an_older_one_is_not() -> None:
    core = holder()
    core.handle(FenceRaised("job", 2), 0.0)
    core.check_write(key(generation=2), PLAN)
    core.check_write(key(generation=1, job="other"), PLAN)
    with pytest.raises(FencedError):
        core.check_write(key(generation=1), PLAN)


def test_a_newer_generation_s_write_or_copy_is_its_fence() -> None:
    for come in (stage, fetch):
        core = holder()
        come(core, key(generation=3))
        core.handle(FenceRaised("job", 2), 0.0)  # late
        with pytest.raises(FencedError):
            core.check_write(key(generation=2), PLAN)
        core.check_write(key(generation=3), PLAN)


def test_what_is_below_the_mark_is_taken_no_more_and_the_mark_itself_is() -> None:
    for event in (ChunkStaged, ChunkFetched):
        core = holder()
        core.handle(WatermarkRaised("job", 1, Version(1, 20)), 0.0)
        more = (digest(0),) if event is ChunkFetched else ()
        assert core.handle(event(key(19), PLAN, 0, *more), 0.0) == [DropShard(key(19))]
        core.handle(event(key(20), PLAN, 0, *more), 0.0)
        core.handle(event(key(19, job="other"), PLAN, 0, *more), 0.0)
        assert list(core.shards) == [key(20), key(19, job="other")]
        assert core.is_collected(key(19))
        assert not core.is_collected(key(20))


def test_the_mark_of_a_job_takes_nothing_of_another() -> None:
    core = holder()
    for job in ("job", "other"):
        fetch(core, key(10, job=job))
    assert core.handle(WatermarkRaised("job", 1, Version(1, 20)), 0.0) == [DropShard(key(10))]
    assert list(core.shards) == [key(10, job="other")]


def test_the_mark_rises_with_each_order() -> None:
    core = holder()
    for mark in (10, 20):
        core.handle(WatermarkRaised("job", 1, Version(1, mark)), 0.0)
    assert core.is_collected(key(19))
    assert not core.is_collected(key(20))


def test_an_order_to_collect_that_comes_late_does_not_lower_the_mark() -> None:
    core = holder()
    for mark in (20, 10):
        core.handle(WatermarkRaised("job", 1, Version(1, mark)), 0.0)
    assert core.is_collected(key(19))


def test_a_step_is_dropped_whatever_the_rank_and_nothing_else() -> None:
    core = holder()
    for shard in (key(10), key(10, 1), key(11), key(10, job="other"), key(10, generation=0)):
        fetch(core, shard)
    dropped = core.handle(StepDropped("job", Version(1, 10)), 0.0)
    assert dropped == [DropShard(key(10)), DropShard(key(10, 1))]
    assert set(core.shards) == {key(11), key(10, job="other"), key(10, generation=0)}
    assert core.handle(ChunkStaged(key(10), PLAN, 0), 0.0) == [DropShard(key(10))]


def test_a_step_dropped_in_the_newest_generation_goes() -> None:
    core = holder()
    core.handle(FenceRaised("job", 2), 0.0)
    fetch(core, key(10, generation=2))
    assert core.handle(StepDropped("job", Version(2, 10)), 0.0) == [
        DropShard(key(10, generation=2))
    ]


def test_a_dropped_step_stays_dropped_when_its_generation_is_fenced_again_or_collects() -> None:
    core = holder()
    core.handle(StepDropped("job", Version(2, 10)), 0.0)
    core.handle(FenceRaised("job", 2), 0.0)
    core.handle(WatermarkRaised("job", 2, Version(2, 10)), 0.0)
    assert core.is_collected(key(10, generation=2))


def test_a_fence_for_one_job_leaves_the_dropped_steps_of_another() -> None:
    core = holder()
    core.handle(StepDropped("job", Version(1, 10)), 0.0)
    core.handle(FenceRaised("other", 2), 0.0)
    assert core.is_collected(key(10))


def test_a_copy_on_its_way_is_let_go_of_too_when_it_is_one_too_many() -> None:
    core = holder()
    core.handle(ChunkFetched(key(), PLAN, 0, digest(0)), 0.0)
    assert core.handle(CopiesReleased("job", 1, (key(),)), 0.0) == [DropShard(key())]


def test_of_a_forgotten_job_nothing_is_left_and_its_name_begins_anew() -> None:
    core = holder()
    for job, peer in (("job", B), ("other", C)):
        core.handle(BuddiesChanged(job, (peer,), frozenset({A, peer})), 0.0)
        core.reserve(job, 0, Reservation(1, 10, "10"))
        stage(core, key(30, job=job))
    core.handle(StepDropped("job", Version(1, 20)), 0.0)
    core.handle(WatermarkRaised("job", 1, Version(1, 15)), 0.0)
    assert core.handle(JobForgotten("job"), 0.0) == [DropShard(key(30))]
    assert list(core.shards) == [key(30, job="other")]
    assert list(core.reservations) == [("other", 0)]
    assert core.offers.peers() == ({C}, frozenset({A, C}))
    assert not [step for step in (10, 20) if core.is_collected(key(step))]


# --- the budget ----------------------------------------------------------------------------------


def test_a_shard_fits_to_the_last_byte_and_one_that_is_here_needs_no_room() -> None:
    core = holder(4)
    for check in (core.check_write, core.check_copy):
        check(key(), ShardPlan(1, (4,)))
        with pytest.raises(MemoryBudgetError):
            check(key(), ShardPlan(1, (5,)))
    fetch(core, key(), ShardPlan(1, (2, 2)))
    assert core.used_bytes == 4
    for check in (core.check_write, core.check_copy):
        check(key(), ShardPlan(1, (2, 2)))
        with pytest.raises(MemoryBudgetError):
            check(key(20), ShardPlan(1, (1,)))


def test_a_shard_that_has_begun_to_arrive_takes_its_whole_room() -> None:
    core = holder(4)
    core.handle(ChunkStaged(key(), ShardPlan(1, (2, 2)), 0), 0.0)
    with pytest.raises(MemoryBudgetError):
        core.check_copy(key(20), ShardPlan(1, (1,)))


def test_what_is_declared_may_fill_the_budget_and_is_declared_again_without_harm() -> None:
    core = holder()
    for _ in range(2):
        core.reserve("job", 0, Reservation(1, 60, "60"))
        core.reserve("job", 1, Reservation(1, 40, "40"))
    with pytest.raises(MemoryBudgetError, match=r"41; 60 are declared by other ranks"):
        core.reserve("job", 1, Reservation(1, 41, "41"))
    core.reserve("job", 0, Reservation(1, 59, "59"))
    core.reserve("job", 1, Reservation(1, 41, "41"))
    with pytest.raises(MemoryBudgetError) as refused:
        core.reserve("alone", 0, Reservation(1, 1, "1"))
    assert "are declared by other ranks" not in str(refused.value)


def test_of_another_job_counts_what_it_declared_or_what_it_has_whichever_is_more() -> None:
    core = holder()
    core.reserve("old", 0, Reservation(1, 10, "10"))
    fetch(core, key(10, job="old"), ShardPlan(1, (30,)))
    fetch(core, key(10, job="new"), ShardPlan(1, (5,)))  # a part of what it declares
    core.reserve("new", 0, Reservation(1, 70, "70"))
    with pytest.raises(MemoryBudgetError, match="30 belong to job 'old'"):
        core.reserve("new", 0, Reservation(1, 71, "71"))
    core.release("new", 0)
    core.reserve("old", 0, Reservation(1, 50, "50"))
    with pytest.raises(MemoryBudgetError, match="50 belong to job 'old'"):
        core.reserve("new", 0, Reservation(1, 51, "51"))


def test_a_new_generation_ends_what_older_ones_of_its_job_declared() -> None:
    core = holder()
    core.reserve("job", 0, Reservation(1, 40, "40"))
    core.reserve("job", 1, Reservation(2, 30, "30"))
    core.reserve("other", 0, Reservation(1, 30, "30"))
    core.handle(FenceRaised("job", 2), 0.0)
    assert set(core.reservations) == {("job", 1), ("other", 0)}
    with pytest.raises(FencedError):
        core.reserve("job", 0, Reservation(1, 1, "1"))


# --- offers --------------------------------------------------------------------------------------


def test_each_hashed_chunk_is_offered_to_each_buddy_once_and_never_to_oneself() -> None:
    core = holder()
    core.handle(BuddiesChanged("job", (A, B, C)), 0.0)
    assert offers(stage(core, key())) == [
        (peer, key(), index) for index in (0, 1) for peer in (B, C)
    ]
    assert core.handle(BuddiesChanged("job", (A, B, C)), 0.0) == []
    assert core.offers.peers()[0] == {B, C}


def test_a_copy_of_another_host_s_shard_is_offered_to_nobody_unless_it_is_asked_for() -> None:
    core = holder()
    core.handle(BuddiesChanged("job", (B,)), 0.0)
    assert not offers(fetch(core, key(10, 1)))
    asked = core.handle(ReplicationRequested(key(10, 1), C, 1), 0.0)
    assert offers(asked) == [(C, key(10, 1), 0), (C, key(10, 1), 1)]


def test_a_copy_that_is_asked_for_again_is_offered_again_and_to_none_besides() -> None:
    core = holder()
    core.handle(BuddiesChanged("job", (B,)), 0.0)
    stage(core, key())
    for index in (0, 1):
        core.handle(ChunkTaken(C, key(), index), 0.0)
    for _ in range(2):  # it may have lost what it had
        asked = core.handle(ReplicationRequested(key(), C, 1), 0.0)
        assert offers(asked) == [(C, key(), 0), (C, key(), 1)]


def test_a_copy_goes_at_the_rate_that_it_was_asked_for_with_also_when_it_is_offered_again() -> None:
    core = holder()
    core.handle(BuddiesChanged("job", (B,)), 0.0)
    staged = stage(core, key())
    asked = core.handle(ReplicationRequested(key(), C, 1, 1000), 0.0)
    core.handle(ChunkNotTaken(C, key(), 1), 0.0)
    again = core.handle(Ticked(), 60.0)
    rates = [[c.bytes_per_s for c in cs if isinstance(c, OfferChunk)] for cs in (asked, again)]
    assert rates == [[1000, 1000], [1000]]
    assert {c.bytes_per_s for c in staged if isinstance(c, OfferChunk)} == {None}


def test_a_newer_generation_ends_the_repairs_of_older_ones() -> None:
    core = holder()
    core.handle(BuddiesChanged("job", (B,)), 0.0)
    stage(core, key())
    core.handle(FenceRaised("job", 2), 0.0)
    for generation, left in ((2, 1), (3, 0)):  # it is told again, and then a newer one
        core.handle(ReplicationRequested(key(), C, 2, 1000), 0.0)
        core.handle(ChunkNotTaken(C, key(), 1), 0.0)
        core.handle(FenceRaised("other", 9), 0.0)
        core.handle(FenceRaised("job", generation), 0.0)
        assert len(offers(core.handle(Ticked(), 60.0))) == left
        core.handle(ChunkTaken(C, key(), 1), 60.0)
    assert not core.handle(ReplicationRequested(key(), C, 2, 1000), 60.0)  # it came late
    asked = core.handle(ReplicationRequested(key(), C, 4, 1000), 60.0)
    assert offers(asked) == [(C, key(), 0), (C, key(), 1)]
    assert core.fences["job"] == 4
    core.handle(FenceRaised("job", 4), 60.0)  # which it does not end
    core.handle(ChunkNotTaken(C, key(), 0), 60.0)
    assert len(offers(core.handle(Ticked(), 90.0))) == 1


def test_what_a_buddy_gets_in_any_case_has_no_bound_and_what_it_gets_of_older_lives_has() -> None:
    core = holder()
    core.handle(BuddiesChanged("job", (B,)), 0.0)
    stage(core, key())
    for generation, rate in ((1, None), (2, 1000)):
        asked = core.handle(ReplicationRequested(key(), B, generation, 1000), 0.0)
        assert {c.bytes_per_s for c in asked if isinstance(c, OfferChunk)} == {rate}


def test_a_chunk_that_waited_is_wanted_unless_its_repair_has_ended_or_the_shard_is_gone() -> None:
    core = holder()
    core.handle(BuddiesChanged("job", (B,)), 0.0)
    stage(core, key())
    (offer, _) = core.handle(ReplicationRequested(key(), C, 1, 1000), 0.0)
    assert isinstance(offer, OfferChunk)
    assert core.offers.is_wanted(offer)
    core.handle(FenceRaised("job", 2), 0.0)
    assert not core.offers.is_wanted(offer)
    core.handle(ReplicationRequested(key(), C, 2, 1000), 0.0)
    assert core.offers.is_wanted(offer)
    core.handle(StepDropped("job", key().version), 0.0)
    core.handle(JobForgotten("job"), 0.0)
    assert not core.offers.is_wanted(offer)


def test_nothing_is_sent_of_what_is_not_whole_or_corrupt_or_not_here() -> None:
    core = holder()
    core.handle(ChunkStaged(key(), PLAN, 0), 0.0)
    core.handle(ChunkHashed(key(), 0, digest(0)), 0.0)
    assert core.handle(ReplicationRequested(key(), B, 1), 0.0) == []
    assert core.handle(ReplicationRequested(key(20), B, 1), 0.0) == []
    stage(core, key())
    core.handle(ChunkFoundCorrupt(key(), 1), 0.0)
    assert core.handle(ReplicationRequested(key(), B, 1), 0.0) == []
    assert core.handle(BuddiesChanged("job", (C,)), 0.0) == []


def test_what_was_not_taken_is_offered_again_after_pauses_that_grow_to_the_longest() -> None:
    core, now_s = holder(), 0.0
    core.handle(BuddiesChanged("job", (B,)), 0.0)
    stage(core, key(), ShardPlan(1, (1,)))
    for pause_s in (*OFFER_BACKOFF_S, OFFER_BACKOFF_S[-1]):
        core.handle(ChunkNotTaken(B, key(), 0), now_s)
        assert not offers(core.handle(Ticked(), now_s + pause_s - 0.01))
        now_s += pause_s
        assert offers(core.handle(Ticked(), now_s)) == [(B, key(), 0)]
        assert not offers(core.handle(Ticked(), now_s + 100.0))  # under way, and not answered yet


def test_what_was_taken_is_not_offered_again() -> None:
    core = holder()
    core.handle(BuddiesChanged("job", (B,)), 0.0)
    stage(core, key())
    core.handle(ChunkNotTaken(B, key(), 0), 0.0)
    core.handle(ChunkTaken(B, key(), 0), 0.0)
    assert not core.handle(Ticked(), 1.0)
    core.handle(ChunkNotTaken(B, key(), 1), 1.0)
    assert offers(core.handle(Ticked(), 2.0)) == [(B, key(), 1)]


def test_who_is_a_buddy_no_more_gets_no_offer_again_and_all_of_it_when_it_is_one_again() -> None:
    core = holder()
    core.handle(BuddiesChanged("job", (B,)), 0.0)
    stage(core, key())
    for index in (0, 1):
        core.handle(ChunkNotTaken(B, key(), index), 0.0)
    core.handle(BuddiesChanged("job", (C,)), 0.0)
    assert not core.handle(Ticked(), 1.0)
    again = core.handle(BuddiesChanged("job", (B,)), 2.0)
    assert offers(again) == [(B, key(), 0), (B, key(), 1)]
    assert not core.handle(Ticked(), 2.0)  # they are on their way


def test_a_copy_that_was_asked_for_takes_nothing_from_the_buddies() -> None:
    core = holder()
    stage(core, key())
    core.handle(ReplicationRequested(key(), C, 1), 0.0)
    told = core.handle(BuddiesChanged("job", (B,)), 0.0)
    assert offers(told) == [(B, key(), 0), (B, key(), 1)]


def test_who_is_to_have_a_copy_once_more_is_not_taken_to_have_it() -> None:
    core = holder()
    core.handle(BuddiesChanged("job", (B,), frozenset({A, B, C})), 0.0)
    stage(core, key())
    for index in (0, 1):
        core.handle(ChunkTaken(B, key(), index), 0.0)
    core.handle(ReplicationRequested(key(), B, 1), 0.0)
    told = core.handle(BuddiesChanged("job", (C,), frozenset({A, B, C})), 0.0)
    assert offers(told) == [(C, key(), 0), (C, key(), 1)]


def test_offers_of_what_was_here_before_are_forgotten_with_it() -> None:
    core = holder()
    for _ in range(2):
        core.handle(BuddiesChanged("job", (B,)), 0.0)
        assert len(offers(stage(core, key()))) == 2
        assert not core.handle(Ticked(), 1.0)
        core.handle(ChunkNotTaken(B, key(), 0), 0.0)
        core.handle(JobForgotten("job"), 0.0)
    core.handle(BuddiesChanged("job", (B,)), 0.0)
    stage(core, key())
    core.handle(ChunkNotTaken(B, key(), 0), 0.0)
    core.handle(ChunkFoundCorrupt(key(), 1), 0.0)
    core.handle(ChunkFetched(key(), PLAN, 0, digest(0)), 0.0)
    assert not offers(core.handle(Ticked(), 1.0))


def test_what_is_gone_is_not_offered_again() -> None:
    core = holder()
    core.handle(BuddiesChanged("job", (B,)), 0.0)
    for step in (10, 20):
        stage(core, key(step))
        core.handle(ChunkNotTaken(B, key(step), 0), 0.0)
    core.handle(WatermarkRaised("job", 1, Version(1, 20)), 0.0)
    core.handle(ChunkNotTaken(B, key(10), 1), 0.0)  # an answer on its way meanwhile
    assert offers(core.handle(Ticked(), 1.0)) == [(B, key(20), 0)]


def test_new_buddies_get_what_is_here_of_their_job_alone() -> None:
    core = holder()
    for job in ("job", "other"):
        stage(core, key(job=job))
    told = core.handle(BuddiesChanged("job", (B,)), 0.0)
    assert offers(told) == [(B, key(), 0), (B, key(), 1)]


def test_copies_on_holders_that_count_are_enough_only_if_they_are_whole_and_as_many() -> None:
    for taken, counted, expected in (
        ({B: (0, 1)}, {A, B, C}, []),
        ({B: (0,)}, {A, B, C}, [(C, 0), (C, 1)]),
        ({B: (0, 1)}, {A, C}, [(C, 0), (C, 1)]),
    ):
        core = holder()
        core.handle(BuddiesChanged("job", (B,), frozenset({A, B, C})), 0.0)
        stage(core, key())
        for peer, indices in taken.items():
            for index in indices:
                core.handle(ChunkTaken(peer, key(), index), 0.0)
        told = core.handle(BuddiesChanged("job", (C,), frozenset(counted)), 0.0)
        assert [(to, index) for to, _, index in offers(told)] == expected


def test_whoever_the_coordinator_asked_for_is_sent_to_although_there_are_copies_enough() -> None:
    core = holder()
    core.handle(BuddiesChanged("job", (B,), frozenset({A, B, C})), 0.0)
    stage(core, key())
    for index in (0, 1):
        core.handle(ChunkTaken(B, key(), index), 0.0)
    core.handle(ReplicationRequested(key(), C, 1), 0.0)
    core.handle(ChunkNotTaken(C, key(), 0), 0.0)
    core.handle(BuddiesChanged("job", (B,), frozenset({A, B, C})), 0.0)
    assert offers(core.handle(Ticked(), 1.0)) == [(C, key(), 0)]


# --- shared bytes --------------------------------------------------------------------------------


def test_a_twin_is_the_newest_other_version_of_the_rank_s_shard_with_the_same_chunk() -> None:
    core = holder()
    for shard in (key(10), key(20), key(10, 1), key(40, job="other")):
        fetch(core, shard)
    chunk = ChunkId(key(30), 0, 1)
    assert core.twin_of(chunk, digest(0)) == key(20)
    assert core.twin_of(chunk, digest(1)) is None
    assert core.twin_of(ChunkId(key(30), 0, 2), digest(0)) is None  # as many bytes
    assert core.twin_of(ChunkId(key(20), 0, 1), digest(0)) == key(10)  # another's
    core.handle(ChunkFoundCorrupt(key(20), 1), 0.0)
    assert core.twin_of(chunk, digest(0)) == key(10)


def twins(*steps: int) -> Inventory:
    """Chunk 0 of each later step is about to share the first one's bytes."""
    core = holder()
    first, *later = steps
    fetch(core, key(first))
    for step in later:
        core.handle(ChunkStaged(key(step), PLAN, 0), 0.0)
        core.handle(ChunkHashed(key(step), 0, digest(0)), 0.0)
    return core


def test_bytes_are_shared_when_they_were_read_again_and_are_right() -> None:
    core = twins(10, 20)
    read = TwinRead(key(20), 0, digest(0), key(10), digest(0))
    assert core.shared_bytes == 0
    assert core.handle(read, 0.0) == [ShareChunk(key(20), 0, key(10))]
    assert core.shared_bytes == 1
    assert core.used_bytes == 4  # the next step may change them all
    assert core.sharers(key(10), 0) == [key(10), key(20)]
    assert core.sharers(key(10), 1) == [key(10)]


def test_bytes_that_are_wrong_are_shared_with_nobody_and_spoil_whoever_has_them() -> None:
    core = twins(10, 20)
    read = TwinRead(key(20), 0, digest(0), key(10), digest(9))
    assert core.handle(read, 0.0) == [ReportCorrupt(key(10))]
    assert core.handle(TwinRead(key(20), 0, digest(0), key(10), digest(0)), 0.0) == []


@pytest.mark.parametrize("what", ["no twin", "another twin", "gone", "spoilt", "another chunk"])
def test_what_has_changed_while_its_bytes_were_read_shares_nothing(what: str) -> None:
    core, expected = twins(10, 20), digest(0)
    if what == "no twin":
        core.handle(WatermarkRaised("job", 1, Version(1, 20)), 0.0)
    elif what == "another twin":
        core.handle(ChunkFoundCorrupt(key(10), 1), 0.0)
        core.handle(ChunkFetched(key(10), PLAN, 0, digest(8)), 0.0)
    elif what == "gone":
        core.handle(StepDropped("job", Version(1, 20)), 0.0)
    elif what == "spoilt":
        core.handle(ChunkFoundCorrupt(key(20), 0), 0.0)
    else:
        core.handle(StepDropped("job", Version(1, 20)), 0.0)
        core.handle(FenceRaised("job", 2), 0.0)
        core.handle(ChunkFetched(key(20), PLAN, 0, digest(8)), 0.0)
    assert core.handle(TwinRead(key(20), 0, expected, key(10), expected), 0.0) == []
    assert core.shared_bytes == 0


def test_a_chunk_whose_checksum_is_known_is_compared_with_what_other_versions_have() -> None:
    core = holder()
    stage(core, key(10))
    commands = stage(core, key(20))
    assert [c for c in commands if isinstance(c, ReadTwin)] == [
        ReadTwin(key(20), index, digest(index), key(10)) for index in (0, 1)
    ]


# --- corrupt copies, and reading again -----------------------------------------------------------


def test_what_was_read_for_a_twin_counts_as_read() -> None:
    core = Inventory(A, 100, Scrub(period_s=10.0))
    plan = ShardPlan(1, (1,))
    for step in (10, 20):
        stage(core, key(step), plan)
    core.handle(TwinRead(key(20), 0, digest(0), key(10), digest(0)), 5.0)
    assert core.handle(Ticked(), 10.0) == [ReadChunk(key(20), 0)]  # it had not shared them yet
    assert core.handle(ChunkRead(key(20), 0, digest(0)), 10.0) == []
    assert core.handle(Ticked(), 19.0) == []  # the bytes are both steps'
    assert core.handle(Ticked(), 20.0) != []


def test_a_reading_that_was_right_is_not_repeated_before_its_time() -> None:
    core = Inventory(A, 100, Scrub(period_s=10.0))
    fetch(core, key(), ShardPlan(1, (1,)))
    core.handle(Ticked(), 10.0)
    assert core.handle(ChunkRead(key(), 0, digest(0)), 12.0) == []
    assert core.handle(Ticked(), 21.0) == []
    assert core.handle(Ticked(), 22.0) == [ReadChunk(key(), 0)]
    assert core.records()


def test_big_chunks_are_read_no_faster_than_the_scrub_may() -> None:
    core = Inventory(A, 1000, Scrub(period_s=10.0, bandwidth_bytes_per_s=100.0))
    fetch(core, key(), ShardPlan(1, (500, 100)))
    assert core.handle(Ticked(), 10.0) == [ReadChunk(key(), 0)]
    assert core.handle(ChunkRead(key(), 0, digest(0)), 10.0) == []
    assert core.handle(Ticked(), 14.0) == []
    assert core.handle(Ticked(), 15.0) == [ReadChunk(key(), 1)]
    core.handle(ChunkRead(key(), 1, digest(1)), 15.0)
    assert core.handle(Ticked(), 20.0) == [ReadChunk(key(), 0)]


def test_a_reading_that_nobody_asked_for_says_nothing() -> None:
    core = Inventory(A, 100, Scrub(period_s=10.0))
    fetch(core, key())
    assert core.handle(ChunkRead(key(), 0, b"wrong"), 5.0) == []
    assert core.records()


def test_a_checksum_of_what_is_not_here_any_more_changes_nothing() -> None:
    core = holder()
    assert core.handle(ChunkHashed(key(), 0, digest(0)), 0.0) == []
    assert not core.shards


def test_a_chunk_that_never_came_spoils_its_own_shard_alone_and_a_second_find_no_other() -> None:
    core = holder()
    for step in (10, 20):
        core.handle(ChunkFetched(key(step), PLAN, 0, digest(0)), 0.0)
    assert core.handle(ChunkFoundCorrupt(key(10), 1), 0.0) == [ReportCorrupt(key(10))]
    core = twins(10, 20)
    core.handle(TwinRead(key(20), 0, digest(0), key(10), digest(0)), 0.0)
    both = [ReportCorrupt(key(10)), ReportCorrupt(key(20))]
    assert core.handle(ChunkFoundCorrupt(key(10), 0), 0.0) == both
    assert core.handle(ChunkFoundCorrupt(key(10), 0), 0.0) == both[:1]


def test_a_corrupt_copy_that_is_not_here_is_not_told_of() -> None:
    assert holder().handle(ChunkFoundCorrupt(key(), 0), 0.0) == []


def test_corrupt_copies_are_told_of_again_no_more_often_than_they_have_to_be() -> None:
    core = holder()
    for step in (20, 10, 30):
        fetch(core, key(step))
    for step in (20, 10):
        core.handle(ChunkFoundCorrupt(key(step), 0), 0.0)
    told = [ReportCorrupt(key(10)), ReportCorrupt(key(20))]
    assert core.handle(Ticked(), 1.0) == told
    assert core.handle(Ticked(), REMIND_S + 0.9) == []
    assert core.handle(Ticked(), REMIND_S + 1.0) == told
    assert core.handle(Ticked(), REMIND_S + 1.0) == []


def test_a_chunk_that_is_offered_of_a_shard_that_is_not_here_is_not_reported() -> None:
    assert holder().handle(ChunkKnown(key()), 0.0) == []
