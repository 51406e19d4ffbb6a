"""Defects of the coordinator's core that the simulator found, each as the events that showed it."""

from collections.abc import Iterable

import pytest

from replication.errors import FencedError
from replication.records import HolderId, Life, ShardKey, ShardPlan, ShardRecord, Version
from tiered import messages as m
from tiered.config import S3, JobSettings, Memory
from tiered.errors import DurableStoreError, StepNotFoundError
from tiered.flush import FlushQueue
from tiered.history import is_on_branch
from tiered.job import REMIND_S, Job

A, B, C = (HolderId(name, "1") for name in "abc")
PLAN = ShardPlan(1, (1,))
SETTINGS = JobSettings(Memory(every_steps=1, replicas=1))
WITH_S3 = JobSettings(Memory(every_steps=1, replicas=1), S3("s3://bucket", every_steps=1))


def record(generation: int, step: int) -> ShardRecord:
    return ShardRecord(ShardKey("job", Version(generation, step), 0), PLAN, (b"d" * 16,))


def asked(life: str, settings: JobSettings = SETTINGS) -> m.BeginAsked:
    return m.BeginAsked(Life(life), 0, 1, settings)


def of(kind: type, commands: Iterable[m.Command]) -> list:
    return [command for command in commands if isinstance(command, kind)]


def begun(settings: JobSettings = SETTINGS, holders: tuple[HolderId, ...] = (A, B)) -> Job:
    """A job whose first generation has started."""
    job = Job("job")
    for holder in holders:
        job.handle(m.HolderUp(holder, "", ()), 0.0)
    job.handle(asked("one", settings), 0.0)
    if settings.s3 is not None:
        job.handle(m.DurableListed(), 0.0)
    job.handle(m.GenerationClaimed(1, is_ours=True), 0.0)
    job.handle(m.HoldersFenced(1), 0.0)
    job.handle(m.ParentRecorded(1, None), 0.0)
    return job


def test_the_first_inventory_after_a_restart_commits_nothing_alone() -> None:
    job = Job("job")
    claim = m.Claim(1, Life("one"), 1, SETTINGS)
    job.handle(m.Recalled((claim,), {1: None}), 0.0)
    commands = job.handle(m.HolderUp(A, "", (record(1, 10),)), 0.0)
    assert not of(m.StepCommitted, commands)
    job.handle(m.HolderUp(B, "", ()), 0.0)
    assert not of(m.StepCommitted, job.handle(m.Ticked(), 1.0))
    commands = job.handle(m.ShardReported(B, record(1, 10)), 2.0)
    assert [c.copies for c in of(m.StepCommitted, commands)] == [2]


def test_a_slow_flush_keeps_its_own_step_in_memory_and_no_other() -> None:
    job = begun(WITH_S3)
    collected = []
    for step in range(6):
        for holder in (A, B):
            commands = job.handle(m.ShardReported(holder, record(1, step)), 0.0)
            collected += of(m.CollectBelow, commands)
    uploading, waiting = Version(1, 0), Version(1, 5)
    assert job.flushes.versions == (uploading, waiting)
    assert (collected[-1].below, collected[-1].pinned) == (Version(1, 4), (uploading, waiting))
    assert sorted(job.copies) == [uploading, Version(1, 4), waiting]
    # Once it is on S3 it goes, although no newer step was committed meanwhile.
    job.handle(m.ShardUploaded(uploading, 0, record(1, 0)), 1.0)
    done = job.handle(m.ManifestPublished(uploading, (record(1, 0),)), 1.0)
    assert [(c.below, c.pinned) for c in of(m.CollectBelow, done)] == [(Version(1, 4), (waiting,))]


def test_two_lives_at_once_claim_different_generations() -> None:
    job = begun()
    first = of(m.ClaimGeneration, job.handle(asked("two"), 0.0))
    second = job.handle(asked("three"), 0.0)
    assert [c.claim.generation for c in first] == [2]
    assert [c.claim.generation for c in of(m.ClaimGeneration, second)] == [3]
    job.handle(m.GenerationClaimed(2, is_ours=True), 0.0)
    assert job.generation == 1  # the answer to a claim that was overtaken claims nothing


