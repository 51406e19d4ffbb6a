"""Conditions of the coordinator's cores, one by one: each test fails without the one it names.

Broken on purpose, these cores passed every other test, some also the first few hundred seeds.
"""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from replication.placement import place
from replication.records import HolderId, Life, Owner, ShardRecord, Version
from tests.unit.tiered.test_job import MEMORY, A, B, C, D, begin, begun, commit, of, record
from tiered import messages as m
from tiered.admission import OVERTAKEN_S, STUCK_S
from tiered.config import S3, JobSettings
from tiered.errors import ConfigError, DurableStoreError, StepNotFoundError
from tiered.job import REMIND_S, Job
from tiered.retention import KeepBest, KeepEvery

EAGER = S3("s3://bucket", every_steps=1)
WITH_S3 = JobSettings(MEMORY, EAGER)


def asked(life: str, settings: JobSettings = WITH_S3, **more: int) -> m.BeginAsked:
    return m.BeginAsked(Life(life), 0, 1, settings, **more)


def other(shard: ShardRecord) -> ShardRecord:
    """The same shard with other bytes."""
    return replace(shard, digests=(b"e" * 16,))


def lose(job: Job, version: Version, *holders: HolderId) -> None:
    for holder in holders:
        job.drop_copy(holder, record(version.step, generation=version.generation).key)


def recalled(settings: JobSettings, parents: dict[int, Version | None]) -> Job:
    """What a new coordinator knows before any holder answers."""
    job = Job("job")
    job.handle(m.Recalled((m.Claim(1, Life("one"), 1, settings),), parents), 0.0)
    return job


# --- eviction ------------------------------------------------------------------------------------


def test_nothing_is_collected_while_inventories_come_in() -> None:
    job = recalled(JobSettings(MEMORY), {1: None})
    job.handle(m.HolderUp(A, "", tuple(record(step) for step in (10, 20, 30))), 0.0)
    job.commits = dict.fromkeys((Version(1, step) for step in (10, 20, 30)), False)
    assert job.eviction.collect() == []
    job.handle(m.Ticked(), 1.0)
    assert job.watermark == Version(1, 20)


def test_the_mark_does_not_move_back_to_what_a_policy_keeps() -> None:
    memory = replace(MEMORY, also_keep=(KeepEvery(10, at_most=1),))
    job = begun(memory)
    for step in (10, 11, 12, 13):
        commit(job, step)
    lose(job, Version(1, 12), A, B)
    begin(job, "two", memory)
    assert job.parents[2] == Version(1, 13)
    assert job.watermark == Version(1, 12)


def test_an_inherited_step_that_was_committed_counts_with_one_copy_left() -> None:
    memory = replace(MEMORY, keep=3)
    job = begun(memory, holders=(A, B, C))
    for step in (1, 2, 3):
        commit(job, step)
    lose(job, Version(1, 2), B)
    begin(job, "two", memory)
    (order,) = of(m.CollectBelow, commit(job, 4))
    assert order.below == Version(1, 2)


def test_what_was_abandoned_is_neither_known_nor_kept_by_a_policy_any_more() -> None:
    memory = replace(MEMORY, also_keep=(KeepEvery(2, at_most=2),))
    job = begun(memory)
    for step in (1, 2, 3, 4):
        commit(job, step)
    begin(job, "two", memory, before=3)
    assert job.parents[2] == Version(1, 2)
    (order,) = of(m.CollectBelow, commit(job, 3))
    assert Version(1, 4) not in {*order.pinned, *job.retained, *job.copies}


# --- holders, placement, surplus -----------------------------------------------------------------


def test_no_copy_too_many_goes_while_a_life_begins() -> None:
    job = begun(holders=(A, B, C))
    commit(job, 10, A, B, C)
    commit(job, 20)
    job.handle(asked("two", JobSettings(MEMORY)), 20.0)
    assert not of(m.ReleaseCopies, job.handle(m.Ticked(), 20.0 + REMIND_S))


def test_a_holder_that_comes_back_is_told_its_buddies_again() -> None:
    job = begun()
    again = job.handle(m.HolderUp(A, "", ()), 1.0)
    assert of(m.SetBuddies, again) == [m.SetBuddies(A, (B,), frozenset({A, B}))]


def test_the_placement_stays_near_the_former_one() -> None:
    job = begun(holders=tuple(HolderId(name, "1") for name in "abcdef"))
    before = job.placement
    job.handle(m.HolderDown(A), 1.0)
    assert job.placement == place(job.placed_hosts, 1, before)
    assert job.placement != place(job.placed_hosts, 1)


def test_what_a_holder_that_is_not_up_reports_counts_for_nothing() -> None:
    job = begun()
    job.handle(m.ShardReported(C, record(10)), 0.0)
    assert not job.copies


