"""Policies of the coordinator's core: strict, degraded, leaving hosts, retention, repair's rate."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from replication.records import HolderId, Life, ShardKey, ShardPlan, ShardRecord, Version
from tiered import messages as m
from tiered.admission import STUCK_S
from tiered.config import S3, JobSettings, Memory
from tiered.job import Job
from tiered.retention import KeepBest, KeepEvery, KeepInterval

A, B, C, D = (HolderId(name, "1") for name in "abcd")
MEMORY = Memory(every_steps=1, replicas=1)
CUT = frozenset({("a", "b")})


def record(
    step: int, rank: int = 0, *, ranks: int = 1, loss: float = 0.0, is_replica: bool = False,
    generation: int = 1, size: int = 1,
) -> ShardRecord:  # fmt: skip
    plan = ShardPlan(ranks, (size,), 10.0 * step, (("loss", loss),))
    key = ShardKey("job", Version(generation, step), rank)
    return ShardRecord(key, plan, (b"d" * 16,), is_replica=is_replica)


def of(kind: type, commands: Iterable[m.Command]) -> list:
    return [command for command in commands if isinstance(command, kind)]


def begun(
    memory: Memory = MEMORY,
    s3: S3 | None = None,
    holders: tuple[HolderId, ...] = (A, B),
    ranks: int = 1,
) -> Job:
    job = Job("job")
    for holder in holders:
        job.handle(m.HolderUp(holder, "", ()), 0.0)
    begin(job, "one", memory, s3, ranks)
    return job


def begin(
    job: Job, life: str, memory: Memory, s3: S3 | None = None, ranks: int = 1,
    before: int | None = None,
) -> None:  # fmt: skip
    """A generation whose every step is asked for and answered well."""
    settings = JobSettings(memory, s3)
    todo = job.handle(m.BeginAsked(Life(life), 0, ranks, settings, before=before), 0.0)
    while todo:
        match todo.pop(0):
            case m.ListDurable():
                todo += job.handle(m.DurableListed(), 0.0)
            case m.ClaimGeneration(claim):
                todo += job.handle(m.GenerationClaimed(claim.generation, is_ours=True), 0.0)
            case m.FenceHolders(generation, _):
                todo += job.handle(m.HoldersFenced(generation), 0.0)
            case m.VerifyShards(generation, version, _, _):
                todo += job.handle(m.ShardsVerified(generation, version, ()), 0.0)
            case m.RecordParent(generation, parent):
                todo += job.handle(m.ParentRecorded(generation, parent), 0.0)
            case m.AnswerBegin(_, error):
                assert error is None


def commit(job: Job, step: int, *holders: HolderId, loss: float = 0.0) -> list[m.Command]:
    """Rank 0's shard on the first holder, its replicas on the others."""
    commands: list[m.Command] = []
    for index, holder in enumerate(holders or (A, B)):
        shard = record(step, loss=loss, is_replica=index > 0, generation=job.generation)
        commands += job.handle(m.ShardReported(holder, shard), float(step))
    return commands


def test_with_too_few_hosts_a_step_commits_degraded_and_is_repaired() -> None:
    job = begun(replace(MEMORY, replicas=2), holders=(A, B, C))
    job.handle(m.HolderDown(C), 1.0)
    committed = commit(job, 10)
    assert [(c.copies, c.is_degraded) for c in of(m.StepCommitted, committed)] == [(2, True)]
    assert of(m.PolicyMissed, job.handle(m.Ticked(), 11.0)) == [
        m.PolicyMissed(Version(1, 10), (0,))
    ]
    assert not of(m.PolicyMissed, job.handle(m.Ticked(), 12.0))
    assert job.degraded[Version(1, 10)].since_s == 11.0
    commands = job.handle(m.HolderUp(C, "", ()), 13.0)
    assert [c.to for c in of(m.ReplicateShard, commands)] == [C]
    commands = job.handle(m.ShardReported(C, record(10, is_replica=True)), 15.0)
    assert of(m.PolicyMet, commands) == [m.PolicyMet(Version(1, 10), 4.0)]
    assert not job.degraded


def test_a_strict_policy_refuses_the_save_instead() -> None:
    job = begun(replace(MEMORY, replicas=2, strict=True), holders=(A, B, C))
    job.handle(m.HolderDown(C), 1.0)
    (answer,) = of(m.AnswerSave, job.handle(m.SaveAsked(Version(1, 10)), 2.0))
    assert not answer.admission.is_admitted
    assert "replicas=2 needs 3 hosts and 2 live" in answer.admission.reason