@pytest.mark.parametrize("is_claimed", [False, True])
def test_a_late_rank_of_an_overtaken_life_does_not_take_over(is_claimed: bool) -> None:
    job = begun()
    job.handle(asked("two"), 0.0)
    if is_claimed:
        job.handle(m.GenerationClaimed(2, is_ours=True), 0.0)
    job.handle(asked("three"), 0.0)
    answers = of(m.AnswerBegin, job.handle(asked("two"), 0.0))
    assert [type(answer.error) for answer in answers] == [FencedError]
    assert job.begin is not None
    assert job.begin.claim.life == "three"


def test_a_generation_claimed_while_s3_was_silent_is_claimed_anew() -> None:
    job = Job("job")
    for holder in (A, B):
        job.handle(m.HolderUp(holder, "", ()), 0.0)
    job.handle(asked("one", WITH_S3), 0.0)
    job.handle(m.DurableListed(problem="silent"), 0.0)
    job.handle(m.GenerationClaimed(1, is_ours=True), 0.0)
    refused = of(m.AnswerBegin, job.handle(m.HoldersFenced(1), 0.0))
    assert isinstance(refused[0].error, DurableStoreError)
    job.handle(asked("one", WITH_S3), 0.0)
    job.handle(m.HoldersFenced(1), 0.0)
    listed = m.DurableListed((Version(5, 7),), {5: None}, newest_generation=5)
    claims = of(m.ClaimGeneration, job.handle(listed, 0.0))
    assert [c.claim.generation for c in claims] == [6]


def test_a_listing_that_comes_late_still_tells_of_newer_generations() -> None:
    job = Job("job")
    for holder in (A, B):
        job.handle(m.HolderUp(holder, "", ()), 0.0)
    job.handle(asked("one", WITH_S3), 0.0)
    job.handle(asked("two", WITH_S3), 0.0)
    job.handle(m.DurableListed(problem="silent"), 0.0)  # asked for the first life
    late = m.DurableListed((Version(2, 7),), {2: Version(1, 9)}, newest_generation=2)
    claims = of(m.ClaimGeneration, job.handle(late, 0.0))
    assert [c.claim.generation for c in claims] == [3]


def test_a_manifest_that_s3_does_not_serve_sends_nobody_back() -> None:
    job = begun(WITH_S3)
    job.handle(m.ManifestPublished(Version(1, 10), (record(1, 10),)), 0.0)
    job.manifests.clear()
    job.handle(asked("two", WITH_S3), 0.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 0.0)
    assert of(m.VerifyShards, job.handle(m.HoldersFenced(2), 0.0))
    silence = m.ShardsVerified(2, Version(1, 10), (), None, "no answer", is_transient=True)
    commands = job.handle(silence, 0.0)
    assert [type(c.error) for c in of(m.AnswerBegin, commands)] == [DurableStoreError]
    assert Version(1, 10) in job.durable


def test_a_publication_without_an_answer_is_looked_for_on_s3() -> None:
    job = begun(WITH_S3)
    job.handle(m.PublishFailed(Version(1, 10), "no answer", is_final=False), 0.0)
    assert of(m.ListDurable, job.handle(asked("two", WITH_S3), 0.0))


def test_a_late_rank_is_told_where_to_read_although_the_coordinator_died() -> None:
    job = Job("job")
    claims = (m.Claim(1, Life("one"), 1, WITH_S3), m.Claim(2, Life("two"), 1, WITH_S3))
    job.handle(m.Recalled(claims, {1: None, 2: Version(1, 10)}), 0.0)
    for holder in (A, B):
        job.handle(m.HolderUp(holder, "", ()), 0.0)
    assert of(m.ListDurable, job.handle(asked("two", WITH_S3), 0.0))
    commands = job.handle(m.DurableListed((Version(1, 10),), {}, 2), 0.0)
    assert [c.needs_manifest for c in of(m.VerifyShards, commands)] == [True]
    commands = job.handle(m.ShardsVerified(2, Version(1, 10), (), (record(1, 10),)), 0.0)
    assert [c.error for c in of(m.AnswerBegin, commands)] == [None]
    assert len(job.resolution(2).shards) == 1