def test_a_host_that_leaves_is_not_waited_for_and_if_all_leave_all_count() -> None:
    job = begun(replace(MEMORY, replicas=2), holders=(A, B, C))
    job.handle(m.HostLeaving("c"), 1.0)
    assert job.copies_needed == 2
    for node in "ab":
        job.handle(m.HostLeaving(node), 2.0)
    assert job.copies_needed == 3


def test_without_any_host_a_half_step_is_not_committed() -> None:
    job = begun(ranks=2)
    job.handle(m.ShardReported(A, record(10, ranks=2)), 0.0)
    for holder in (A, B):
        assert not of(m.StepCommitted, job.handle(m.HolderDown(holder), 1.0))


def test_only_its_writer_s_buddies_say_how_many_copies_a_shard_can_have() -> None:
    job = begun(replace(MEMORY, replicas=2), holders=(A, B, C, D))
    job.cut, job.buddies = frozenset({("b", "d")}), {A: (B, C), B: ()}
    for holder in (A, B):
        job.add_copy(holder, record(10, is_replica=holder == B))
    assert job.copies_that_commit(Version(1, 10), 0) == 3


def test_a_hung_host_whose_copies_others_have_may_be_ended() -> None:
    job = begun()
    commit(job, 10)
    job.handle(m.HolderDown(A), 11.0)
    assert not job.is_last_keeper("a")


# --- copies --------------------------------------------------------------------------------------


def test_copies_with_different_checksums_commit_nothing() -> None:
    job = begun()
    job.handle(m.ShardReported(A, record(10)), 0.0)
    assert not of(m.StepCommitted, job.handle(m.ShardReported(B, other(record(10))), 0.0))
    job.handle(m.HolderDown(A), 1.0)
    job.handle(m.ShardReported(B, other(record(10))), 2.0)
    assert list(job.intact(Version(1, 10), 0)) == [B]  # nobody else is there to differ from


def test_shards_that_disagree_on_the_number_of_ranks_make_no_step() -> None:
    job = begun()
    for rank, ranks in ((0, 1), (1, 2)):
        job.handle(m.ShardReported(A, record(10, rank, ranks=ranks)), 0.0)
    (candidate,) = job.candidates()
    assert "disagree" in candidate.problem


def test_sources_are_known_when_every_rank_s_are() -> None:
    job = begun(ranks=2)
    job.handle(m.ShardReported(A, record(10, ranks=2)), 0.0)
    assert not job.has_sources(Version(1, 10))
    job.handle(m.ShardReported(A, record(10, 1, ranks=2)), 0.0)
    assert job.has_sources(Version(1, 10))


def test_what_took_a_step_s_place_says_nothing_of_an_older_generation_s() -> None:
    job = begun(replace(MEMORY, backpressure="replace", in_flight=1))
    commit(job, 10)
    begin(job, "two", replace(MEMORY, backpressure="replace", in_flight=1))
    for step in (10, 20):
        job.handle(m.SaveAsked(Version(2, step)), 1.0)
    assert 10 in job.admissions.replaced
    lose(job, Version(1, 10), B)
    job.handle(m.ShardReported(B, record(10, is_replica=True)), 2.0)
    assert list(job.intact(Version(1, 10), 0)) == [A, B]


def test_a_kept_step_of_an_older_generation_is_repaired_although_the_mark_has_passed_it() -> None:
    memory = replace(MEMORY, also_keep=(KeepBest("loss"),))
    job = begun(memory, holders=(A, B, C))
    for step, loss in enumerate((5.0, 1.0, 4.0)):
        commit(job, step, loss=loss)
    begin(job, "two", memory)
    job.handle(m.RankRestored(2, 0), 1.0)
    for step in (3, 4):
        commit(job, step, loss=3.0)
    best = Version(1, 1)
    assert job.watermark > best
    lose(job, best, B)
    (repair,) = of(m.ReplicateShard, job.handle(m.Ticked(), 5.0))
    assert (repair.source, repair.key.version) == (A, best)
    job.handle(m.ShardReported(repair.to, record(1, loss=1.0, is_replica=True)), 6.0)
    assert len(job.intact(best, 0)) == 2


def test_a_save_that_newer_commits_have_passed_says_so() -> None:
    job = begun()
    job.handle(m.ShardReported(A, record(5)), 0.0)
    for step in (10, 20):
        commit(job, step)
    assert "newer steps were committed" in job.level(Version(1, 5))[1]


# --- saves and flushes ---------------------------------------------------------------------------


def dropped(commands: Iterable[m.Command]) -> set[int]:
    return {c.version.step for c in of(m.DropStep, commands)}