def test_a_strict_policy_commits_nothing_with_fewer_copies() -> None:
    job = begun(replace(MEMORY, replicas=2, strict=True), holders=(A, B, C))
    assert of(m.AnswerSave, job.handle(m.SaveAsked(Version(1, 10)), 0.0))[0].admission.is_admitted
    job.handle(m.HolderDown(C), 1.0)
    assert not of(m.StepCommitted, commit(job, 10))
    level, problem = job.level(Version(1, 10))
    assert (level, "needs 3 hosts" in problem) == (None, True)


def test_two_hosts_that_cannot_reach_each_other_commit_degraded_and_say_why() -> None:
    job = begun(ranks=2)
    job.handle(m.LinksCut(CUT), 1.0)
    assert job.buddies == {A: (), B: ()}
    assert not job.handle(m.ShardReported(A, record(10, ranks=2)), 2.0)
    commands = job.handle(m.ShardReported(B, record(10, 1, ranks=2)), 2.0)
    assert [(c.copies, c.is_degraded) for c in of(m.StepCommitted, commands)] == [(1, True)]
    job.handle(m.Ticked(), 3.0)
    (degraded,) = job.degraded.values()
    assert (degraded.ranks, degraded.why) == ((0, 1), "hosts a and b cannot reach each other")
    healed = job.handle(m.LinksCut(frozenset()), 4.0)
    assert job.buddies == {A: (B,), B: (A,)}
    assert {(c.source, c.to) for c in of(m.ReplicateShard, healed)} == {(A, B), (B, A)}


@pytest.mark.parametrize("strict", [False, True])
def test_a_step_whose_copies_do_not_come_is_committed_with_what_there_is_unless_strict(
    strict: bool,
) -> None:
    """Found by the simulator: buddies full of older steps, which only a commit lets go of."""
    job = begun(replace(MEMORY, strict=strict), ranks=2)
    job.handle(m.ShardReported(A, record(10, ranks=2)), 0.0)
    job.handle(m.Ticked(), 500.0)
    job.handle(m.ShardReported(B, record(10, 1, ranks=2)), 501.0)
    job.handle(m.ShardReported(A, record(10, 1, ranks=2, is_replica=True)), 501.0)
    job.handle(m.Ticked(), 502.0)
    assert not of(m.StepCommitted, job.handle(m.Ticked(), 501.0 + STUCK_S))
    commands = job.handle(m.Ticked(), 502.0 + STUCK_S)
    committed = [] if strict else [(1, True)]
    assert [(c.copies, c.is_degraded) for c in of(m.StepCommitted, commands)] == committed
    repairs = [] if strict else [(A, B)]
    assert [(r.source, r.to) for r in of(m.ReplicateShard, commands)] == repairs
    assert job.degraded.keys() == ({Version(1, 10)} if not strict else set())


def test_what_waits_for_copies_is_committed_after_what_is_newer_no_more() -> None:
    job = begun()
    job.handle(m.ShardReported(A, record(10)), 0.0)
    job.handle(m.Ticked(), 1.0)
    commit(job, 20)
    assert not of(m.StepCommitted, job.handle(m.Ticked(), 2.0 + STUCK_S))


def test_only_a_writer_without_a_buddy_needs_fewer_copies() -> None:
    job = begun(holders=(A, B, C), ranks=3)
    job.handle(m.LinksCut(CUT), 1.0)
    (alone,) = (holder for holder, buddies in job.buddies.items() if not buddies)
    for rank, holder in enumerate((A, B, C)):
        commands = job.handle(m.ShardReported(holder, record(10, rank, ranks=3)), 2.0)
        assert not commands
    for rank, holder in enumerate((A, B, C)):
        if holder != alone:
            assert not of(m.StepCommitted, commands)
            (buddy,) = job.buddies[holder]
            replica = record(10, rank, ranks=3, is_replica=True)
            commands = job.handle(m.ShardReported(buddy, replica), 3.0)
    assert [c.is_degraded for c in of(m.StepCommitted, commands)] == [True]


def test_no_copy_is_sent_over_a_cut_link() -> None:
    job = begun(holders=(A, B, C, D))
    commit(job, 10, A, C)
    job.handle(m.LinksCut(frozenset({("a", "b"), ("a", "d")})), 11.0)
    job.handle(m.HolderDown(C), 12.0)
    for now_s in (12.0, 100.0, 200.0):
        assert not of(m.ReplicateShard, job.handle(m.Ticked(), now_s))
    job.handle(m.LinksCut(frozenset({("a", "b")})), 300.0)
    times = (400.0, 500.0, 600.0)
    sent = [r for now_s in times for r in of(m.ReplicateShard, job.handle(m.Ticked(), now_s))]
    assert {r.to for r in sent} == {D}