def test_what_was_collected_is_not_committed_again() -> None:
    job = begun()
    for step in (10, 20, 30):
        for holder in (A, B):
            job.handle(m.ShardReported(holder, record(1, step)), 0.0)
    assert job.watermark == Version(1, 20)
    job.handle(m.HolderDown(B), 0.0)
    commands = job.handle(m.HolderUp(B, "", tuple(record(1, s) for s in (10, 20, 30))), 0.0)
    assert not of(m.StepCommitted, commands)
    assert Version(1, 10) not in job.copies


def test_orders_are_repeated_because_one_may_have_been_lost() -> None:
    job = begun()
    job.handle(m.Ticked(), 0.0)
    commands = job.handle(m.Ticked(), REMIND_S)
    assert {c.holder for c in of(m.SetBuddies, commands)} == {A, B}
    assert {c.holder for c in of(m.FenceNewHolder, commands)} == {A, B}


def test_a_repair_that_failed_is_tried_from_another_copy() -> None:
    job = begun(JobSettings(Memory(every_steps=1, replicas=2)), (A, B, C))
    for holder in (A, B, C):
        job.handle(m.ShardReported(holder, record(1, 10)), 0.0)
    job.handle(m.HolderDown(C), 0.0)
    first = of(m.ReplicateShard, job.handle(m.HolderUp(C, "", ()), 0.0))
    again = of(m.ReplicateShard, job.handle(m.Ticked(), 100.0))
    assert [c.source for c in (*first, *again)] == [A, B]


def test_a_copy_that_came_back_while_others_were_read_is_read_too() -> None:
    job = begun()
    for holder in (A, B):
        job.handle(m.ShardReported(holder, record(1, 10)), 0.0)
    job.handle(m.HolderDown(B), 0.0)
    job.handle(asked("two"), 0.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 0.0)
    first = of(m.VerifyShards, job.handle(m.HoldersFenced(2), 0.0))
    assert [holder for holder, _ in first[0].copies] == [A]
    job.handle(m.HolderUp(B, "", (record(1, 10),)), 0.0)
    bad = ((A, record(1, 10).key),)
    commands = job.handle(m.ShardsVerified(2, Version(1, 10), bad), 0.0)
    assert not of(m.RecordParent, commands)
    assert [holder for holder, _ in of(m.VerifyShards, commands)[0].copies] == [B]


def test_a_copy_that_was_not_read_in_time_is_passed_over_but_not_forgotten() -> None:
    job = begun()
    for step in (10, 20):
        for holder in (A, B):
            job.handle(m.ShardReported(holder, record(1, step)), 0.0)
    job.handle(asked("two"), 0.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 0.0)
    job.handle(m.HoldersFenced(2), 0.0)
    unread = tuple((holder, record(1, 20).key) for holder in (A, B))
    event = m.ShardsVerified(2, Version(1, 20), (), unread=unread)
    assert [c.version for c in of(m.VerifyShards, job.handle(event, 0.0))] == [Version(1, 10)]
    job.handle(asked("three"), 0.0)
    assert job.resolve().version == Version(1, 20)


def test_a_circle_of_parents_ends() -> None:
    assert not is_on_branch(Version(3, 1), {1: Version(2, 5), 2: Version(1, 5)})


def test_nothing_is_deleted_from_s3_while_a_life_begins() -> None:
    job = begun(JobSettings(Memory(every_steps=1), S3("s3://bucket", every_steps=1, keep=1)))
    for step in (10, 20):
        job.handle(m.ManifestPublished(Version(1, step), (record(1, step),)), 0.0)
    assert job.durable == {Version(1, 20)}
    life = m.BeginAsked(Life("two"), 0, 1, job.claims[1].settings, before=25)
    job.handle(life, 0.0)
    event = m.ManifestPublished(Version(1, 30), (record(1, 30),))
    assert not of(m.DeleteDurable, job.handle(event, 0.0))


def test_a_parent_on_s3_tells_of_its_generation_although_the_claim_is_missing() -> None:
    job = Job("job")
    for holder in (A, B):
        job.handle(m.HolderUp(holder, "", ()), 0.0)
    job.handle(asked("one", WITH_S3), 0.0)
    commands = job.handle(m.DurableListed((), {3: None}, newest_generation=0), 0.0)
    assert [c.claim.generation for c in of(m.ClaimGeneration, commands)] == [4]