def test_a_committed_step_is_dropped_by_no_later_save() -> None:
    job = begun(holders=(A, B, C))
    job.handle(m.SaveAsked(Version(1, 10)), 0.0)
    commit(job, 10)
    assert not dropped(job.handle(m.SaveAsked(Version(1, 20)), 10.0 + OVERTAKEN_S))
    for holder in (A, B):  # they may come back
        job.handle(m.HolderDown(holder), 30.0)
    assert not dropped(job.handle(m.SaveAsked(Version(1, 30)), 31.0))
    assert 10 not in dropped(job.handle(m.SaveAsked(Version(1, 40)), 31.0 + STUCK_S))


def test_the_answers_of_a_life_are_not_those_of_the_next() -> None:
    memory = replace(MEMORY, in_flight=1)
    job = begun(memory)
    answers = []
    for life, step in ((1, 10), (1, 20)):
        (answer,) = of(m.AnswerSave, job.handle(m.SaveAsked(Version(life, step)), 0.0))
        answers.append(answer.admission.is_admitted)
    begin(job, "two", memory)
    (answer,) = of(m.AnswerSave, job.handle(m.SaveAsked(Version(2, 20)), 0.0))
    assert [*answers, answer.admission.is_admitted] == [True, False, True]


def test_the_newest_step_is_not_flushed_again_if_it_is_there_was_given_up_or_is_not_whole() -> None:
    def flushed(prepare: str) -> list[m.Command]:
        job = begun(s3=S3("s3://bucket", every_steps=1000), holders=(A, B, C))
        commit(job, 10)
        if prepare == "durable":
            job.durable.add(Version(1, 10))
        elif prepare == "given up":
            job.flushes.given_up[Version(1, 10)] = "no"
        elif prepare == "not whole":
            lose(job, Version(1, 10), A, B)
        commands = job.handle(m.HostLeaving("c"), 11.0)
        return [*of(m.UploadShard, commands), *of(m.FlushGivenUp, commands)]

    assert flushed("")
    assert not [flushed(how) for how in ("durable", "given up", "not whole") if flushed(how)]


def test_a_step_that_is_durable_when_it_is_committed_is_not_flushed_again() -> None:
    job = begun(s3=EAGER)
    job.durable.add(Version(1, 10))
    assert not of(m.UploadShard, commit(job, 10))
    assert of(m.UploadShard, commit(job, 20))


def test_a_publication_that_was_answered_after_all_is_in_doubt_no_more() -> None:
    job = begun(s3=EAGER)
    job.handle(m.PublishFailed(Version(1, 10), "no answer", is_final=False), 0.0)
    assert job.needs_listing()
    job.handle(m.ManifestPublished(Version(1, 10), (record(10),)), 1.0)
    assert not job.needs_listing()


# --- how a generation begins ---------------------------------------------------------------------


def test_the_next_generation_is_beyond_what_s3_was_once_seen_to_have() -> None:
    job = begun(s3=EAGER)
    job.handle(m.DurableListed((), {}, newest_generation=5), 1.0)
    (claim,) = of(m.ClaimGeneration, job.handle(asked("two"), 2.0))
    assert claim.claim.generation == 6


def test_the_cluster_s_register_has_the_last_word_on_a_parent() -> None:
    job = begun(s3=EAGER)
    job.handle(m.DurableListed((), {1: Version(0, 7)}, newest_generation=1), 1.0)
    assert job.parents[1] is None


def test_what_s3_knows_of_newer_generations_ends_a_reading_of_copies_and_all_begins_anew() -> None:
    job = begun(s3=EAGER)
    commit(job, 10)
    job.handle(asked("two"), 11.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 11.0)
    assert of(m.VerifyShards, job.handle(m.HoldersFenced(2), 11.0))
    (claim,) = of(m.ClaimGeneration, job.handle(m.DurableListed((), {}, newest_generation=5), 12.0))
    assert claim.claim.generation == 6
    assert not job.handle(m.ShardsVerified(2, Version(1, 10), ()), 13.0)
    assert of(m.FenceHolders, job.handle(m.GenerationClaimed(6, is_ours=True), 13.0))
    assert of(m.VerifyShards, job.handle(m.HoldersFenced(6), 14.0))


def test_an_older_generation_s_fence_is_not_this_one_s() -> None:
    job = begun()
    job.handle(m.StopAsked(Life("stop-1")), 1.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 1.0)
    assert not job.handle(m.HoldersFenced(1), 2.0)
    assert of(m.AnswerBegin, job.handle(m.HoldersFenced(2), 2.0))


