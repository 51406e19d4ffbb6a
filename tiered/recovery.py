"""`tiered.recover`: the newest consistent step of a job, from outside of any trainer."""

import contextlib
import math
import time
import uuid
from typing import TYPE_CHECKING

import ray

from replication.errors import DeadlineError
from replication.records import Life, Version
from tiered import cluster, collection, register
from tiered.catalogue import STOP
from tiered.config import S3, check_job_name
from tiered.coordinator import BEGIN_TIMEOUT_S, SETTLE_TIMEOUT_S
from tiered.dispatch import CALL_TIMEOUT_S
from tiered.errors import ConfigError, StepNotFoundError
from tiered.fetch import ShardReader, tiers_of
from tiered.garbage import GRACE_S, GarbagePlan
from tiered.history import Candidate, Resolution, ShardSources, latest_consistent_step
from tiered.journal import Entry
from tiered.ledger import read_manifest
from tiered.overview import ClusterStatus
from tiered.replies import JobStatus
from tiered.s3 import S3Store

if TYPE_CHECKING:
    from tiered.recovered import Recovered

DRAIN_POLL_S = 0.5
ASK_TIMEOUT_S = SETTLE_TIMEOUT_S + 3 * CALL_TIMEOUT_S


def recover(
    where: str | None = None,
    *,
    job: str | None = None,
    s3: S3 | None = None,
    step: int | None = None,
    before: int | None = None,
    allow_pickle: bool = False,
) -> "Recovered":
    """Find the newest consistent step of a job, from any process.

    It asks the coordinator of the running Ray cluster. With `s3` and no cluster running it looks at
    S3 alone, and starts nothing. With an `s3://` URI it looks at S3 alone without asking whether a
    cluster runs. The job, if it is running, is not disturbed.

    Args:
        where: The job's name; or `s3://bucket/prefix`, and then `job` names it.
        job: The job's name, if `where` does not.
        s3: Where its durable steps are; needed only when the cluster is gone.
        step: Just this step.
        before: The newest one less than this step.
        allow_pickle: Unpickle values that were saved so. Only if you trust who saved them.

    Raises:
        StepNotFoundError: There is none; says what was looked at and why it was passed over.
        ConfigError: No cluster is running and no S3 was given; or no job was named.
        DurableStoreError: S3 did not answer.
    """
    is_uri = where is not None and where.startswith("s3://")
    if is_uri and s3 is None:
        s3 = S3(where or "")
    elif where is not None and (is_uri or job is not None):
        raise ConfigError(f"recover({where!r}, {job=}, {s3=}): name one job and one place")
    job = check_job_name(job if is_uri or where is None else where)  # type: ignore[arg-type]
    store: S3Store | None
    try:
        actor = None if is_uri else cluster.running_coordinator()
    except ConfigError:
        if s3 is None:
            raise
        actor = None
    if actor is None:
        assert s3 is not None
        store = S3Store(s3, job)
        with contextlib.closing(store):
            resolution = _resolve_on_s3(job, store, step, before)
    else:
        args = (job, step, before)
        resolution = cluster.ask(actor, "resolve", *args, timeout_s=ASK_TIMEOUT_S)
        known = s3 or cluster.ask(actor, "durable_settings", job, timeout_s=ASK_TIMEOUT_S)
        store = None if known is None else S3Store(known, job)
    assert resolution.version is not None
    from tiered.recovered import Recovered  # imports torch, which most commands do without

    return Recovered(
        job=job,
        step=resolution.version.step,
        generation=resolution.version.generation,
        world_size=len(resolution.shards),
        size_bytes=sum(s.record.plan.size_bytes for s in resolution.shards),
        passed_over=resolution.passed_over,
        _shards=resolution.shards,
        _store=store,
        _allow_pickle=allow_pickle,
    )


def newest_on_s3(job: str, s3: S3) -> Version:
    """The step that would be restored from S3 alone; no cluster is asked.

    Raises:
        StepNotFoundError: There is none.
        DurableStoreError: S3 did not answer.
    """
    with contextlib.closing(S3Store(s3, job)) as store:
        version = _resolve_on_s3(job, store, None, None).version
    assert version is not None
    return version


