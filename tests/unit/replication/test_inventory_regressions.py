"""Defects of the holder's core that the simulator found, each as the events that showed it."""

import pytest

from replication.errors import FencedError, MemoryBudgetError
from replication.inventory import Inventory, Reservation
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
    CopiesReleased,
    DropShard,
    FenceRaised,
    JobForgotten,
    ReadChunk,
    ReadTwin,
    ReportCorrupt,
    ReportShard,
    ShareChunk,
    StepDropped,
    Ticked,
    TwinRead,
    WatermarkRaised,
)
from replication.records import HolderId, ShardKey, ShardPlan, Version
from replication.scrub import Scrub

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
    core.handle(ChunkFoundCorrupt(KEY, 0), 0.0)
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
    core.handle(ChunkFoundCorrupt(KEY, 0), 0.0)
    assert not core.has_chunk(KEY, 0)
    assert core.handle(ChunkFetched(KEY, PLAN, 0, b"%016d" % 0), 0.0) == []
    assert core.records() == []
    commands = core.handle(ChunkFetched(KEY, PLAN, 1, b"%016d" % 1), 0.0)
    assert commands == [ReportShard(core.record(KEY))]


def test_what_an_ended_job_holds_counts_and_what_it_declared_does_not() -> None:
    core = Inventory(HolderId("a", "1"), 100)
    core.reserve("old", 0, Reservation(1, 80, "80"))
    with pytest.raises(MemoryBudgetError, match="80 belong to job 'old'"):
        core.reserve("new", 0, Reservation(1, 40, "40"))
    key = ShardKey("old", Version(1, 10), 0)
    core.handle(ChunkStaged(key, ShardPlan(1, (30,)), 0), 0.0)
    core.release("old", 0)
    core.reserve("new", 0, Reservation(1, 40, "40"))
    with pytest.raises(MemoryBudgetError, match="40 are declared by other ranks"):
        core.reserve("new", 1, Reservation(1, 40, "40"))
    core.handle(JobForgotten("old"), 0.0)
    core.reserve("new", 1, Reservation(1, 40, "40"))


def sealed(core: Inventory, now_s: float = 0.0) -> None:
    for index in range(2):
        core.handle(ChunkFetched(KEY, PLAN, index, b"%016d" % index), now_s)


def test_a_corrupt_copy_is_told_of_and_told_of_again_until_it_is_replaced() -> None:
    core = Inventory(HolderId("a", "1"), 100)
    sealed(core)
    core.handle(Ticked(), 0.0)
    assert core.handle(ChunkFoundCorrupt(KEY, 0), 1.0) == [ReportCorrupt(KEY)]
    assert core.handle(Ticked(), 14.0) == []
    assert core.handle(Ticked(), 15.0) == [ReportCorrupt(KEY)]  # an older report may be late
    sealed(core, 16.0)
    assert core.handle(Ticked(), 31.0) == []


def test_a_chunk_that_is_offered_though_it_is_here_is_reported_again() -> None:
    core = Inventory(HolderId("a", "1"), 100)
    core.handle(ChunkFetched(KEY, PLAN, 0, b"%016d" % 0), 0.0)
    assert core.handle(ChunkKnown(KEY), 0.0) == []  # not whole yet
    core.handle(ChunkFetched(KEY, PLAN, 1, b"%016d" % 1), 0.0)
    assert core.handle(ChunkKnown(KEY), 0.0) == [ReportShard(core.record(KEY))]


def test_rot_in_bytes_that_two_steps_share_spoils_both() -> None:
    core, later = Inventory(HolderId("a", "1"), 100), ShardKey("job", Version(1, 11), 0)
    sealed(core)
    for index in range(2):
        digest = b"%016d" % index
        core.handle(ChunkStaged(later, PLAN, index), 0.0)
        commands = core.handle(ChunkHashed(later, index, digest), 0.0)
        assert commands[-1] == ReadTwin(later, index, digest, KEY)
        twin_read = TwinRead(later, index, digest, KEY, digest)
        assert core.handle(twin_read, 0.0) == [ShareChunk(later, index, KEY)]
    corrupt = core.handle(ChunkFoundCorrupt(KEY, 0), 1.0)
    assert corrupt == [ReportCorrupt(KEY), ReportCorrupt(later)]
    assert not core.records()


def test_what_is_pinned_is_read_again_and_a_flipped_bit_found() -> None:
    core = Inventory(HolderId("a", "1"), 100, Scrub(period_s=10.0))
    sealed(core)
    assert core.handle(Ticked(), 9.0) == []
    assert core.handle(Ticked(), 10.0) == [ReadChunk(KEY, 0)]
    assert core.handle(Ticked(), 11.0) == []  # one at a time
    assert core.handle(ChunkRead(KEY, 0, b"%016d" % 0), 11.0) == [ReadChunk(KEY, 1)]
    assert core.handle(ChunkRead(KEY, 1, b"%016d" % 9), 11.0) == [ReportCorrupt(KEY)]
    assert not core.records()
    assert core.handle(Ticked(), 12.0) == []  # nothing of it is read any more


def test_what_is_dropped_while_it_is_read_is_not_found_corrupt() -> None:
    core = Inventory(HolderId("a", "1"), 100, Scrub(period_s=10.0))
    sealed(core)
    core.handle(Ticked(), 10.0)
    core.handle(WatermarkRaised("job", 1, Version(1, 11)), 10.0)
    assert core.handle(ChunkRead(KEY, 0, b""), 11.0) == []


