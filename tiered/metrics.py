"""The project's metrics: their names, what they mean, and their values in one picture.

A table and a function without I/O; `tiered.monitor` hands the values to Ray's metrics, `tiered.web`
to a Prometheus that scrapes it. Ray puts `ray_` before the names, and the page's `/metrics` does,
too: one dashboard and one set of alert rules (docs/monitoring) fit both. What only a trainer knows
(`TRAINER_METRICS`) is recorded by the trainer, through Ray.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from tiered.overview import ClusterStatus, JobOverview
from tiered.statuses import HostStatus

PREFIX = "ray_"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric; the unit is in the name.

    Attributes:
        name: Without Ray's prefix.
        kind: What Prometheus takes it for.
        help: In a line.
        labels: Beside those that Ray adds; `job` would be Prometheus' own.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ("job_name",)


@dataclass(frozen=True, slots=True)
class Sample:
    """A metric's value now, for some labels."""

    name: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


_HOST = ("host",)
CLUSTER_METRICS = (
    Metric("tiered_seen_timestamp_seconds", "gauge", "When the coordinator last looked.", ()),
    Metric("tiered_hosts", "gauge", "Hosts by the state of their holder.", ("state",)),
    Metric("tiered_memory_used_bytes", "gauge", "Checkpoint memory in use on a host.", _HOST),
    Metric("tiered_memory_capacity_bytes", "gauge", "Checkpoint memory of a host.", _HOST),
    Metric("tiered_sent_bytes", "gauge", "Sent to other hosts since the holder started.", _HOST),
    Metric("tiered_received_bytes", "gauge", "Received since the holder started.", _HOST),
    Metric("tiered_generation", "gauge", "Lives of the job so far."),
    Metric("tiered_committed_step", "gauge", "Newest committed step."),
    Metric("tiered_committed_age_seconds", "gauge", "Since it was saved."),
    Metric("tiered_commit_interval_seconds", "gauge", "Between the two newest committed steps."),
    Metric("tiered_durable_step", "gauge", "Newest step on S3."),
    Metric("tiered_durable_age_seconds", "gauge", "Since the newest step on S3 was saved."),
    Metric("tiered_tier_bytes", "gauge", "Bytes of steps and copies.", ("job_name", "tier")),
    Metric("tiered_copies", "gauge", "Copies of the worst protected shard of the newest step."),
    Metric("tiered_copies_wanted", "gauge", "Copies that the policy asks for."),
    Metric("tiered_shards_below_policy", "gauge", "Shards with fewer copies than that."),
    Metric("tiered_degraded_seconds", "gauge", "How long some kept step has had too few copies."),
    Metric("tiered_restorable", "gauge", "1 if some step could be restored now, else 0."),
    Metric("tiered_s3_failing", "gauge", "1 while S3 cannot be used, else 0."),
    Metric("tiered_events_total", "counter", "What `tiered events` tells, by kind.",
           ("job_name", "kind")),
)  # fmt: skip
TRAINER_METRICS = (
    Metric("tiered_save_stall_seconds", "histogram", "How long a save held the training thread."),
    Metric("tiered_restore_seconds", "histogram", "How long a rank took to fill its state.",
           ("job_name", "source")),
)  # fmt: skip
METRICS = (*CLUSTER_METRICS, *TRAINER_METRICS)


def samples(status: ClusterStatus) -> Iterator[Sample]:
    """The values of `CLUSTER_METRICS` in one picture."""
    yield Sample("tiered_seen_timestamp_seconds", status.taken_s)
    states = [host.state for host in status.hosts]
    for state in ("up", "silent", "starting", "refused", "lost"):
        yield Sample("tiered_hosts", states.count(state), {"state": state})
    for host in status.hosts:
        yield from _host(host)
    for job in status.jobs:
        for name, value in _job(job, status.taken_s):
            yield Sample(name, value, {"job_name": job.name})
        for tier, size_bytes in _tiers(job):
            yield Sample("tiered_tier_bytes", size_bytes, {"job_name": job.name, "tier": tier})
    for name, kind, count in status.events:
        yield Sample("tiered_events_total", count, {"job_name": name, "kind": kind})


def _host(host: HostStatus) -> Iterator[Sample]:
    if host.state != "up":
        return
    labels = {"host": host.address or host.node_id}
    yield Sample("tiered_memory_used_bytes", host.used_bytes, labels)
    yield Sample("tiered_memory_capacity_bytes", host.capacity_bytes, labels)
    yield Sample("tiered_sent_bytes", host.sent_bytes, labels)
    yield Sample("tiered_received_bytes", host.received_bytes, labels)


def _job(job: JobOverview, now_s: float) -> Iterator[tuple[str, float]]:
    yield "tiered_generation", job.generation
    yield "tiered_copies_wanted", job.copies_wanted
    yield "tiered_shards_below_policy", sum(len(step.short_ranks) for step in job.steps)
    yield "tiered_degraded_seconds", max((step.degraded_s for step in job.steps), default=0.0)
    yield "tiered_restorable", float(job.restores is not None)
    yield "tiered_s3_failing", float(bool(job.s3_problem))
    committed = [step for step in job.steps if step.memory == "committed"]
    if committed:
        newest = committed[0]
        yield "tiered_committed_step", newest.step
        yield "tiered_copies", newest.min_copies
        if newest.saved_s:
            yield "tiered_committed_age_seconds", max(0.0, now_s - newest.saved_s)
        if len(committed) > 1 and newest.saved_s > committed[1].saved_s > 0:
            yield "tiered_commit_interval_seconds", newest.saved_s - committed[1].saved_s
    if (durable := job.newest_durable) is not None:
        yield "tiered_durable_step", durable.step
        if durable.saved_s:
            yield "tiered_durable_age_seconds", max(0.0, now_s - durable.saved_s)


def _tiers(job: JobOverview) -> Iterator[tuple[str, float]]:
    in_memory = (step for step in job.steps if step.memory)
    yield "memory", sum(step.size_bytes * max(1, step.min_copies) for step in in_memory)
    if job.s3:
        yield "s3", sum(step.size_bytes for step in job.steps if step.is_durable)
