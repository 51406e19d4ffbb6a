"""The picture of a job and of hosts, and what it finds wrong with them."""

from dataclasses import replace

from replication.records import Owner, Version
from tests.unit.tiered.test_job import MEMORY, A, B, begun, commit, record
from tiered import messages as m
from tiered.config import S3
from tiered.findings import host_findings
from tiered.job import Job
from tiered.overview import ClusterStatus, job_overview
from tiered.statuses import HostStatus

S3_SETTINGS = S3("s3://bucket/ckpt", every_steps=10)
HOST = HostStatus("a" * 56, "node-a", "10.0.0.1", "", "up", False, 1000, 100)


def whats(job: Job, now_s: float = 50.0) -> list[tuple[str, str]]:
    return [(f.severity, f.what) for f in job_overview(job, now_s).findings]


def test_a_job_with_all_its_copies_has_no_findings() -> None:
    job = begun()
    commit(job, 10)
    commit(job, 20)
    seen = job_overview(job, 50.0, with_shards=True)
    assert [(s.step, s.memory, s.min_copies) for s in seen.steps] == [
        (20, "committed", 2), (10, "committed", 2),
    ]  # fmt: skip
    assert seen.restores == (1, 20)
    assert seen.findings == ()
    (shard,) = seen.steps[0].shards
    assert (shard.own, shard.replicas, shard.copies) == (("a",), ("b",), 2)
    assert seen.steps[0].saved_s == 200.0


def test_a_lost_host_is_said_with_how_long_and_what_to_do() -> None:
    job = begun()
    commit(job, 10)
    job.handle(m.HolderDown(B), 20.0)
    job.handle(m.Ticked(), 20.0)
    (finding,) = job_overview(job, 50.0).findings
    assert finding.severity == "critical"
    assert finding.what == "step 10 has 1 of 2 copies for 1 of 1 ranks, 30 s long"
    assert "add some" in finding.remedy


def test_steps_that_are_arriving_incomplete_or_left_behind_are_told_apart() -> None:
    job = begun(ranks=2)
    job.handle(m.ShardReported(A, record(10, 0, ranks=2)), 1.0)
    states = {s.step: (s.memory, s.missing_ranks) for s in job_overview(job, 2.0).steps}
    assert states == {10: ("arriving", (1,))}
    assert job_overview(job, 2.0).restores is None
    assert whats(job) == [("warning", "no step can be restored yet")]


def test_a_policy_without_replicas_is_said() -> None:
    job = begun(replace(MEMORY, replicas=0))
    commit(job, 10, A)
    assert whats(job) == [("warning", "the policy keeps no copy on another host")]


def test_s3_that_fails_is_said_with_how_far_it_is_behind() -> None:
    job = begun(s3=S3_SETTINGS)
    commit(job, 10)
    uploading = job_overview(job, 11.0)
    assert uploading.steps[0].flush == "0 of 1 shards uploaded"
    assert uploading.findings == ()
    job.handle(m.UploadFailed(Version(1, 10), 0, A, "it is down"), 12.0)
    seen = job_overview(job, 13.0)
    assert seen.s3_problem == "it is down"
    assert [f.what for f in seen.findings] == ["nothing is on S3 yet, 10 steps behind: it is down"]


def test_why_s3_fails_is_said_until_a_step_is_on_it_again() -> None:
    job = begun(s3=S3_SETTINGS)
    commit(job, 10)
    job.handle(m.UploadFailed(Version(1, 10), 0, A, "it is down"), 12.0)
    commit(job, 20)  # a newer step takes the place of the one that failed
    seen = job_overview(job, 20.0)
    assert seen.s3_problem == "it is down"
    assert [f.what for f in seen.findings] == ["nothing is on S3 yet, 20 steps behind: it is down"]
    job.handle(m.ShardUploaded(Version(1, 20), 0, record(20)), 21.0)
    assert job_overview(job, 21.0).s3_problem == "it is down"
    job.handle(m.ManifestPublished(Version(1, 20), ()), 22.0)
    assert job_overview(job, 22.0).findings == ()


def test_what_s3_has_may_not_be_known() -> None:
    job = begun(s3=S3_SETTINGS)
    commit(job, 10)
    job.durable_problem = "S3 was not listed yet"
    (finding,) = job_overview(job, 12.0).findings
    assert finding.what == ("it is not known what is on S3, 10 steps behind: S3 was not listed yet")


