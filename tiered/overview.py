"""One picture of the cluster, for the command line, metrics and the page: what is protected now.

The coordinator takes it (`job_overview` for each job); whoever shows it decides nothing. Times that
people see are seconds since the epoch; sizes are bytes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from replication.placement import explain_placement
from replication.records import HolderId, Version
from tiered.config import JobSettings
from tiered.findings import SEVERITIES, Finding, Seen, Severity, job_findings, s3_problem
from tiered.flush import SILENT_S
from tiered.history import is_on_branch
from tiered.job import Job
from tiered.statuses import HostStatus, MemoryState, ShardStatus, StepStatus


@dataclass(frozen=True, slots=True)
class JobOverview:
    """One job: its steps, what would be restored, and what is wrong.

    Attributes:
        name: The job.
        generation: The newest, 0 before the first.
        world_size: Ranks of it.
        is_beginning: Its trainers are starting, and have no answer yet.
        policy: Memory and S3 settings in a line.
        copies_wanted: Copies of each shard that the policy asks for, its own host's included.
        copies_needed: Copies that commit a step with the hosts that live.
        s3: Where durable steps go; empty without S3.
        s3_every_steps: Their cadence; 0 without S3.
        s3_problem: Why S3 could not be used lately; empty when it could.
        steps: What any tier has, newest first.
        restores: The (generation, step) that would be restored now, or None.
        passed_over: One line for each newer step that would not be.
        buddies: For each host, where its shards are replicated to.
        placement: The placement explained, for a person.
        findings: What is not as it should be, the worst first.
        has_trainer: Whether rank 0's process is there and runs; None if that is not known.
    """

    name: str
    generation: int
    world_size: int
    is_beginning: bool
    policy: str
    copies_wanted: int
    copies_needed: int
    s3: str
    s3_every_steps: int
    s3_problem: str
    steps: tuple[StepStatus, ...]
    restores: tuple[int, int] | None
    passed_over: tuple[str, ...]
    buddies: Mapping[str, tuple[str, ...]]
    placement: str
    findings: tuple[Finding, ...]
    has_trainer: bool | None = None

    @property
    def newest_committed(self) -> StepStatus | None:
        """The newest step that is whole on as many hosts as the policy could have."""
        return next((s for s in self.steps if s.memory == "committed"), None)

    @property
    def newest_durable(self) -> StepStatus | None:
        """The newest step on S3 that belongs to the job's history."""
        return next((s for s in self.steps if s.is_durable and s.is_on_branch), None)

    def step(self, step: int) -> StepStatus | None:
        """The newest generation's step of that number, of this history rather than another."""
        found = [s for s in self.steps if s.step == step]
        return next((s for s in found if s.is_on_branch), next(iter(found), None))


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """Everything at one moment.

    Attributes:
        release: Of Tiered, that the cluster runs.
        taken_s: When this was taken, by the coordinator's clock.
        coordinator_since_s: When the coordinator started, or was started again.
        hosts: Each host that has or ought to have a holder, and those lost lately.
        jobs: Each job that anything is known of.
        findings: About hosts; each job has its own.
        events: How many entries of each job and kind the journal got since the coordinator started.
    """

    release: str
    taken_s: float
    coordinator_since_s: float
    hosts: tuple[HostStatus, ...]
    jobs: tuple[JobOverview, ...]
    findings: tuple[Finding, ...]
    events: tuple[tuple[str, str, int], ...] = ()

    @property
    def worst(self) -> Severity:
        """The worst of all findings; "info" when there is none."""
        found = {f.severity for f in (*self.findings, *(f for j in self.jobs for f in j.findings))}
        return next((s for s in SEVERITIES if s in found), "info")

    def job(self, name: str) -> JobOverview | None:
        """A job by its name."""
        return next((job for job in self.jobs if job.name == name), None)

    def host_names(self) -> dict[str, str]:
        """What to call each host: its address where host names are not unique."""
        names = [host.name for host in self.hosts]
        return {
            host.node_id: host.name if names.count(host.name) == 1 else host.address
            for host in self.hosts
        }