def status(job: str) -> JobStatus:
    """What the running cluster knows of `job` now.

    Raises:
        ConfigError: No Ray cluster with checkpoints in its memory is running.
    """
    check_job_name(job)
    cluster.attach()
    answer: JobStatus = cluster.ask(cluster.coordinator(), "status", job, timeout_s=ASK_TIMEOUT_S)
    return answer


def cluster_status(job: str | None = None, *, with_shards: bool = False) -> ClusterStatus:
    """What the running cluster protects now: hosts, jobs, steps, and what is not as it should be.

    Args:
        job: Only this one.
        with_shards: With the copies of each rank of each step.

    Raises:
        ConfigError: No Ray cluster with checkpoints in its memory is running.
    """
    if job is not None:
        check_job_name(job)
    actor = cluster.running_coordinator()
    answer: ClusterStatus = cluster.ask(
        actor, "overview", job, with_shards=with_shards, timeout_s=ASK_TIMEOUT_S
    )
    return answer


def events(job: str | None = None, *, after: int = 0) -> list[Entry]:
    """What happened in the running cluster, in order: losses, recoveries, commits.

    Args:
        job: Only this one's, and what happened to hosts.
        after: Only what came after the entry of this number.

    Raises:
        ConfigError: No Ray cluster with checkpoints in its memory is running.
    """
    answer: list[Entry] = cluster.ask(
        cluster.running_coordinator(), "events", job, after, timeout_s=ASK_TIMEOUT_S
    )
    return answer


def explain_placement(job: str) -> str:
    """Where the shards of `job` are replicated to, and what that survives, for a person.

    One line a host, and the exact probability of surviving k simultaneous host losses.

    Raises:
        ConfigError: No Ray cluster with checkpoints in its memory is running.
    """
    return status(job).placement


def drain(node_id: str, timeout_s: float = 600.0) -> None:
    """Return once everything that a host holds has its copies elsewhere; then it may go.

    From the first call on the host takes no replicas, its own copies do not count, and the newest
    committed step of each job with an S3 tier is flushed at once.

    Args:
        node_id: Ray's id of the host (`ray.nodes()`, `tiered.status(job).hosts`).
        timeout_s: Deadline.

    Raises:
        ConfigError: No Ray cluster with checkpoints in its memory is running, or no such host.
        DeadlineError: Not everything was copied in time; says what is left. Copying goes on.
    """
    actor = cluster.running_coordinator()
    known = {node["NodeID"] for node in ray.nodes()}  # type: ignore[no-untyped-call]
    if node_id not in known:
        raise ConfigError(f"node_id={node_id!r} is no host of this cluster: {sorted(known)}")
    deadline = time.monotonic() + timeout_s
    while left := cluster.ask(actor, "drain", node_id, timeout_s=ASK_TIMEOUT_S):
        if time.monotonic() >= deadline:
            raise DeadlineError(f"draining host {node_id[:8]}", timeout_s, "; ".join(left))
        time.sleep(DRAIN_POLL_S)


def forget(job: str) -> None:
    """Let go of everything that `job` has in the cluster's memory; what is on S3 stays.

    For a job that is over: one that is training just goes on, with its next save.

    Raises:
        ConfigError: No Ray cluster with checkpoints in its memory is running.
        HolderUnavailableError: Some host did not answer. Ask again.
    """
    check_job_name(job)
    cluster.ask(cluster.running_coordinator(), "forget", job, timeout_s=ASK_TIMEOUT_S)


def stop(job: str) -> bool:
    """End a job: whoever trains it can save no more, and everything it has in memory is let go of.

    What is on S3 stays, and a later run under the name resumes from there. A trainer that still
    runs gets FencedError at its next save. After the last job's end the holders and the coordinator
    are ended, too, unless there is such a trainer, which they have to tell; do not stop the last
    job while another one starts.

    Returns:
        Whether the holders and the coordinator were ended.

    Raises:
        ConfigError: No Ray cluster with checkpoints in its memory is running.
        FencedError: A new life of the job has begun meanwhile; it goes on.
        HolderUnavailableError: Some host did not answer. Ask again.
    """
    check_job_name(job)
    actor, life = cluster.running_coordinator(), Life(f"{STOP}{uuid.uuid4().hex}")
    is_last: bool = cluster.ask(actor, "stop", job, life, timeout_s=2 * BEGIN_TIMEOUT_S)
    if is_last:
        cluster.end_actors()
    return is_last