def test_no_step_is_chosen_before_holders_are_fenced() -> None:
    job = recalled(WITH_S3, {})
    job.handle(m.HolderUp(A, "", ()), 0.0)
    job.handle(m.Ticked(), 1.0)
    commands = job.handle(asked("one"), 2.0)  # it had the claim before the coordinator died
    assert of(m.ListDurable, commands)
    assert of(m.FenceHolders, commands)
    assert not job.handle(m.DurableListed(), 3.0)
    assert of(m.RecordParent, job.handle(m.HoldersFenced(1), 4.0))


def test_a_step_asked_for_that_s3_cannot_serve_is_not_the_answer() -> None:
    job = Job("job")
    for holder in (A, B):
        job.handle(m.HolderUp(holder, "", ()), 0.0)
    job.handle(asked("two", step=10), 0.0)
    job.handle(m.DurableListed((Version(1, 10),), {1: None}, newest_generation=1), 0.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 0.0)
    assert of(m.VerifyShards, job.handle(m.HoldersFenced(2), 0.0))
    silent = m.ShardsVerified(2, Version(1, 10), (), problem="no answer", is_transient=True)
    (answer,) = of(m.AnswerBegin, job.handle(silent, 1.0))
    assert isinstance(answer.error, DurableStoreError)


def test_s3_is_not_read_for_a_step_that_memory_has() -> None:
    job = begun(s3=EAGER)
    commit(job, 10)
    job.durable.add(Version(1, 10))
    job.handle(asked("two"), 11.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 11.0)
    (read,) = of(m.VerifyShards, job.handle(m.HoldersFenced(2), 11.0))
    assert not read.needs_manifest


def test_the_reasons_for_one_parent_are_not_told_with_another() -> None:
    job = begun()
    for step in (10, 20):
        commit(job, step)
    job.handle(asked("two", JobSettings(MEMORY), before=20), 21.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 21.0)
    job.handle(m.HoldersFenced(2), 21.0)
    job.handle(m.ShardsVerified(2, Version(1, 10), ()), 21.0)
    assert job.begin is not None
    assert job.begin.choice is not None
    assert job.begin.choice.passed_over
    job.handle(m.ParentRecorded(2, Version(1, 20)), 22.0)
    assert job.resolution(2).passed_over == ()


def test_replacing_gives_up_the_newest_of_several() -> None:
    job = begun(replace(MEMORY, backpressure="replace", in_flight=2))
    for step in (10, 20):
        job.handle(m.SaveAsked(Version(1, step)), 0.0)
    (answer,) = of(m.AnswerSave, job.handle(m.SaveAsked(Version(1, 30)), 1.0))
    assert answer.admission.instead_of == (20,)


# --- commits -------------------------------------------------------------------------------------


def test_of_steps_that_wait_for_copies_the_newest_is_committed_once_and_none_older() -> None:
    job = begun()
    for step in (0, 10):
        job.handle(m.ShardReported(A, record(step)), 0.0)
    job.handle(m.Ticked(), 1.0)
    commands = job.handle(m.Ticked(), 1.0 + STUCK_S)
    assert [c.version.step for c in of(m.StepCommitted, commands)] == [10]
    assert not of(m.StepCommitted, job.handle(m.Ticked(), 2.0 + STUCK_S))
    assert not of(m.StepCommitted, job.handle(m.Ticked(), 2.0 + 3 * STUCK_S))


def test_step_0_too_is_committed_when_its_copies_do_not_come() -> None:
    job = begun()
    job.handle(m.ShardReported(A, record(0)), 0.0)
    job.handle(m.Ticked(), 1.0)
    assert of(m.StepCommitted, job.handle(m.Ticked(), 1.0 + STUCK_S))


def test_between_two_commits_nothing_is_committed_late() -> None:
    job = begun()
    commit(job, 10)
    job.handle(m.ShardReported(A, record(20)), 20.0)
    job.handle(m.Ticked(), 20.0)
    commit(job, 30)
    assert not of(m.StepCommitted, job.handle(m.Ticked(), 21.0 + STUCK_S))


def test_what_an_older_generation_left_whole_is_not_committed_in_this_one() -> None:
    job = begun()
    job.handle(m.ShardReported(A, record(10)), 0.0)
    begin(job, "two", MEMORY)
    assert job.parents[2] == Version(1, 10)
    job.handle(m.Ticked(), 1.0)
    assert not of(m.StepCommitted, job.handle(m.Ticked(), 1.0 + STUCK_S))


def test_more_copies_than_commit_a_step_are_not_boasted_of() -> None:
    job = recalled(JobSettings(MEMORY), {1: None})
    for holder in (A, B, C):
        job.handle(m.HolderUp(holder, "", (record(10, is_replica=holder != A),)), 0.0)
    assert [c.copies for c in of(m.StepCommitted, job.handle(m.Ticked(), 1.0))] == [2]


