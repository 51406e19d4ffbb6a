"""One picture of the cluster, for the command line, metrics and the page: what is protected now.

The coordinator takes it (`job_overview` for each job); whoever shows it decides nothing. Times that
people see are seconds since the epoch; sizes are bytes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from replication.placement import explain_placement
from replication.records import HolderId, Version
from tiered.config import JobSettings
from tiered.flush import SILENT_S
from tiered.history import is_on_branch
from tiered.job import Job

HostState = Literal["up", "silent", "starting", "refused", "lost"]
MemoryState = Literal["committed", "whole", "arriving", "incomplete", ""]
Severity = Literal["critical", "warning", "info"]

FULL_SHARE = 0.9  # of a holder's budget, above which it is said to be nearly full
S3_LATE = 2  # intervals without a durable step, after which S3 is said to be behind
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "info")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        severity: "critical" when a step may be lost by the next failure.
        what: What is wrong, in a sentence.
        remedy: What to do about it.
    """

    severity: Severity
    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class HostStatus:
    """A host and its holder.

    Attributes:
        node_id: Ray's id.
        name: Host name.
        address: As Ray knows it.
        domain: Failure domain, empty for one of its own.
        state: "silent" did not answer lately, "refused" runs another release, "lost" is gone.
        is_leaving: It was said to go away (`tiered drain`).
        capacity_bytes: Budget of the holder: 80 % of the host's object store.
        used_bytes: Of it, by checkpoints and by what trainers have declared.
        sent_bytes: To other hosts by TCP since the holder started.
        received_bytes: From other hosts since then.
        since_s: When it was lost; 0 for any other.
    """

    node_id: str
    name: str
    address: str
    domain: str
    state: HostState
    is_leaving: bool = False
    capacity_bytes: int = 0
    used_bytes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    since_s: float = 0.0

    @property
    def free_bytes(self) -> int:
        """What is left of the budget."""
        return max(0, self.capacity_bytes - self.used_bytes)


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """One rank's shard of a step.

    Attributes:
        rank: Whose.
        size_bytes: Of its image; 0 where nobody knows.
        own: Hosts whose copy came from the trainer.
        replicas: Hosts whose copy came from another host.
    """

    rank: int
    size_bytes: int
    own: tuple[str, ...]
    replicas: tuple[str, ...]

    @property
    def copies(self) -> int:
        """Verified copies in memory on live hosts."""
        return len({*self.own, *self.replicas})


@dataclass(frozen=True, slots=True)
class StepStatus:
    """What every tier has of one step.

    Attributes:
        generation: That saved it.
        step: Which.
        world_size: Ranks that saved it; 0 while only its manifest's name is known.
        size_bytes: Of all shards that are known.
        saved_s: When it was saved, by the trainer's clock; 0 where nobody knows.
        memory: "committed"; "whole" (of an older generation, or with too few copies yet);
            "arriving"; "incomplete" (some rank has no copy); "" for nothing.
        min_copies: Copies of the rank that has the fewest.
        short_ranks: Ranks with fewer copies than the policy asks for.
        degraded_s: For how long, in seconds.
        missing_ranks: Ranks without any copy in memory.
        is_durable: Its manifest is on S3.
        flush: Where its upload to S3 stands, or why it was given up; empty when not due.
        is_on_branch: False for what a resumed job has left behind.
        shards: Of each rank, if asked for.
    """

    generation: int
    step: int
    world_size: int
    size_bytes: int
    saved_s: float
    memory: MemoryState
    min_copies: int
    short_ranks: tuple[int, ...]
    degraded_s: float
    missing_ranks: tuple[int, ...]
    is_durable: bool
    flush: str
    is_on_branch: bool
    shards: tuple[ShardStatus, ...] = ()


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


def job_overview(job: Job, now_s: float, *, with_shards: bool = False) -> JobOverview:
    """Describe a job from what its core knows; changes nothing.

    Args:
        job: The job's core.
        now_s: On the clock that it is fed with.
        with_shards: List the copies of each rank, too.
    """
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
        s3_problem="" if s3 is None else _s3_problem(job),
        steps=steps,
        restores=None
        if choice.version is None
        else (choice.version.generation, choice.version.step),
        passed_over=choice.passed_over,
        buddies={h.node_id: tuple(b.node_id for b in bs) for h, bs in job.buddies.items()},
        placement=_placement(job),
        findings=_sorted(_job_findings(job, steps, choice.version)),
    )