def publishing() -> Job:
    """A job with a step in memory of which nobody knows whether it is on S3."""
    job = begun(WITH_S3)
    for holder in (A, B):
        job.handle(m.ShardReported(holder, record(1, 10)), 0.0)
    uploaded = m.ShardUploaded(Version(1, 10), 0, record(1, 10))
    assert of(m.PublishManifest, job.handle(uploaded, 0.0))
    return job


def test_a_life_asks_s3_again_while_a_publication_is_not_answered() -> None:
    job = publishing()
    for holder in (A, B):
        job.handle(m.HolderDown(holder), 0.0)
    assert of(m.ListDurable, job.handle(asked("two", WITH_S3), 0.0))


def test_what_memory_has_is_not_asked_of_s3_unless_it_is_corrupt() -> None:
    # A hung S3 has delayed what could be restored from memory.
    job, version = publishing(), Version(1, 10)
    commands = job.handle(asked("two", WITH_S3), 0.0)
    assert not of(m.ListDurable, commands)
    assert of(m.ClaimGeneration, commands)
    job.handle(m.GenerationClaimed(2, is_ours=True), 0.0)
    commands = job.handle(m.HoldersFenced(2), 0.0)
    for holder in (A, B):  # the second copy is read as the first one was bad
        copy = holder, record(1, 10).key
        assert [c.copies for c in of(m.VerifyShards, commands)] == [((holder, (copy[1],)),)]
        commands = job.handle(m.ShardsVerified(2, version, (copy,)), 0.0)
    assert of(m.ListDurable, commands)
    assert not of(m.RecordParent, commands)
    commands = job.handle(m.DurableListed((version,), {1: None}, newest_generation=1), 0.0)
    assert [c.needs_manifest for c in of(m.VerifyShards, commands)] == [True]


def test_a_holder_lost_before_the_answer_is_made_up_for_by_s3() -> None:
    job = begun(WITH_S3)
    job.durable.add(Version(1, 10))
    job.handle(m.ShardReported(A, record(1, 10)), 0.0)
    job.handle(asked("two", WITH_S3), 0.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 0.0)
    job.handle(m.HoldersFenced(2), 0.0)
    assert of(m.RecordParent, job.handle(m.ShardsVerified(2, Version(1, 10), ()), 0.0))
    job.handle(m.HolderDown(A), 0.0)
    commands = job.handle(m.ParentRecorded(2, Version(1, 10)), 0.0)
    assert not of(m.AnswerBegin, commands)
    assert [c.needs_manifest for c in of(m.VerifyShards, commands)] == [True]
    commands = job.handle(m.ShardsVerified(2, Version(1, 10), (), (record(1, 10),)), 0.0)
    assert [c.error for c in of(m.AnswerBegin, commands)] == [None]


def test_an_older_step_of_s3_is_not_taken_while_s3_is_silent() -> None:
    job = begun(WITH_S3)
    job.handle(m.ManifestPublished(Version(1, 10), (record(1, 10),)), 0.0)
    job.handle(m.PublishFailed(Version(1, 20), "no answer", is_final=False), 0.0)
    job.handle(asked("two", WITH_S3), 0.0)
    job.handle(m.DurableListed(problem="silent"), 0.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 0.0)
    commands = job.handle(m.HoldersFenced(2), 0.0)
    assert [type(c.error) for c in of(m.AnswerBegin, commands)] == [DurableStoreError]


def test_an_upload_on_a_lost_holder_is_not_waited_for() -> None:
    queue, version = FlushQueue(), Version(1, 10)
    first = queue.add(version, (0,), 0.0, lambda v, r: (A, B))
    then = queue.review(1.0, lambda v, r: (B,))
    assert [c.holder for c in of(m.UploadShard, (*first, *then))] == [A, B]


def test_a_copy_that_its_holder_found_corrupt_is_made_again() -> None:
    job = begun(holders=(A, B, C))
    for holder in (A, B):
        job.handle(m.ShardReported(holder, record(1, 10)), 0.0)
    assert Version(1, 10) in job.commits
    key = record(1, 10).key
    commands = job.handle(m.CopyFoundCorrupt(B, key), 1.0)
    assert list(job.intact(key.version, 0)) == [A]
    assert [(c.source, c.key) for c in of(m.ReplicateShard, commands)] == [(A, key)]
    assert job.handle(m.CopyFoundCorrupt(B, key), 1.0) == []  # told again