def test_when_something_was_committed_is_known_but_not_of_what_was_found_there() -> None:
    job = recalled(JobSettings(MEMORY), {1: None})
    for holder in (A, B):
        job.handle(m.HolderUp(holder, "", (record(10),)), 0.0)
    assert of(m.StepCommitted, job.handle(m.Ticked(), 1.0))
    assert job.committed_s is None
    commit(job, 20)
    assert job.committed_s == 20.0


def test_a_step_that_was_found_there_and_committed_is_needed_no_longer_than_any_other() -> None:
    job = recalled(JobSettings(MEMORY), {1: None})
    for holder in (A, B, C):
        found = () if holder == C else (record(5), record(10))
        job.handle(m.HolderUp(holder, "", found), 0.0)
    job.handle(m.Ticked(), 1.0)
    begin(job, "two", MEMORY, before=10)
    assert job.parents[2] == Version(1, 5)
    lose(job, Version(1, 10), B)
    assert not of(m.ReplicateShard, job.handle(m.Ticked(), 2.0))


def test_only_of_its_own_generation_a_new_coordinator_takes_a_whole_step_for_a_committed_one() -> (
    None
):
    job = Job("job")
    claims = tuple(m.Claim(n, Life(str(n)), 1, JobSettings(MEMORY)) for n in (1, 2))
    job.handle(m.Recalled(claims, {1: None, 2: None}), 0.0)
    job.handle(m.HolderUp(A, "", (record(10),)), 0.0)
    job.handle(m.HolderUp(B, "", ()), 0.0)
    assert not of(m.ReplicateShard, job.handle(m.Ticked(), 1.0))
    assert not of(m.ReplicateShard, job.handle(m.Ticked(), 2.0))


# --- what holders are told, and what goes to S3 at once ------------------------------------------


def test_a_job_that_has_not_begun_tells_holders_nothing() -> None:
    job = Job("job")
    assert job.handle(m.HolderUp(A, "", ()), 0.0) == []
    assert job.handle(m.Ticked(), 10 * REMIND_S) == []


def test_what_s3_said_when_it_was_asked_is_heard() -> None:
    job = begun(s3=EAGER)
    job.handle(m.DurableAnswered("no answer"), 1.0)
    assert job.flushes.silence == "no answer"


def leave(job: Job, node_id: str) -> list[Version]:
    """Which versions are flushed because a host leaves."""
    commands = job.handle(m.HostLeaving(node_id), 50.0)
    return [upload.version for upload in of(m.UploadShard, commands)]


def test_of_several_commits_the_newest_is_flushed_when_a_host_leaves_and_once() -> None:
    job = begun(s3=S3("s3://bucket", every_steps=1000), holders=(A, B, C))
    for step in (10, 20):
        commit(job, step)
    assert leave(job, "c") == [Version(1, 20)]
    job.handle(m.ShardUploaded(Version(1, 20), 0, record(20)), 51.0)
    job.handle(m.ManifestPublished(Version(1, 20), (record(20),)), 51.0)
    commit(job, 60)
    assert job.handle(m.HostLeaving("c"), 61.0) == []  # told again


def test_a_step_of_an_older_generation_is_not_flushed_when_a_host_leaves() -> None:
    s3 = S3("s3://bucket", every_steps=1000)
    job = begun(s3=s3, holders=(A, B, C))
    commit(job, 10)
    begin(job, "two", MEMORY, s3)
    assert leave(job, "c") == []


# --- half steps ----------------------------------------------------------------------------------


def test_half_steps_of_which_nobody_was_asked_go_when_they_are_old_but_for_the_newest() -> None:
    job = begun(ranks=2)
    for step in (10, 20):
        job.handle(m.ShardReported(A, record(step, ranks=2)), 0.0)
    assert not dropped(job.handle(m.SaveAsked(Version(1, 30)), 0.0))
    assert dropped(job.handle(m.SaveAsked(Version(1, 40)), STUCK_S)) == {10, 30}


def test_a_half_step_that_a_rank_still_asks_for_is_not_one_that_may_have_been_committed() -> None:
    job = begun(ranks=2)
    for step in (10, 20):
        job.handle(m.ShardReported(A, record(step, ranks=2)), 0.0)
    job.handle(m.SaveAsked(Version(1, 20)), 0.0)
    assert dropped(job.handle(m.SaveAsked(Version(1, 30)), STUCK_S)) == {20}


# --- begins that are over, overtaken, late or doubled --------------------------------------------


def test_what_comes_late_of_a_begin_that_is_over_changes_nothing() -> None:
    job = begun(s3=EAGER)
    for event in (
        m.GenerationClaimed(1, is_ours=False),
        m.HoldersFenced(1),
        m.ShardsVerified(1, Version(1, 10), ()),
        m.ParentRecorded(1, Version(1, 10)),
        m.DurableListed(),
        m.OwnerSought(Life("two"), OWNER, is_present=True),
    ):
        assert job.handle(event, 1.0) == []
    assert job.parents == {1: None}
    assert of(m.ClaimGeneration, job.handle(asked("two"), 1.0))