def host_findings(hosts: Iterable[HostStatus]) -> tuple[Finding, ...]:
    """What is wrong with hosts, the worst first."""
    found: list[Finding] = []
    for host in hosts:
        who = f"host {host.node_id[:8]} ({host.address})"
        match host.state:
            case "silent":
                remedy = "look at its load and network; it is replaced after a minute of silence"
                found.append(Finding("warning", f"{who} does not answer heartbeats", remedy))
            case "refused":
                remedy = "install one release everywhere, then `tiered down` and `tiered up`"
                found.append(Finding("critical", f"{who} runs another release", remedy))
            case "starting":
                remedy = "wait; if it stays so, look at the host's Ray logs"
                found.append(Finding("warning", f"{who} has no holder yet", remedy))
            case "lost":
                remedy = "nothing to do but to add a host if the policy needs one"
                found.append(Finding("info", f"{who} was lost", remedy))
            case "up" if host.capacity_bytes == 0:
                remedy = "start Ray there with --object-store-memory"
                found.append(Finding("warning", f"{who} has no object store", remedy))
            case "up" if host.used_bytes > FULL_SHARE * host.capacity_bytes:
                share = 100 * host.used_bytes / host.capacity_bytes
                remedy = "start Ray with a larger --object-store-memory, or lower Memory(keep=...)"
                what = f"{who} has {share:.0f} % of its checkpoint memory in use"
                found.append(Finding("warning", what, remedy))
    return _sorted(found)


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


def _s3_problem(job: Job) -> str:
    return job.flushes.problem or job.flushes.silence or job.durable_problem or ""


def _policy(settings: JobSettings, replicas: int) -> str:
    memory, s3 = settings.memory, settings.s3
    text = f"every {memory.every_steps} steps, keep {memory.keep}, replicas {replicas}"
    if s3 is not None:
        text += f"; S3 every {s3.every_steps} steps, keep {s3.keep or 'all'}"
    return text


def _placement(job: Job) -> str:
    return "" if job.placement is None else explain_placement(job.placement, job.placed_hosts)


def _job_findings(
    job: Job, steps: tuple[StepStatus, ...], restores: Version | None
) -> list[Finding]:
    found: list[Finding] = []
    newest = next((s for s in steps if s.memory == "committed"), None)
    if restores is None and (steps or job.generation):
        remedy = "nothing if it just began; else see `tiered explain` and the trainers' logs"
        found.append(Finding("warning", "no step can be restored yet", remedy))
    if job.replicas == 0 and job.generation:
        remedy = "add hosts, or set Memory(replicas=1)"
        what = "the policy keeps no copy on another host"
        found.append(Finding("warning", what, remedy))
    if short := next((s for s in steps if s.short_ranks), None):
        found.append(_degraded(job, short))
    if newest is not None and restores is not None and restores < (newest.generation, newest.step):
        remedy = "see `tiered explain`"
        what = f"step {newest.step} was committed, and only step {restores.step} can be restored"
        found.append(Finding("critical", what, remedy))
    if job.settings is not None and job.settings.s3 is not None:
        found += _s3_findings(job, job.settings.s3.every_steps, steps, newest)
    return found


def _degraded(job: Job, step: StepStatus) -> Finding:
    have, want = step.min_copies, 1 + job.replicas
    ranks = f"{len(step.short_ranks)} of {step.world_size} ranks"
    what = f"step {step.step} has {have} of {want} copies for {ranks}, {step.degraded_s:.0f} s long"
    severity: Severity = "critical" if have <= 1 and job.replicas else "warning"
    if job.hosts < want:
        remedy = f"hosts that stay: {job.hosts}, hosts that the policy needs: {want}; add some"
        return Finding(severity, what, remedy)
    if (degraded := next(iter(job.degraded.values()), None)) is not None and degraded.why:
        remedy = f"{degraded.why}: mend the network between them; saves go on meanwhile"
        return Finding(severity, what, remedy)
    remedy = "copies are being made on other hosts; if it lasts, see `tiered events`"
    return Finding(severity, what, remedy)


def _s3_findings(
    job: Job, every_steps: int, steps: tuple[StepStatus, ...], newest: StepStatus | None
) -> list[Finding]:
    problem = _s3_problem(job)
    durable = max((s.step for s in steps if s.is_durable and s.is_on_branch), default=None)
    behind = 0 if newest is None else newest.step - (0 if durable is None else durable)
    if not problem and behind < S3_LATE * every_steps:
        return []
    at = "nothing is on S3 yet" if durable is None else f"step {durable} is the newest on S3"
    remedy = "memory saves go on; check the store and the hosts' credentials: `tiered doctor --s3`"
    what = f"{at}, {behind} steps behind" + (f": {problem}" if problem else "")
    return [Finding("warning", what, remedy)]


def _sorted(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda f: SEVERITIES.index(f.severity)))