def test_a_copy_found_corrupt_while_it_was_set_aside_is_not_put_back() -> None:
    job = begun()
    for holder in (A, B):
        job.handle(m.ShardReported(holder, record(1, 10)), 0.0)
    job.handle(asked("two"), 1.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 1.0)
    job.handle(m.HoldersFenced(2), 1.0)
    key = record(1, 10).key
    job.handle(m.ShardsVerified(2, key.version, (), unread=((B, key),)), 2.0)
    job.handle(m.CopyFoundCorrupt(B, key), 2.0)
    job.handle(m.ParentRecorded(2, key.version), 2.0)
    assert list(job.intact(key.version, 0)) == [A]


def test_a_step_that_lost_a_copy_with_the_coordinator_is_made_whole_again() -> None:
    # It was committed, but nobody remembers; newer saves may not come for long.
    job = Job("job")
    job.handle(m.Recalled((m.Claim(1, Life("one"), 1, SETTINGS),), {1: None}), 0.0)
    job.handle(m.HolderUp(A, "", (record(1, 10), record(1, 20))), 0.0)
    job.handle(m.HolderUp(B, "", (record(1, 10),)), 0.0)
    commands = job.handle(m.Ticked(), 1.0)
    assert [c.key for c in of(m.ReplicateShard, commands)] == [record(1, 20).key]


def test_a_step_that_rots_on_s3_is_not_tried_by_life_after_life() -> None:
    job = Job("job")
    for holder in (A, B):
        job.handle(m.HolderUp(holder, "", ()), 0.0)
    listing = m.DurableListed((Version(1, 10), Version(1, 20)), {1: None}, 1)
    choices = []
    for generation, life in ((2, "two"), (3, "three")):
        job.handle(asked(life, WITH_S3), 0.0)
        job.handle(listing, 0.0)
        job.handle(m.GenerationClaimed(generation, is_ours=True), 0.0)
        (read,) = of(m.VerifyShards, job.handle(m.HoldersFenced(generation), 0.0))
        manifest = (record(1, read.version.step),)
        job.handle(m.ShardsVerified(generation, read.version, (), manifest), 0.0)
        job.handle(m.ParentRecorded(generation, read.version), 0.0)
        choices.append(read.version.step)
        job.handle(m.DurableFoundCorrupt(read.version, 0), 1.0)
    assert choices == [20, 10]


def saved(job: Job, steps: Iterable[int], holders: tuple[HolderId, ...] = (A, B)) -> list:
    """What is ordered while these steps of the present generation become whole on these holders."""
    commands = []
    for step in steps:
        for holder in holders:
            commands += job.handle(m.ShardReported(holder, record(job.generation, step)), 0.0)
    return of(m.CollectBelow, commands)


def begun_again(job: Job, life: str, before: int | None = None) -> m.CollectBelow:
    """The next generation starts; returns what it has collected at once."""
    generation = job.generation + 1
    asks = m.BeginAsked(Life(life), 0, 1, SETTINGS, before=before)
    commands = job.handle(asks, 0.0)
    commands += job.handle(m.GenerationClaimed(generation, is_ours=True), 0.0)
    commands += job.handle(m.HoldersFenced(generation), 0.0)
    while read := of(m.VerifyShards, commands):
        commands = job.handle(m.ShardsVerified(generation, read[0].version, ()), 0.0)
    (record_parent,) = of(m.RecordParent, commands)
    recorded = m.ParentRecorded(generation, record_parent.parent)
    (order,) = of(m.CollectBelow, job.handle(recorded, 0.0))
    return order


def test_what_a_crash_left_half_saved_goes_as_soon_as_the_next_generation_starts() -> None:
    # Two half steps a crash fill a budget of keep + 2 steps, and then nothing is ever saved again.
    job = begun()
    saved(job, (1, 2))
    saved(job, (3, 4), holders=(C,))  # not even known of: C was never up
    order = begun_again(job, "two")
    assert job.parents[2] == Version(1, 2)
    assert (order.generation, order.branch, order.pinned) == (2, (Version(1, 2),), ())