def test_each_phase_of_a_begin_is_waited_for_and_no_other_generation_s_counts() -> None:
    job = begun()
    commit(job, 10)
    job.handle(asked("two", JobSettings(MEMORY)), 11.0)
    assert job.handle(m.HoldersFenced(2), 11.0) == []  # of what nobody has claimed yet
    assert job.handle(m.ParentRecorded(2, None), 11.0) == []
    job.handle(m.GenerationClaimed(2, is_ours=True), 11.0)
    assert of(m.VerifyShards, job.handle(m.HoldersFenced(2), 11.0))
    assert job.handle(m.HoldersFenced(2), 11.0) == []  # copies are being read
    assert job.handle(m.ShardsVerified(1, Version(1, 10), ()), 11.0) == []
    assert of(m.RecordParent, job.handle(m.ShardsVerified(2, Version(1, 10), ()), 11.0))
    assert job.handle(m.ParentRecorded(1, Version(1, 10)), 11.0) == []
    assert of(m.AnswerBegin, job.handle(m.ParentRecorded(2, Version(1, 10)), 11.0))


def test_a_copy_of_each_rank_has_to_be_read_before_a_step_is_believed() -> None:
    job = begun(ranks=2)
    for holder in (A, B):
        for rank in (0, 1):
            job.handle(m.ShardReported(holder, record(10, rank, ranks=2)), 0.0)
    job.drop_copy(A, record(10, 1).key)
    job.handle(m.HolderDown(B), 1.0)
    job.handle(m.ShardReported(A, record(10, 1, ranks=2)), 1.0)
    job.handle(m.BeginAsked(Life("two"), 0, 2, JobSettings(MEMORY)), 1.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 1.0)
    job.handle(m.HoldersFenced(2), 1.0)
    both = tuple(record(10, rank, ranks=2) for rank in (0, 1))
    job.handle(m.HolderUp(B, "", both), 1.0)
    bad = ((A, record(10, 1).key),)
    commands = job.handle(m.ShardsVerified(2, Version(1, 10), bad), 2.0)
    assert not of(m.RecordParent, commands)
    assert of(m.VerifyShards, commands)


def test_a_step_that_s3_has_is_believed_although_no_copy_in_memory_could_be_read() -> None:
    job = begun(s3=EAGER)
    commit(job, 10)
    job.durable.add(Version(1, 10))
    job.handle(asked("two"), 11.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 11.0)
    job.handle(m.HoldersFenced(2), 11.0)
    bad = tuple((holder, record(10).key) for holder in (A, B))
    recorded = of(m.RecordParent, job.handle(m.ShardsVerified(2, Version(1, 10), bad), 12.0))
    assert [r.parent for r in recorded] == [Version(1, 10)]


# --- who has the name, and what it is refused with -----------------------------------------------


OWNER = Owner("run", "a", "host-a", 7, 0.0, "mark")


@pytest.mark.parametrize(("first", "second"), [(None, OWNER), (OWNER, None), (None, None)])
def test_a_life_that_does_not_say_who_it_is_neither_asks_nor_is_asked_for(
    first: Owner | None, second: Owner | None
) -> None:
    job = recalled(JobSettings(MEMORY), {1: None})
    job.add_claim(replace(job.claims[1], owner=first))
    job.handle(m.HolderUp(A, "", ()), 0.0)
    job.handle(m.Ticked(), 1.0)
    commands = job.handle(replace(asked("two", JobSettings(MEMORY)), owner=second), 1.0)
    assert of(m.ClaimGeneration, commands)
    assert not of(m.SeekOwner, commands)


def test_a_job_that_never_began_is_stopped_at_once() -> None:
    job = Job("job")
    assert job.handle(m.StopAsked(Life("stop-1")), 0.0) == [m.AnswerBegin(Life("stop-1"))]
    assert not job.claims


def test_a_rank_with_other_settings_than_the_first_one_s_is_refused() -> None:
    job = begun()
    others = JobSettings(replace(MEMORY, keep=7))
    (answer,) = of(m.AnswerBegin, job.handle(asked("one", others), 1.0))
    assert isinstance(answer.error, ConfigError)
    assert "other settings" in str(answer.error)


# --- S3's word on generations and steps ----------------------------------------------------------


def test_a_listing_that_s3_answers_ends_the_doubt_about_a_publication() -> None:
    job = begun(s3=EAGER)
    job.handle(m.PublishFailed(Version(1, 10), "no answer", is_final=False), 0.0)
    job.handle(m.DurableListed(problem="silent"), 1.0)
    assert job.needs_listing()
    assert job.unsure
    job.handle(m.DurableListed(), 2.0)
    assert not job.needs_listing()