def job_overview(
    job: Job,
    now_s: float,
    *,
    with_shards: bool = False,
    wall_s: float | None = None,
    has_trainer: bool | None = None,
) -> JobOverview:
    """Describe a job from what its core knows; changes nothing.

    Args:
        job: The job's core.
        now_s: On the clock that it is fed with.
        with_shards: List the copies of each rank, too.
        wall_s: Seconds since the epoch; without it no clock is judged.
        has_trainer: Whether rank 0's process is there, if that is known.
    """
    seen = Seen(now_s, wall_s, has_trainer)
    settings, claim = job.settings, job.claims.get(job.generation)
    s3 = None if settings is None else settings.s3
    versions = sorted(job.copies.keys() | job.durable | set(job.flushes.versions), reverse=True)
    steps = tuple(_step(job, v, now_s, with_shards=with_shards) for v in versions)
    choice = job.resolve()
    return JobOverview(
        name=job.name,
        generation=job.generation,
        world_size=0 if claim is None else claim.world_size,
        is_beginning=job.begin is not None and not job.begin.is_recorded,
        policy="" if settings is None else _policy(settings, job.replicas),
        copies_wanted=1 + job.replicas,
        copies_needed=job.copies_needed,
        s3="" if s3 is None else s3.uri,
        s3_every_steps=0 if s3 is None else s3.every_steps,
        s3_problem="" if s3 is None else s3_problem(job),
        steps=steps,
        restores=None
        if choice.version is None
        else (choice.version.generation, choice.version.step),
        passed_over=choice.passed_over,
        buddies={h.node_id: tuple(b.node_id for b in bs) for h, bs in job.buddies.items()},
        placement=_placement(job),
        findings=job_findings(job, steps, choice.version, seen),
        has_trainer=has_trainer,
    )


def _step(job: Job, version: Version, now_s: float, *, with_shards: bool) -> StepStatus:
    ranks = job.copies.get(version, {})
    records = {r.key.rank: r for r in job.manifests.get(version, ())}
    for rank, held in ranks.items():
        records.update((rank, record) for record in held.values())
    world_size = max((r.plan.world_size for r in records.values()), default=0)
    counts = [len(job.intact(version, rank)) for rank in range(world_size)] if ranks else []
    missing = tuple(rank for rank, count in enumerate(counts) if not count)
    degraded = job.degraded.get(version)
    return StepStatus(
        generation=version.generation,
        step=version.step,
        world_size=world_size,
        size_bytes=sum(r.plan.size_bytes for r in records.values()),
        saved_s=max((r.plan.saved_s for r in records.values()), default=0.0),
        memory=_memory_state(job, version, bool(ranks), missing),
        min_copies=min(counts, default=0),
        short_ranks=() if degraded is None else degraded.ranks,
        degraded_s=0.0 if degraded is None else now_s - degraded.since_s,
        missing_ranks=missing,
        is_durable=version in job.durable,
        flush=_flush(job, version, now_s),
        is_on_branch=is_on_branch(version, job.parents),
        shards=_shards(job, version, world_size) if with_shards else (),
    )


def _memory_state(
    job: Job, version: Version, is_there: bool, missing: tuple[int, ...]
) -> MemoryState:
    if not is_there:
        return ""
    is_arriving = version.generation == job.generation and version not in job.commits
    if missing:
        newest = max((v for v in job.commits if v.generation == job.generation), default=None)
        return "arriving" if is_arriving and (newest is None or newest < version) else "incomplete"
    if version in job.commits:
        return "committed"
    return "arriving" if is_arriving else "whole"


def _shards(job: Job, version: Version, world_size: int) -> tuple[ShardStatus, ...]:
    manifest = {r.key.rank: r for r in job.manifests.get(version, ())}
    shards = []
    for rank in range(world_size):
        held = job.intact(version, rank)
        record = next(iter(held.values()), manifest.get(rank))
        shards.append(
            ShardStatus(
                rank,
                0 if record is None else record.plan.size_bytes,
                _nodes(h for h, r in held.items() if not r.is_replica),
                _nodes(h for h, r in held.items() if r.is_replica),
            )
        )
    return tuple(shards)


def _nodes(holders: Iterable[HolderId]) -> tuple[str, ...]:
    return tuple(holder.node_id for holder in holders)


def _flush(job: Job, version: Version, now_s: float) -> str:
    flushes = job.flushes
    if flushes.waiting is not None and flushes.waiting.version == version:
        return "waits for the upload before it"
    if (now := flushes.current) is not None and now.version == version:
        tries = ", trying again" if now.last_problem else ""
        long = f" in {now_s - now.began_s:.0f} s" if now_s - now.began_s >= SILENT_S else ""
        return f"{len(now.uploaded)} of {len(now.ranks)} shards uploaded{long}{tries}"
    return flushes.given_up.get(version, "")


def _policy(settings: JobSettings, replicas: int) -> str:
    memory, s3 = settings.memory, settings.s3
    text = f"every {memory.every_steps} steps, keep {memory.keep}, replicas {replicas}"
    if s3 is not None:
        text += f"; S3 every {s3.every_steps} steps, keep {s3.keep or 'all'}"
    return text


def _placement(job: Job) -> str:
    return "" if job.placement is None else explain_placement(job.placement, job.placed_hosts)
