"""What the coordinator answers to trainers and tools, and how a job's core is read for it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from replication.dataplane import Reach
from replication.placement import explain_placement
from replication.records import HolderId
from tiered.history import Resolution
from tiered.job import Job
from tiered.messages import Level


@dataclass(frozen=True, slots=True)
class Begun:
    """What a trainer is told of the generation that it belongs to.

    Attributes:
        resolution: The one answer for all ranks.
        reach: How to get at the holders that have the shard which this rank will read first.
    """

    resolution: Resolution
    reach: Mapping[HolderId, Reach]


Progress = dict[int, tuple[Level | None, str]]  # step -> how safe it is, and what failed


@dataclass(frozen=True, slots=True)
class DegradedStep:
    """A step in memory with fewer copies than the policy asks for.

    Attributes:
        step: Which.
        ranks: Whose shards have too few copies.
        for_s: For how long, in seconds.
        why: What keeps it so, for a person; empty while copies are being made.
    """

    step: int
    ranks: tuple[int, ...]
    for_s: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class News:
    """What a trainer is told of its saves.

    Attributes:
        progress: Steps that are safer than they were, or will get no safer.
        degraded: Steps below the policy now, newest first.
    """

    progress: Progress
    degraded: tuple[DegradedStep, ...]


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What is known of a job now.

    Attributes:
        generation: The newest, 0 before the first.
        hosts: Node ids with a live holder.
        buddies: For each host, the hosts that its shards are replicated to.
        hosts_with_copies: Hosts that hold any whole shard of the job.
        committed: Steps committed in this generation and kept in memory, oldest first.
        degraded: Steps in memory with fewer copies than the policy asks for, newest first.
        leaving: Hosts that were said to go away.
        durable: Steps on S3, oldest first.
        placement: The placement explained, for a person.
    """

    generation: int
    hosts: tuple[str, ...]
    buddies: dict[str, tuple[str, ...]]
    hosts_with_copies: frozenset[str]
    committed: tuple[int, ...]
    degraded: tuple[DegradedStep, ...]
    leaving: tuple[str, ...]
    durable: tuple[int, ...]
    placement: str


def degraded_steps(job: Job) -> tuple[DegradedStep, ...]:
    """Steps in memory with fewer copies than the policy asks for now, newest first."""
    now_s = time.monotonic()
    newest_first = sorted(job.degraded.items(), reverse=True)
    return tuple(DegradedStep(v.step, d.ranks, now_s - d.since_s, d.why) for v, d in newest_first)


def status_of(job: Job) -> JobStatus:
    """What is known of a job now."""
    holders = {h for ranks in job.copies.values() for held in ranks.values() for h in held}
    committed = sorted(v for v in job.commits if v.generation == job.generation)
    placement, hosts = job.placement, job.placed_hosts
    return JobStatus(
        generation=job.generation,
        hosts=tuple(sorted(h.node_id for h in job.holders)),
        buddies={h.node_id: tuple(b.node_id for b in bs) for h, bs in job.buddies.items()},
        hosts_with_copies=frozenset(h.node_id for h in holders if h in job.holders),
        committed=tuple(v.step for v in committed),
        degraded=degraded_steps(job),
        leaving=tuple(sorted(job.leaving)),
        durable=tuple(v.step for v in sorted(job.durable)),
        placement="" if placement is None else explain_placement(placement, hosts),
    )


def short_without(job: Job, node_id: str) -> str:
    """Which shards a job would have too few copies of without this host, or nothing."""
    for version in job.needed_versions():
        for rank in sorted(job.copies.get(version, {})):
            held = job.copies_of(version, rank) - {node_id}
            if len(held) < job.copies_needed:
                return f"rank {rank} of {version} has {len(held)} copies elsewhere"
    return ""
