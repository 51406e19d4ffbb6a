"""What the coordinator knows of one job: its questions, answered one by one."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from replication.records import HolderId, Life, Version
from tests.unit.tiered.test_job import MEMORY, A, B, C, D, begin, begun, record
from tiered import messages as m
from tiered.config import JobSettings, Memory
from tiered.job import Job

VERSION = Version(1, 10)


def short(cut: Iterable[tuple[str, str]], *, strict: bool, replicas: int = 1) -> Job:
    """Three hosts, of which A has no buddy that it can reach."""
    job = begun(Memory(every_steps=1, replicas=replicas, strict=strict), holders=(A, B, C))
    job.cut, job.buddies = frozenset(cut), {A: (), B: (C,), C: (B,)}
    return job


def test_a_job_is_stopped_until_somebody_begins_again() -> None:
    job = Job("job")
    assert not job.is_stopped
    job = begun()
    assert not job.is_stopped
    job.handle(m.StopAsked(Life("stop-1")), 1.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 1.0)
    assert job.is_stopped
    job.handle(m.HoldersFenced(2), 1.0)
    begin(job, "two", MEMORY)
    assert not job.is_stopped


def test_the_newest_generation_s_settings_hold() -> None:
    job = begun()
    begin(job, "two", replace(MEMORY, keep=7))
    assert job.settings is not None
    assert job.settings.memory.keep == 7


@pytest.mark.parametrize(("hosts", "replicas"), [(0, 0), (1, 0), (2, 1), (3, 1)])
def test_one_copy_is_kept_elsewhere_if_nothing_is_said_and_there_is_a_host_for_it(
    hosts: int, replicas: int
) -> None:
    job = begun(Memory(every_steps=1))
    assert job.settings is not None
    assert job.settings.memory.replicas is None
    job.holders = dict.fromkeys((A, B, C)[:hosts], "")
    assert job.replicas == replicas
    assert job.copies_needed == 1 + replicas


def test_who_has_few_buddies_needs_fewer_copies_only_while_a_link_is_cut() -> None:
    for cut, strict, expected in (
        ((), False, 2),
        ((("a", "b"),), False, 1),
        ((("a", "b"),), True, 2),
    ):
        job = short(cut, strict=strict)
        job.add_copy(A, record(10))
        assert job.copies_that_commit(VERSION, 0) == expected
        job.buddies.clear()  # it was told none yet
        assert job.copies_that_commit(VERSION, 0) == 2


def test_why_there_are_too_few_copies_is_told_in_hosts_or_in_links() -> None:
    job = begun(replace(MEMORY, replicas=2), holders=(A, B, C))
    job.holders.pop(C)
    assert job.why_short == "replicas=2 needs 3 hosts, 2 live"
    job.holders[C] = ""
    assert job.why_short == ""
    job.cut = frozenset({("0123456789", f"{n}abcdefghi") for n in (4, 3, 2, 1)})
    assert job.why_short == "; ".join(
        f"hosts 01234567 and {n}abcdefg cannot reach each other" for n in (1, 2, 3)
    )


def test_only_a_strict_policy_refuses_because_of_a_link_and_one_host_is_enough() -> None:
    cut = [("a", "b")]
    assert short(cut, strict=True).too_few_hosts
    assert not short(cut, strict=False).too_few_hosts
    assert not short([], strict=True).too_few_hosts
    job = short(cut, strict=True)
    job.buddies[A] = (C,)
    assert not job.too_few_hosts


def test_a_replica_has_arrived_when_one_rank_s_has() -> None:
    job = begun(ranks=2)
    job.add_copy(A, record(10, ranks=2))
    assert not job.has_replica(VERSION)
    job.add_copy(B, record(10, ranks=2, is_replica=True))
    assert job.has_replica(VERSION)


def test_a_step_is_in_memory_when_it_is_and_not_when_another_is() -> None:
    job = begun(ranks=2)
    for rank in (0, 1):
        job.add_copy(A, record(10, rank, ranks=2))
    job.add_copy(A, record(20, ranks=2))
    assert job.is_whole(VERSION)
    assert not job.is_whole(Version(1, 20))
    assert not job.is_whole(Version(1, 30))
    job.holders.pop(A)
    assert not job.is_whole(VERSION)


def test_of_no_step_nothing_has_to_be_found() -> None:
    job = begun()
    assert job.has_sources(None)
    assert not job.has_sources(VERSION)


def test_sources_are_told_in_the_order_of_ranks_and_which_copies_are_replicas() -> None:
    job = begun(ranks=2, holders=(A, B, C))
    for rank, holder, is_replica in ((1, B, False), (0, C, True), (0, A, False), (0, B, True)):
        job.add_copy(holder, record(10, rank, ranks=2, is_replica=is_replica))
    zero, one = job.sources(VERSION)
    assert (zero.record.key.rank, zero.holders, zero.replicas) == (0, (A, B, C), {B, C})
    assert (one.record.key.rank, one.holders, one.replicas) == (1, (B,), set())
    assert not zero.is_durable
    job.durable.add(VERSION)
    assert all(source.is_durable for source in job.sources(VERSION))


def test_what_a_rank_stored_before_is_the_newest_other_step_on_s3_whose_manifest_is_known() -> None:
    job = begun()
    job.durable = {Version(1, step) for step in (10, 20, 30, 40)}
    job.manifests = {Version(1, step): (record(step),) for step in (10, 20, 30, 50)}
    assert job.stored_before(Version(1, 30), 0) == record(20)
    assert job.stored_before(Version(1, 60), 0) == record(30)
    assert job.stored_before(Version(1, 60), 1) is None
    job.durable.clear()
    assert job.stored_before(Version(1, 60), 0) is None


def test_a_policy_sees_a_step_as_its_lowest_rank_or_else_its_manifest_tells() -> None:
    job = begun(ranks=2)
    assert job.saved_step(VERSION).metrics is None
    job.manifests[VERSION] = (record(10, loss=3.0),)
    assert job.saved_step(VERSION).metrics == {"loss": 3.0}
    for rank, loss in ((1, 2.0), (0, 1.0)):
        job.add_copy(A, record(10, rank, ranks=2, loss=loss))
    seen = job.saved_step(VERSION)
    assert (seen.metrics, seen.saved_s) == ({"loss": 1.0}, 100.0)


def test_how_safe_a_step_is_and_why_it_gets_no_safer() -> None:
    job = begun()
    job.handle(m.ShardReported(A, record(10)), 0.0)
    assert job.level(VERSION) == (None, "")
    job.handle(m.ShardReported(B, record(10)), 0.0)
    assert job.level(VERSION) == ("replicated", "")
    job.flushes.given_up[VERSION] = "not flushed"
    assert job.level(VERSION) == ("replicated", "not flushed")
    begin(job, "two", MEMORY)
    level, problem = job.level(VERSION)
    assert (level, "generation 2" in problem) == ("replicated", True)
    assert job.level(Version(1, 11))[0] is None
    job.durable.add(VERSION)
    assert job.level(VERSION) == ("durable", "")


def test_a_step_that_was_committed_and_not_flushed_is_called_so_when_it_is_collected() -> None:
    job = begun()
    job.flushes.given_up[VERSION] = "not flushed"
    job.watermark = Version(1, 20)
    assert job.level(VERSION) == ("replicated", "not flushed")
    assert "newer steps were committed" in job.level(Version(1, 19))[1]
    assert job.level(Version(1, 20)) == (None, "")


def test_below_the_mark_only_what_is_pinned_is_taken_in() -> None:
    job = begun()
    job.watermark, job.pinned = Version(1, 10), {Version(1, 5)}
    for step in (5, 9, 10):
        job.add_copy(A, record(step))
    assert set(job.copies) == {Version(1, 5), Version(1, 10)}


def test_a_copy_that_is_set_aside_comes_back_if_its_holder_is_there() -> None:
    job = begun()
    for holder in (A, B):
        job.add_copy(holder, record(10))
        job.set_aside(holder, record(10).key)
    job.set_aside(C, record(10).key)  # it has none
    assert not job.intact(VERSION, 0)
    job.holders.pop(B)
    job.put_back()
    assert set(job.copies[VERSION][0]) == {A}
    job.drop_copy(A, record(10).key)
    job.put_back()
    assert not job.intact(VERSION, 0)


def test_the_last_keeper_is_the_silent_host_that_alone_has_a_shard() -> None:
    job = begun(holders=(A, B, C, D), ranks=2)
    for rank, holders in ((0, (A, B)), (1, (C,))):
        for holder in holders:
            job.add_copy(holder, record(10, rank, ranks=2))
    assert not any(job.is_last_keeper(node) for node in "abcd")  # they all answer
    for silent in (A, C, D):
        job.holders.pop(silent)
    assert [job.is_last_keeper(node) for node in "abcd"] == [False, False, True, False]


def test_needed_are_this_generation_s_commits_its_parent_and_what_policies_keep() -> None:
    job = begun()
    for step in (10, 20, 30):
        job.commits[Version(1, step)] = False
    begin(job, "two", MEMORY)
    assert list(job.needed_versions()) == []  # it began from nothing
    job.parents[2], job.retained = Version(1, 20), frozenset({Version(1, 10)})
    job.commits[Version(2, 40)] = False
    assert list(job.needed_versions()) == [Version(2, 40), Version(1, 20), Version(1, 10)]


def test_of_what_a_new_coordinator_found_the_newest_whole_step_is_needed() -> None:
    job = begun(ranks=2)
    for step, ranks in ((10, (0, 1)), (20, (0, 1)), (30, (0,))):
        for rank in ranks:
            job.add_copy(A, record(step, rank, ranks=2))
    job.found = set(job.copies)
    assert list(job.needed_versions()) == [Version(1, 20)]


def test_a_rotten_step_that_is_nowhere_else_is_named_with_its_reason() -> None:
    job = begun()
    job.rotten = {VERSION, Version(1, 20)}
    job.add_copy(A, record(20))
    problems = {c.version: c.problem for c in job.candidates()}
    assert problems == {VERSION: "S3 has not what was saved", Version(1, 20): ""}


def test_two_holders_on_one_host_are_one_host() -> None:
    job = begun()
    job.holders[HolderId("a", "2")] = ""
    assert job.hosts == 2
    for holder in (A, HolderId("a", "2")):
        job.add_copy(holder, record(10))
    assert job.is_whole(VERSION)
    assert not job.is_whole(VERSION, 2)
    assert job.copies_of(VERSION, 0) == {"a"}


def test_the_newest_claim_counts_in_whatever_order_they_come() -> None:
    job = Job("job")
    assert job.generation == 0
    assert job.settings is None
    for generation, keep in ((1, 2), (3, 4), (2, 3)):
        settings = JobSettings(replace(MEMORY, keep=keep), None)
        job.add_claim(m.Claim(generation, Life(f"life-{generation}"), 1, settings))
    assert job.generation == 3
    assert job.settings is not None
    assert job.settings.memory.keep == 4
    assert sorted(job.claims) == [1, 2, 3]


def test_who_did_not_answer_the_fence_is_the_last_source() -> None:
    job = begun()
    for holder in (A, B):
        job.add_copy(holder, record(10))
    assert [shard.holders for shard in job.sources(VERSION)] == [(A, B)]
    job.silent = frozenset([A])
    assert [shard.holders for shard in job.sources(VERSION)] == [(B, A)]