def collect_garbage(
    job: str,
    *,
    s3: S3 | None = None,
    keep: int | None = None,
    grace_s: float = GRACE_S,
    dry_run: bool = False,
) -> GarbagePlan:
    """Delete what a job has on S3 and nobody needs; with `dry_run` only say what that is.

    Orphans (shards without a manifest, multipart uploads that were never completed) once they were
    left alone for `grace_s`, and steps older than those to keep, manifest first. Never the newest
    complete step, nor anything of a generation that is about to begin. The rules stand at the head
    of `tiered.garbage`. The job may be running; it need not.

    Args:
        job: Its name.
        s3: Where it is; None: as the running cluster knows it.
        keep: Complete steps to keep; None: as many as the job said when it began (`S3.keep`), and
            if it said nothing or None, all. What `S3.also_keep` names stays as well.
        grace_s: How long, in seconds by S3's clock, an orphan must have been left alone. Longer
            than any flush takes.
        dry_run: Delete nothing.

    Returns:
        What went, or would go: `deletions`, each with its size and the reason; `size_bytes` in all;
        and `spared`, a line for each step that stays although it looks like garbage.

    Raises:
        ConfigError: No `s3` was given, and no cluster is running or the job has none.
        DurableStoreError: S3 did not answer or refused; what is left may be asked for again.
    """
    check_job_name(job)
    if keep is not None and (type(keep) is not int or keep < 1):
        raise ConfigError(f"keep={keep!r} must be a whole number of at least 1, or None")
    if not 0 <= grace_s < math.inf:
        raise ConfigError(f"grace_s={grace_s!r} must be a finite number of seconds of at least 0")
    if s3 is None:
        actor = cluster.running_coordinator()
        s3 = cluster.ask(actor, "durable_settings", job, timeout_s=ASK_TIMEOUT_S)
    if s3 is None:
        raise ConfigError(f"job {job!r} has no S3 tier that the cluster knows of; give s3=...")
    with contextlib.closing(S3Store(s3, job)) as store:
        said, also_keep = collection.retention_of(store)
        plan = collection.find_garbage(
            store, job, keep=said if keep is None else keep, also_keep=also_keep, grace_s=grace_s
        )
        if not dry_run:
            collection.collect(store, plan)
    return plan


def verify_durable(job: str, s3: S3, version: Version) -> list[str]:
    """Read a step from S3 alone, every byte; returns what is wrong with it, a line a rank.

    Raises:
        DurableStoreError: S3 did not answer.
    """
    problems = []
    with contextlib.closing(S3Store(s3, job)) as store:
        problem, shards = _read_manifest(job, store, version)
        if problem:
            return [problem]
        for sources in shards:
            reader = ShardReader(sources, tiers_of(sources, None, store))
            try:
                for _ in reader.chunks():
                    pass
            except StepNotFoundError as error:
                problems.append(f"rank {sources.record.key.rank}: {'; '.join(error.reasons)}")
            finally:
                reader.close()
    return problems


def _resolve_on_s3(job: str, store: S3Store, step: int | None, before: int | None) -> Resolution:
    """The same decision as the coordinator's, over S3 alone: one LIST, one manifest."""
    listing = register.read_listing(store.keys("index/"))
    parents = dict(listing.parents)
    if listing.versions and listing.versions[-1].generation not in parents:
        parents[listing.versions[-1].generation] = None
    left = {v: Candidate(v, 0, is_durable=True) for v in listing.versions}
    unreadable: list[str] = []
    while True:
        choice = latest_consistent_step(left.values(), parents, step=step, before=before)
        passed_over = (*unreadable, *choice.passed_over)
        if choice.version is None:
            wanted = "any step" if step is None else f"step {step}"
            raise StepNotFoundError(job, f"{wanted} on {store!r}", passed_over)
        problem, shards = _read_manifest(job, store, choice.version)
        if not problem:
            generation = choice.version.generation
            return Resolution(generation, choice.version, shards, passed_over)
        unreadable.append(f"{choice.version}: {problem}")
        del left[choice.version]


def _read_manifest(
    job: str, store: S3Store, version: Version
) -> tuple[str, tuple[ShardSources, ...]]:
    try:
        records = read_manifest(store, job, version)
    except ValueError as error:
        return f"its manifest cannot be used: {error}", ()
    return "", tuple(ShardSources(record, (), is_durable=True) for record in records)