def test_a_leaving_host_sends_to_those_that_it_can_reach() -> None:
    job = begun(holders=(A, B, C, D))
    job.handle(m.LinksCut(frozenset({("b", "c")})), 1.0)
    job.handle(m.HostLeaving("b"), 2.0)
    assert job.buddies[B] == (D, A)


def test_a_strict_policy_refuses_saves_while_a_host_has_no_buddy_that_it_can_reach() -> None:
    job = begun(replace(MEMORY, strict=True))
    job.handle(m.LinksCut(CUT), 1.0)
    (answer,) = of(m.AnswerSave, job.handle(m.SaveAsked(Version(1, 10)), 2.0))
    assert not answer.admission.is_admitted
    assert "hosts a and b cannot reach each other" in answer.admission.reason
    assert not of(m.StepCommitted, commit(job, 20, A))
    roomy = begun(replace(MEMORY, strict=True), holders=(A, B, C, D))
    roomy.handle(m.LinksCut(CUT), 1.0)
    (answer,) = of(m.AnswerSave, roomy.handle(m.SaveAsked(Version(1, 10)), 2.0))
    assert answer.admission.is_admitted


def test_a_loss_makes_kept_steps_degraded_and_says_which_ranks() -> None:
    job = begun(holders=(A, B, C, D), ranks=2)
    for holder, rank, is_replica in ((A, 0, False), (B, 0, True), (C, 1, False), (D, 1, True)):
        shard = record(10, rank, ranks=2, is_replica=is_replica)
        job.handle(m.ShardReported(holder, shard), 0.0)
    commands = job.handle(m.HolderDown(D), 1.0)
    assert of(m.PolicyMissed, commands) == [m.PolicyMissed(Version(1, 10), (1,))]
    (repair,) = of(m.ReplicateShard, commands)
    assert (repair.source, repair.key.rank) == (C, 1)


def test_a_leaving_host_s_copies_are_made_up_for_while_it_is_still_there() -> None:
    job = begun(holders=(A, B, C))
    commit(job, 10)
    commands = job.handle(m.HostLeaving("b"), 20.0)
    (repair,) = of(m.ReplicateShard, commands)
    assert repair.to == C
    assert "b" not in {h.node_id for mates in job.buddies.values() for h in mates}
    assert {h.node_id for h in job.buddies[B]} == {"a", "c"}
    job.handle(m.ShardReported(C, record(10, is_replica=True)), 21.0)
    assert not of(m.ReplicateShard, job.handle(m.Ticked(), 22.0))
    assert not job.handle(m.HostLeaving("b"), 23.0)


def test_a_leaving_host_has_the_newest_step_flushed_at_once() -> None:
    job = begun(s3=S3("s3://bucket", every_steps=1000), holders=(A, B, C))
    commit(job, 10)
    commands = job.handle(m.HostLeaving("b"), 20.0)
    assert [c.version for c in of(m.UploadShard, commands)] == [Version(1, 10)]


def test_when_every_host_leaves_the_copies_still_count() -> None:
    job = begun()
    commit(job, 10)
    for node in "ab":
        job.handle(m.HostLeaving(node), 11.0)
    assert of(m.StepCommitted, commit(job, 20))


def test_retention_pins_steps_below_the_mark_until_it_lets_go_of_them() -> None:
    job = begun(replace(MEMORY, also_keep=(KeepEvery(4, at_most=1),)))
    pins = []
    for step in range(12):
        pins += [
            (c.below.step, [v.step for v in c.pinned])
            for c in of(m.CollectBelow, commit(job, step))
        ]
    assert pins[:3] == [(0, []), (1, [0]), (2, [0])]
    assert pins[4:6] == [(4, []), (5, [4])]
    assert pins[-1] == (10, [8])
    assert sorted(v.step for v in job.commits) == [8, 10, 11]


def test_the_best_step_of_an_older_generation_stays_in_memory() -> None:
    memory = replace(MEMORY, also_keep=(KeepBest("loss"),))
    job = begun(memory)
    for step, loss in enumerate((5.0, 1.0, 4.0)):
        commit(job, step, loss=loss)
    begin(job, "two", memory)
    assert job.parents[2] == Version(1, 2)
    for step in (3, 4):
        commands = commit(job, step, loss=3.0)
    (collect,) = of(m.CollectBelow, commands)
    assert (collect.below, collect.pinned) == (Version(2, 3), (Version(1, 1),))
    commands = [*commit(job, 5, loss=0.5), *commit(job, 6, loss=2.0)]
    assert of(m.CollectBelow, commands)[0].pinned == ()