def test_where_nothing_is_committed_nothing_is_behind() -> None:
    job = begun(s3=S3_SETTINGS)
    job.durable_problem = "the credentials are not valid"
    whats = [finding.what for finding in job_overview(job, 12.0).findings]
    assert "it is not known what is on S3: the credentials are not valid" in whats


def test_s3_that_hangs_is_said_before_the_upload_ends() -> None:
    job = begun(s3=S3_SETTINGS)
    commit(job, 10)
    assert m.AskDurable() in job.handle(m.Ticked(), 20.0)
    job.handle(m.DurableAnswered("no answer within 5 s"), 25.0)
    seen = job_overview(job, 25.0)
    assert seen.steps[0].flush == "0 of 1 shards uploaded in 15 s"
    assert [f.what for f in seen.findings] == [
        "nothing is on S3 yet, 10 steps behind: no answer within 5 s"
    ]
    job.handle(m.DurableAnswered(), 30.0)
    assert job_overview(job, 30.0).findings == ()  # it was only slow


def owned(job: Job) -> Job:
    """With a process as rank 0 of its newest generation."""
    owner = Owner("run", "a", "node-a", 123, 0.0, "mark")
    job.add_claim(replace(job.claims[job.generation], owner=owner))
    return job


def test_a_job_that_stands_still_is_said_with_what_is_missing() -> None:
    job = owned(begun(ranks=2))
    for step in (10, 20):  # each a shard of two ranks
        for rank in (0, 1):
            for holder, is_replica in ((A, rank == 1), (B, rank == 0)):
                shard = record(step, rank, ranks=2, is_replica=is_replica)
                job.handle(m.ShardReported(holder, shard), 10.0 * step)
    assert job_overview(job, 600.0, has_trainer=True).findings == ()  # 400 s: 4 intervals
    job.handle(m.ShardReported(A, record(30, 0, ranks=2)), 300.0)
    seen = job_overview(job, 800.0, has_trainer=True)
    assert [(f.severity, f.what) for f in seen.findings] == [
        ("warning", "no step was committed for 600 s, and usually one is every 100.0 s; "
         "step 30 has no shard of ranks 1"),
    ]  # fmt: skip
    seen = job_overview(job, 800.0, has_trainer=False)
    (finding,) = seen.findings
    assert finding.severity == "info"
    assert finding.what == "rank 0 (process 123 on host node-a) is gone, or stopped"
    assert "`tiered stop job`" in finding.remedy


def test_a_coordinator_that_has_just_started_calls_no_job_stalled() -> None:
    job = begun()
    commit(job, 10)
    commit(job, 20)
    job.committed_s = None  # what it found in memory was committed by the one before
    assert job_overview(job, 1e6).findings == ()


def test_a_clock_that_is_off_is_said() -> None:
    job = begun()
    commit(job, 10)  # saved at 100, by the trainer's clock; committed at 10 by the other one
    assert job_overview(job, 12.0, wall_s=102.5).findings == ()
    for wall_s, how in ((95.0, "7 s ahead of"), (402.0, "300 s behind")):
        (finding,) = job_overview(job, 12.0, wall_s=wall_s).findings
        assert how in finding.what
        assert "chrony" in finding.remedy


def test_hosts_are_judged() -> None:
    assert host_findings([HOST]) == ()
    states = ("lost", "silent", "starting", "refused")
    found = host_findings([replace(HOST, state=state) for state in states])
    assert [f.severity for f in found] == ["critical", "warning", "warning", "info"]
    (full,) = host_findings([replace(HOST, used_bytes=950)])
    (leaving,) = host_findings([replace(HOST, is_leaving=True)])
    assert (leaving.severity, "its copies count no more" in leaving.what) == ("info", True)
    assert "95 %" in full.what


def test_a_cluster_is_as_bad_as_its_worst_finding() -> None:
    job = begun()
    commit(job, 10)
    fine = ClusterStatus("1", 0.0, 0.0, (HOST,), (job_overview(job, 1.0),), ())
    assert fine.worst == "info"
    job.handle(m.HolderDown(B), 20.0)
    job.handle(m.Ticked(), 20.0)
    assert replace(fine, jobs=(job_overview(job, 21.0),)).worst == "critical"


def test_hosts_of_one_name_are_called_by_their_address() -> None:
    other = replace(HOST, node_id="b", address="10.0.0.2")
    status = ClusterStatus("1", 0.0, 0.0, (HOST, other), (), ())
    assert status.host_names() == {"a" * 56: "10.0.0.1", "b": "10.0.0.2"}
    assert replace(status, hosts=(HOST,)).host_names() == {"a" * 56: "node-a"}