def test_what_older_generations_have_beyond_the_branch_goes_whatever_the_watermark() -> None:
    core = Inventory(HolderId("a", "1"), 100)
    versions = [Version(1, 5), Version(1, 6), Version(2, 1), Version(3, 3), Version(3, 4)]
    for version in versions:
        core.handle(ChunkFetched(ShardKey("job", version, 0), PLAN, 0, b"%016d" % 0), 0.0)
    branch = (Version(3, 3), Version(1, 5))  # of generation 4; 2 is on no branch
    pinned = (Version(2, 1),)
    core.handle(WatermarkRaised("job", 4, Version(1, 0), pinned, branch), 0.0)
    assert [k.version for k in core.shards] == [Version(1, 5), Version(2, 1), Version(3, 3)]
    core.handle(WatermarkRaised("job", 4, Version(1, 0), (), ()), 0.0)  # it began from nothing
    assert not core.shards


def test_a_checksum_that_comes_after_its_chunk_was_let_go_seals_nothing() -> None:
    core = Inventory(HolderId("a", "1"), 100)
    core.handle(ChunkStaged(KEY, PLAN, 1), 0.0)  # and is being hashed
    core.handle(JobForgotten("job"), 0.0)
    core.handle(ChunkFetched(KEY, PLAN, 0, b"%016d" % 0), 0.0)
    assert core.handle(ChunkHashed(KEY, 1, b"%016d" % 1), 0.0) == []
    assert core.records() == []


def test_a_dropped_step_that_the_next_generation_resumes_from_is_taken_back() -> None:
    core = Inventory(HolderId("a", "1"), 100)
    core.handle(StepDropped("job", KEY.version), 0.0)
    late = [core.handle(ChunkFetched(KEY, PLAN, index, b"%016d" % index), 0.0) for index in (0, 1)]
    assert late == [[DropShard(KEY)], [DropShard(KEY)]]
    core.handle(FenceRaised("job", KEY.version.generation + 1), 0.0)
    for index in (0, 1):
        core.handle(ChunkFetched(KEY, PLAN, index, b"%016d" % index), 0.0)
    assert [record.key for record in core.records()] == [KEY]


def test_a_late_order_to_drop_a_step_leaves_what_a_newer_generation_resumed_from() -> None:
    core = Inventory(HolderId("a", "1"), 100)
    for index in (0, 1):
        core.handle(ChunkFetched(KEY, PLAN, index, b"%016d" % index), 0.0)
    core.handle(FenceRaised("job", KEY.version.generation + 1), 0.0)
    assert core.handle(StepDropped("job", KEY.version), 0.0) == []
    assert [record.key for record in core.records()] == [KEY]


def test_new_buddies_get_no_copies_of_what_older_generations_saved() -> None:
    buddies = [HolderId(name, "1") for name in "bc"]
    core = Inventory(HolderId("a", "1"), 100)
    now = ShardKey("job", Version(2, 20), 0)
    for key in (KEY, now):
        for index in (0, 1):
            core.handle(ChunkStaged(key, PLAN, index), 0.0)
            core.handle(ChunkHashed(key, index, b"%016d" % index), 0.0)
    offers = core.handle(BuddiesChanged("job", tuple(buddies)), 0.0)
    assert {offer.key for offer in offers} == {now}  # the coordinator asks for the others' copies


def test_new_buddies_get_a_copy_only_where_one_is_missing() -> None:
    a, b, c, d = (HolderId(name, "1") for name in "abcd")
    core = Inventory(a, 100)
    core.handle(BuddiesChanged("job", (b,), frozenset({a, b, c})), 0.0)
    for index in (0, 1):
        core.handle(ChunkStaged(KEY, PLAN, index), 0.0)
        core.handle(ChunkHashed(KEY, index, b"%016d" % index), 0.0)
    core.handle(ChunkTaken(b, KEY, 0), 0.0)
    half = core.handle(BuddiesChanged("job", (c,), frozenset({a, b, c})), 0.0)
    assert {offer.to for offer in half} == {c}
    core.handle(ChunkTaken(b, KEY, 1), 0.0)
    assert core.handle(BuddiesChanged("job", (d,), frozenset({a, b, d})), 0.0) == []
    b_is_lost = core.handle(BuddiesChanged("job", (d,), frozenset({a, d})), 0.0)
    assert [(offer.to, offer.index) for offer in b_is_lost] == [(d, 0), (d, 1)]


def test_an_order_to_collect_of_an_older_generation_is_refused() -> None:
    core = Inventory(HolderId("a", "1"), 100)
    for index in (0, 1):
        core.handle(ChunkFetched(KEY, PLAN, index, b"%016d" % index), 0.0)
    core.handle(FenceRaised("job", KEY.version.generation + 1), 0.0)
    late = WatermarkRaised("job", KEY.version.generation, Version(1, 99))
    with pytest.raises(FencedError):
        core.handle(late, 0.0)
    assert [record.key for record in core.records()] == [KEY]


def test_a_copy_too_many_goes_when_the_present_generation_says_so() -> None:
    core, plan = Inventory(HolderId("a", "1"), 100), ShardPlan(2, (1,))
    mine, copy = ShardKey("job", Version(1, 10), 0), ShardKey("job", Version(1, 10), 1)
    core.handle(ChunkStaged(mine, plan, 0), 0.0)
    core.handle(ChunkFetched(copy, plan, 0, b"d" * 16), 0.0)
    core.handle(FenceRaised("job", 2), 0.0)
    with pytest.raises(FencedError):
        core.handle(CopiesReleased("job", 1, (copy,)), 0.0)
    assert core.handle(CopiesReleased("job", 2, (mine, copy)), 0.0) == [DropShard(copy)]
    assert list(core.shards) == [mine]
    assert core.handle(CopiesReleased("job", 2, (copy,)), 0.0) == []  # told again
    assert core.handle(ChunkFetched(copy, plan, 0, b"d" * 16), 0.0) != []  # wanted again