def test_retention_on_s3_reads_what_it_must_know_before_it_deletes() -> None:
    s3 = S3("s3://bucket", every_steps=1, keep=1, also_keep=(KeepInterval(25.0),))
    job = begun(s3=s3)
    old = [Version(1, step) for step in range(4)]
    job.durable |= set(old)
    published = m.ManifestPublished(Version(1, 4), (record(4),))
    commands = job.handle(published, 0.0)
    assert of(m.ReadManifests, commands) == [m.ReadManifests(tuple(old))]
    assert not of(m.DeleteDurable, commands)
    manifests = {v: (record(v.step),) for v in old if v.step != 1}  # one cannot be read
    (deleted,) = of(m.DeleteDurable, job.handle(m.ManifestsRead(manifests), 0.0))
    assert [v.step for v in deleted.versions] == [2]


def test_a_host_sends_for_repair_no_faster_than_it_may() -> None:
    memory = replace(MEMORY, repair_bytes_per_s=1_000_000)
    job = begun(memory, holders=(A, B))
    for step in (10, 20):
        for holder in (A, B):
            job.handle(m.ShardReported(holder, record(step, size=5_000_000)), 0.0)
    job.handle(m.HolderDown(B), 1.0)
    commands = job.handle(m.HolderUp(C, "", ()), 2.0)
    assert [c.key.version.step for c in of(m.ReplicateShard, commands)] == [20]
    assert not of(m.ReplicateShard, job.handle(m.Ticked(), 6.9))
    commands = job.handle(m.Ticked(), 7.0)
    assert [c.key.version.step for c in of(m.ReplicateShard, commands)] == [10]


def test_a_step_whose_place_was_taken_is_dropped_and_never_commits() -> None:
    job = begun(replace(MEMORY, backpressure="replace", in_flight=1))
    job.handle(m.SaveAsked(Version(1, 10)), 0.0)
    job.handle(m.ShardReported(A, record(10)), 0.0)
    commands = job.handle(m.SaveAsked(Version(1, 20)), 1.0)
    assert of(m.DropStep, commands) == [m.DropStep(Version(1, 10), (A, B))]
    assert of(m.AnswerSave, commands)[0].admission.instead_of == (10,)
    assert not of(m.StepCommitted, commit(job, 10))
    assert "step 20 took its place" in job.level(Version(1, 10))[1]
    assert of(m.StepCommitted, commit(job, 20))
    assert not of(m.DropStep, job.handle(m.SaveAsked(Version(1, 20)), 2.0))


def test_a_rank_that_asks_after_the_coordinator_s_death_saves_what_others_saved() -> None:
    job = begun(replace(MEMORY, in_flight=1))
    job.handle(m.ShardReported(A, record(10)), 0.0)
    job.handle(m.SaveAsked(Version(1, 5)), 0.0)
    (answer,) = of(m.AnswerSave, job.handle(m.SaveAsked(Version(1, 10)), 0.0))
    assert answer.admission.is_admitted


def test_the_parent_that_another_life_of_the_coordinator_recorded_is_the_answer() -> None:
    job = begun()
    for step in (10, 20):
        commit(job, step)
    job.handle(m.BeginAsked(Life("two"), 0, 1, JobSettings(MEMORY)), 0.0)
    job.handle(m.GenerationClaimed(2, is_ours=True), 0.0)
    job.handle(m.HoldersFenced(2), 0.0)
    job.handle(m.ShardsVerified(2, Version(1, 20), ()), 0.0)
    commands = job.handle(m.ParentRecorded(2, Version(1, 10)), 0.0)
    assert [c.error for c in of(m.AnswerBegin, commands)] == [None]
    assert job.resolution(2).version == Version(1, 10)


@pytest.mark.parametrize("holder", [A, B])
def test_the_only_copy_of_a_shard_has_a_keeper(holder: HolderId) -> None:
    job = begun()
    job.handle(m.ShardReported(A, record(10)), 0.0)
    job.handle(m.HolderDown(holder), 1.0)
    assert job.is_last_keeper(holder.node_id) is (holder == A)


def test_half_steps_do_not_pile_up_in_a_generation_that_commits_nothing() -> None:
    """A rank whose host has no room left fails every save; the others' shards filled theirs too."""
    job = begun(holders=(A, B), ranks=2)
    dropped: list[int] = []
    for number in range(8):
        version, now_s = Version(1, number), number * 130.0
        commands = job.handle(m.SaveAsked(version), now_s)
        assert of(m.AnswerSave, commands)[0].admission.is_admitted
        dropped += [c.version.step for c in of(m.DropStep, commands)]
        for holder in (A, B):
            job.handle(m.ShardReported(holder, record(number, ranks=2)), now_s)
        assert not of(m.DropStep, job.handle(m.SaveAsked(version), now_s))
    assert dropped == list(range(7))
    assert [v.step for v in job.copies] == [7]