def test_a_listing_that_knows_less_takes_back_nothing() -> None:
    job = begun(s3=EAGER)
    for newest in (5, 1):
        job.handle(m.DurableListed((), {}, newest_generation=newest), 1.0)
    (claim,) = of(m.ClaimGeneration, job.handle(asked("two"), 2.0))
    assert claim.claim.generation == 6


def test_a_step_asked_for_is_read_from_s3_although_a_new_listing_failed() -> None:
    job = begun(s3=EAGER)
    job.handle(m.ManifestPublished(Version(1, 10), (record(10),)), 0.0)
    job.handle(m.DurableListed(problem="silent"), 0.0)
    job.handle(asked("two", step=10), 1.0)
    job.handle(m.DurableListed(problem="silent"), 1.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 1.0)
    (read,) = of(m.VerifyShards, job.handle(m.HoldersFenced(2), 1.0))
    assert (read.version, read.needs_manifest) == (Version(1, 10), True)


def test_what_was_not_read_in_time_counts_again_when_a_begin_is_refused() -> None:
    job = begun(s3=EAGER)
    commit(job, 10)
    job.handle(m.DurableListed(problem="silent"), 10.0)
    job.handle(asked("two"), 11.0)
    job.handle(m.DurableListed(problem="silent"), 11.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 11.0)
    job.handle(m.HoldersFenced(2), 11.0)
    unread = tuple((holder, record(10).key) for holder in (A, B))
    silent = m.ShardsVerified(2, Version(1, 10), (), unread=unread)
    (answer,) = of(m.AnswerBegin, job.handle(silent, 12.0))
    assert isinstance(answer.error, DurableStoreError)
    assert list(job.intact(Version(1, 10), 0)) == [A, B]


# --- what is read before a life is answered ------------------------------------------------------


def read_by(commands: Iterable[m.Command]) -> list[tuple[HolderId, tuple[int, ...]]]:
    """Who is to read which ranks' shards."""
    (read,) = of(m.VerifyShards, commands)
    return [(holder, tuple(key.rank for key in keys)) for holder, keys in read.copies]


def test_one_copy_of_each_shard_is_read_where_least_is_to_be_read() -> None:
    job = begun(holders=(A, B, C), ranks=4)
    where = {0: (A, B), 1: (A, B), 2: (B, C), 3: (C, A)}  # whose, and the buddy
    sizes = {0: 9, 1: 2, 2: 3, 3: 4}
    for rank, holders in where.items():
        for holder in holders:
            shard = record(10, rank, ranks=4, size=sizes[rank], is_replica=holder != holders[0])
            job.handle(m.ShardReported(holder, shard), 10.0)
    job.handle(m.BeginAsked(Life("two"), 0, 4, JobSettings(MEMORY)), 11.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 11.0)
    commands = job.handle(m.HoldersFenced(2), 11.0)
    # Rank 0's own host has most to read by then, so rank 1's is read by the buddy.
    assert read_by(commands) == [(A, (0,)), (B, (1,)), (C, (2, 3))]

    version = Version(1, 10)
    keys = [record(10, rank, ranks=4).key for rank in range(4)]
    read = m.ShardsVerified(2, version, ((B, keys[1]),), unread=((C, keys[2]), (C, keys[3])))
    commands = job.handle(read, 12.0)
    assert read_by(commands) == [(A, (1, 3)), (B, (2,))]  # not rank 0's again
    assert of(m.RecordParent, job.handle(m.ShardsVerified(2, version, ()), 13.0))
    assert [shard.holders for shard in job.sources(version)] == [(A, B), (A,), (B,), (A,)]


def test_who_did_not_answer_the_fence_is_asked_to_read_only_what_nobody_else_has() -> None:
    job = begun(holders=(A, B, C), ranks=2)
    for rank, holders in {0: (A, B), 1: (A,)}.items():
        for holder in holders:
            shard = record(10, rank, ranks=2, is_replica=holder != holders[0])
            job.handle(m.ShardReported(holder, shard), 10.0)
    job.handle(m.BeginAsked(Life("two"), 0, 2, JobSettings(MEMORY)), 11.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 11.0)
    commands = job.handle(m.HoldersFenced(2, silent=(A, C)), 11.0)
    assert read_by(commands) == [(A, (1,)), (B, (0,))]


