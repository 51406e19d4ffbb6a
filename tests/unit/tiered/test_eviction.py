from dataclasses import replace

from replication.records import Life, Version
from tests.unit.tiered.test_job import MEMORY, A, B, C, begin, begun, commit, of, record
from tiered import messages as m
from tiered.catalogue import Catalogue
from tiered.config import S3, JobSettings, Memory
from tiered.eviction import ORPHANS_EVERY_S, Eviction
from tiered.job import Job
from tiered.retention import KeepBest, KeepEvery


def known(s3: S3 | None) -> Catalogue:
    catalogue = Catalogue("job")
    catalogue.add_claim(m.Claim(1, Life("life"), 1, JobSettings(Memory(), s3)))
    catalogue.durable = {Version(1, 10)}
    return catalogue


def test_orphans_are_looked_for_at_once_and_then_rarely() -> None:
    eviction = Eviction(known(S3("s3://bucket")))
    assert eviction.collect_orphans(5.0) == [m.CollectOrphans()]
    assert eviction.collect_orphans(5.0 + ORPHANS_EVERY_S - 1) == []
    assert eviction.collect_orphans(5.0 + ORPHANS_EVERY_S) == [m.CollectOrphans()]


def test_a_job_that_deletes_nothing_looks_for_no_orphans() -> None:
    for s3 in (None, S3("s3://bucket", keep=None)):
        assert Eviction(known(s3)).collect_orphans(5.0) == []


def published(s3: S3, *steps: int) -> Job:
    job = begun(s3=s3)
    for step in steps:
        job.handle(m.ManifestPublished(Version(1, step), (record(step),)), 0.0)
    return job


def deleted(commands: list[m.Command]) -> list[Version]:
    return [version for order in of(m.DeleteDurable, commands) for version in order.versions]


def test_where_nothing_goes_to_s3_nothing_is_deleted_there() -> None:
    for job in (Job("job"), begun(), published(S3("s3://bucket", keep=None), 10, 20, 30)):
        assert job.handle(m.ManifestsRead({}), 1.0) == []


def test_what_was_deleted_on_s3_is_known_no_more() -> None:
    job = published(S3("s3://bucket", keep=1), 10)
    commands = job.handle(m.ManifestPublished(Version(1, 20), (record(20),)), 1.0)
    assert deleted(commands) == [Version(1, 10)]
    assert set(job.manifests) == job.durable == {Version(1, 20)}


def test_manifests_are_read_before_s3_collects_only_if_a_policy_looks_into_them() -> None:
    every, best = KeepEvery(1000), KeepBest("loss")
    for policies, reads in (((every,), False), ((every, best), True), ((best, every), True)):
        job = published(S3("s3://bucket", keep=1, also_keep=policies))
        job.durable |= {Version(1, 10), Version(1, 20)}  # of which only the names are known
        commands = job.eviction.collect_durable()
        assert bool(of(m.ReadManifests, commands)) is reads
        assert deleted(commands) == ([] if reads else [Version(1, 10)])


def test_an_inherited_step_without_a_copy_of_some_rank_does_not_count() -> None:
    memory = replace(MEMORY, keep=3)
    job = begun(memory, holders=(A, B, C))
    for step in (1, 2, 3):
        commit(job, step, *((A, B) if step == 2 else (B, C)))
    job.handle(m.HolderDown(A), 4.0)
    job.drop_copy(B, record(2).key)
    begin(job, "two", memory)
    commit(job, 4, B, C)
    assert job.watermark == Version(1, 1)


def test_a_policy_keeps_in_memory_only_what_is_whole_there() -> None:
    memory = replace(MEMORY, also_keep=(KeepEvery(2, at_most=1),))
    job = begun(memory)
    commit(job, 2)
    job.durable.add(Version(1, 4))  # on S3 alone
    half = record(6, ranks=2)
    job.handle(m.ShardReported(A, half), 6.0)
    commit(job, 7)
    begin(job, "two", memory)
    assert job.parents[2] == Version(1, 7)
    for step in (9, 11):
        orders = of(m.CollectBelow, commit(job, step))
    assert orders[-1].pinned == (Version(1, 2),)


def test_a_policy_keeps_what_older_generations_committed_although_the_coordinator_died() -> None:
    settings = JobSettings(replace(MEMORY, also_keep=(KeepEvery(2, at_most=1),)))
    job = Job("job")
    claims = tuple(m.Claim(n, Life(str(n)), 1, settings) for n in (1, 2))
    job.handle(m.Recalled(claims, {1: None, 2: Version(1, 5)}), 0.0)
    for holder in (A, B):
        job.handle(m.HolderUp(holder, "", (record(4), record(5))), 0.0)
    job.handle(m.Ticked(), 1.0)
    assert job.retained == {Version(1, 4)}
