"""What is not as it should be in a picture of the cluster, and what to do about it.

Pure functions for `tiered.overview`: each finding says what is wrong in a sentence, and its remedy
in another.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from replication.records import Version
from tiered.config import S3
from tiered.job import Job
from tiered.journal import ranges
from tiered.statuses import HostStatus, StepStatus

Severity = Literal["critical", "warning", "info"]

SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "info")
FULL_SHARE = 0.9  # of a holder's budget, above which it is said to be nearly full
S3_LATE = 2  # intervals without a durable step, after which S3 is said to be behind
STALLED_INTERVALS, STALLED_S = 5.0, 15.0  # without a commit
AHEAD_S, BEHIND_S = 2.0, 60.0  # of a trainer's clock, before it is said to be wrong


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
class Seen:
    """What a job's core does not know, and a picture needs.

    Attributes:
        now_s: On the clock that the core is fed with; None if nobody looked.
        wall_s: The coordinator's clock, in seconds since the epoch; None if nobody looked.
        has_trainer: Whether rank 0's process is there and runs; None if that is not known.
    """

    now_s: float | None = None
    wall_s: float | None = None
    has_trainer: bool | None = None


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
        if host.is_leaving and host.state == "up":
            remedy = "take it away; to keep the machine, start Ray on it anew"
            what = f"{who} was said to go away: its copies count no more"
            found.append(Finding("info", what, remedy))
    return sorted_findings(found)


def job_findings(
    job: Job, steps: tuple[StepStatus, ...], restores: Version | None, seen: Seen
) -> tuple[Finding, ...]:
    """What is wrong with a job, the worst first.

    Args:
        job: Its core.
        steps: What any tier has of it, newest first.
        restores: What would be restored now.
        seen: What the core does not know.
    """
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
        found += _s3_findings(job, job.settings.s3, steps, newest)
    if job.begin is None and job.generation:
        found += _stalled(job, steps, seen)
    if newest is not None and newest.generation == job.generation:
        found += _clock(job, newest, seen)
    return sorted_findings(found)


def _stalled(job: Job, steps: tuple[StepStatus, ...], seen: Seen) -> list[Finding]:
    """Nothing is committed any more: because the trainer is gone, or although it is there."""
    name, owner = job.name, job.claims[job.generation].owner
    if seen.has_trainer is False and owner is not None:
        what = f"rank 0 (process {owner.pid} on host {owner.host}) is gone, or stopped"
        remedy = f"if the job is over, `tiered stop {name}` frees its memory; else start it again"
        return [Finding("info", what, remedy)]
    saved = [s for s in steps if s.memory == "committed" and s.generation == job.generation]
    if job.committed_s is None or seen.now_s is None or len(saved) < 2:
        return []
    usual_s, age_s = saved[0].saved_s - saved[1].saved_s, seen.now_s - job.committed_s
    if not usual_s > 0 or age_s < max(STALLED_S, STALLED_INTERVALS * usual_s):
        return []
    what = f"no step was committed for {age_s:.0f} s, and usually one is every {usual_s:.1f} s"
    arriving = next((s for s in steps if s.memory == "arriving" and s.missing_ranks), None)
    if arriving is not None:
        ranks = ranges(arriving.missing_ranks)
        what += f"; step {arriving.step} has no shard of ranks {ranks}"
    remedy = "training stands still, or saves do not get through: see the trainers' logs"
    return [Finding("warning", what, remedy)]


def _clock(job: Job, newest: StepStatus, seen: Seen) -> list[Finding]:
    """The clock of the host that saved the newest step, beside the coordinator's."""
    if seen.wall_s is None or seen.now_s is None or job.committed_s is None or not newest.saved_s:
        return []
    behind_s = seen.wall_s - newest.saved_s - (seen.now_s - job.committed_s)
    if -AHEAD_S <= behind_s <= BEHIND_S:
        return []
    how = f"{abs(behind_s):.0f} s {'ahead of' if behind_s < 0 else 'behind'} the coordinator's"
    what = f"the clock of the host that saved step {newest.step} is {how}: ages are wrong"
    remedy = "run chrony or another NTP client there (`tiered doctor` compares all); S3 refuses"
    return [Finding("warning", what, f"{remedy} a clock that is 15 minutes off")]


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
    job: Job, s3: S3, steps: tuple[StepStatus, ...], newest: StepStatus | None
) -> list[Finding]:
    problem = s3_problem(job)
    durable = max((s.step for s in steps if s.is_durable and s.is_on_branch), default=None)
    behind = 0 if newest is None else newest.step - (0 if durable is None else durable)
    if not problem and behind < S3_LATE * s3.every_steps:
        return []
    if durable is not None:
        at = f"step {durable} is the newest on S3"
    else:
        at = "it is not known what is on S3" if job.durable_problem else "nothing is on S3 yet"
    remedy = (
        "memory saves go on; check the store, and the hosts' way to it and credentials: "
        f"`tiered doctor --s3 {s3.uri}`"
    )
    late = f", {behind} steps behind" if behind else ""
    what = f"{at}{late}" + (f": {problem}" if problem else "")
    return [Finding("warning", what, remedy)]


def sorted_findings(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst first."""
    return tuple(sorted(findings, key=lambda f: SEVERITIES.index(f.severity)))


def s3_problem(job: Job) -> str:
    """Why S3 could not be used lately; empty when it could."""
    return job.flushes.problem or job.flushes.silence or job.durable_problem or ""