def test_a_step_whose_last_unread_copy_goes_meanwhile_is_passed_over() -> None:
    job, key = begun(), record(20).key
    commit(job, 10)
    commit(job, 20)
    job.handle(asked("two", JobSettings(MEMORY)), 30.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 30.0)
    assert read_by(job.handle(m.HoldersFenced(2), 30.0)) == [(A, (0,))]
    job.handle(m.HolderDown(B), 31.0)
    commands = job.handle(m.ShardsVerified(2, Version(1, 20), ((A, key),)), 31.0)
    assert [c.version for c in of(m.VerifyShards, commands)] == [Version(1, 10)]


# --- ranks that ask late -------------------------------------------------------------------------


def late(settings: JobSettings, *, ranks: int = 1, held: tuple[ShardRecord, ...] = ()) -> Job:
    """A new coordinator, of a job that has resumed from step 10 of generation 1."""
    job = Job("job")
    claims = tuple(m.Claim(n, Life(name), ranks, settings) for n, name in ((1, "one"), (2, "two")))
    job.handle(m.Recalled(claims, {1: None, 2: Version(1, 10)}), 0.0)
    job.handle(m.HolderUp(A, "", held), 0.0)
    job.handle(m.Ticked(), 1.0)
    return job


def test_a_late_rank_whose_step_is_in_memory_is_answered_without_s3() -> None:
    job = late(WITH_S3, held=(record(10),))
    assert job.needs_listing()
    assert job.handle(asked("two"), 2.0) == [m.AnswerBegin(Life("two"))]
    assert job.begin is None


def test_a_late_rank_without_s3_is_told_which_ranks_are_lost_and_what_was_read() -> None:
    settings = JobSettings(MEMORY)
    job = late(settings, ranks=2, held=(record(10, ranks=2),))
    late_rank = m.BeginAsked(Life("two"), 1, 2, settings)
    assert of(m.VerifyShards, job.handle(late_rank, 2.0))
    no_store = m.ShardsVerified(2, Version(1, 10), (), problem="there is no S3")
    (answer,) = of(m.AnswerBegin, job.handle(no_store, 2.0))
    assert isinstance(answer.error, StepNotFoundError)
    assert "no copy of rank 1 is left" in str(answer.error)
    assert "there is no S3" in str(answer.error)
    assert job.begin is None


def test_a_late_rank_asks_again_where_s3_did_not_serve_the_manifest_and_is_answered_once() -> None:
    job = late(WITH_S3)
    job.handle(asked("two"), 2.0)
    listed = m.DurableListed((Version(1, 10),), {}, newest_generation=2)
    assert of(m.VerifyShards, job.handle(listed, 2.0))
    silent = m.ShardsVerified(2, Version(1, 10), (), problem="no answer", is_transient=True)
    (answer,) = of(m.AnswerBegin, job.handle(silent, 2.0))
    assert isinstance(answer.error, DurableStoreError)
    assert of(m.VerifyShards, job.handle(asked("two"), 3.0))
    read = m.ShardsVerified(2, Version(1, 10), (), manifest=(record(10),))
    assert of(m.AnswerBegin, job.handle(read, 3.0)) == [m.AnswerBegin(Life("two"))]
    assert job.begin is None


def test_a_host_is_named_by_the_beginning_of_its_id() -> None:
    long = HolderId("0123456789", "1")
    for words, how in (("is corrupt", "bad"), ("did not read", "unread")):
        job = begun(holders=(long, A))
        commit(job, 10, A, long)
        job.handle(asked("two", JobSettings(MEMORY)), 11.0)
        job.handle(m.GenerationClaimed(2, is_ours=True), 11.0)
        job.handle(m.HoldersFenced(2), 11.0)
        of_copy = {how: ((long, record(10).key),)}
        job.handle(m.ShardsVerified(2, Version(1, 10), **{"bad": (), **of_copy}), 12.0)
        job.handle(m.ParentRecorded(2, Version(1, 10)), 12.0)
        (note,) = job.resolution().passed_over
        assert "host 01234567 " in note
        assert words in note


@pytest.mark.parametrize("s3", [None, EAGER])
def test_a_life_whose_step_went_while_its_parent_was_recorded_is_told_so_at_once(
    s3: S3 | None,
) -> None:
    job = begun(s3=s3)
    commit(job, 10)
    job.handle(asked("two", JobSettings(MEMORY, s3)), 11.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 11.0)
    job.handle(m.HoldersFenced(2), 11.0)
    assert of(m.RecordParent, job.handle(m.ShardsVerified(2, Version(1, 10), ()), 12.0))
    for holder in (A, B):
        job.handle(m.CopyFoundCorrupt(holder, record(10).key), 12.0)
    commands = job.handle(m.ParentRecorded(2, Version(1, 10)), 13.0)
    assert [type(a.error) for a in of(m.AnswerBegin, commands)] == [StepNotFoundError]
    assert not of(m.VerifyShards, commands)  # S3 was listed, and has it not