def test_what_was_inherited_counts_among_what_is_kept() -> None:
    # Or keep=2 steps of each of two generations would be held, and their saves in flight.
    job = begun()
    saved(job, (1, 2, 3))
    assert job.watermark == Version(1, 2)
    begun_again(job, "two")
    assert [order.below for order in saved(job, (4, 5))] == [Version(1, 3), Version(2, 4)]


def test_an_inherited_step_that_never_was_replicated_protects_nothing() -> None:
    job = begun()
    saved(job, (1, 2))
    saved(job, (3,), holders=(A,))
    begun_again(job, "two")
    assert job.parents[2] == Version(1, 3)
    assert saved(job, (4,))[-1].below == Version(1, 2)
    job.handle(m.ShardReported(B, record(1, 3)), 0.0)  # its copy was made
    assert job.watermark == Version(1, 3)


def test_a_whole_step_that_was_left_on_purpose_stays_until_there_is_a_new_one() -> None:
    job = begun()
    saved(job, (1, 2))
    order = begun_again(job, "two", before=2)
    assert job.parents[2] == Version(1, 1)
    assert (order.branch, order.pinned) == ((Version(1, 1),), (Version(1, 2),))
    assert saved(job, (2,))[-1].pinned == ()


def test_a_copy_that_goes_while_the_parent_is_recorded_may_be_on_s3_which_is_silent() -> None:
    # The life was told the step, and not where to read it.
    job = Job("job")
    job.handle(m.Recalled((m.Claim(1, Life("one"), 1, WITH_S3),), {1: None}), 0.0)
    job.handle(m.HolderUp(A, "", (record(1, 10),)), 0.0)
    job.handle(m.Ticked(), 1.0)
    job.handle(asked("two", WITH_S3), 1.0)
    job.handle(m.DurableListed(problem="no answer"), 1.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 1.0)
    job.handle(m.HoldersFenced(2), 1.0)
    job.handle(m.ShardsVerified(2, Version(1, 10), ()), 1.0)
    job.handle(m.CopyFoundCorrupt(A, record(1, 10).key), 2.0)
    job.handle(m.ParentRecorded(2, Version(1, 10)), 3.0)
    (answer,) = of(m.AnswerBegin, job.handle(m.ShardsVerified(2, Version(1, 10), ()), 3.0))
    assert isinstance(answer.error, DurableStoreError)  # it asks again, and so is S3 asked again


def test_what_a_generation_runs_from_is_repaired_while_the_next_one_cannot_begin() -> None:
    job = begun(holders=(A, B, C))
    for holder in (A, B):
        job.handle(m.ShardReported(holder, record(1, 10)), 0.0)
    job.handle(m.BeginAsked(Life("two"), 0, 1, SETTINGS, before=0), 0.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 0.0)
    refused = of(m.AnswerBegin, job.handle(m.HoldersFenced(2), 0.0))
    assert isinstance(refused[0].error, StepNotFoundError)
    repairs = of(m.ReplicateShard, job.handle(m.HolderDown(B), 1.0))
    assert [(r.source, r.key.version, r.to) for r in repairs] == [(A, Version(1, 10), C)]


def test_a_rank_is_not_sent_to_a_step_that_is_nowhere_any_more() -> None:
    job = Job("job")
    claims = tuple(m.Claim(g, Life(name), 1, WITH_S3) for g, name in ((1, "one"), (2, "two")))
    job.handle(m.Recalled(claims, {1: None, 2: Version(1, 10)}), 0.0)
    job.handle(m.HolderUp(A, "", ()), 0.0)
    job.handle(m.DurableFoundCorrupt(Version(1, 10), 0), 0.0)  # said a rank that was told before
    assert of(m.ListDurable, job.handle(asked("two", WITH_S3), 0.0))
    listed = m.DurableListed((Version(1, 10),), {}, newest_generation=2)
    assert of(m.VerifyShards, job.handle(listed, 0.0))
    verified = m.ShardsVerified(2, Version(1, 10), ())
    (answer,) = of(m.AnswerBegin, job.handle(verified, 0.0))
    assert isinstance(answer.error, StepNotFoundError)
    assert "no copy of rank 0 is left" in str(answer.error)
