"""How much memory a host needs, and how often to save: `tiered size`, docs/SIZING.md.

Arithmetic without I/O. `steps_needed` is also what a job's first save is held against.
"""

import math
from dataclasses import dataclass

from replication.fleet import STORE_SHARE
from tiered import cadence
from tiered.config import JobSettings

FLUSHES = 2  # steps on their way to S3 that memory keeps beside the others: one, and one waiting


@dataclass(frozen=True, slots=True)
class Size:
    """What one host needs for one job.

    Attributes:
        steps: That there must be room for, in as many copies.
        copies: Of each shard, its own host's included.
        checkpoint_bytes: Of all those.
        store_bytes: Ray's object store, a share of which may be checkpoints.
        replicate_s: To send one step's copies at the speed that was given; 0 without copies.
    """

    steps: int
    copies: int
    checkpoint_bytes: int
    store_bytes: int
    replicate_s: float


def steps_needed(settings: JobSettings) -> int:
    """Steps that a host must have room for: the memory tier's, and those on their way to S3."""
    return settings.memory.steps_budgeted + (0 if settings.s3 is None else FLUSHES)


def copies_needed(settings: JobSettings) -> int:
    """Copies of each shard, its own host's included, where there are several hosts."""
    replicas = settings.memory.replicas
    return 1 + (1 if replicas is None else replicas)


def size(settings: JobSettings, host_bytes: int, network_bytes_per_s: float) -> Size:
    """What a host needs whose ranks save `host_bytes` together each time.

    Args:
        settings: The job's.
        host_bytes: Of all shards of one host's ranks, in one step.
        network_bytes_per_s: From a host to its buddies.
    """
    steps, copies = steps_needed(settings), copies_needed(settings)
    checkpoint_bytes = steps * copies * host_bytes
    store_bytes = math.ceil(checkpoint_bytes / STORE_SHARE)
    replicate_s = (copies - 1) * host_bytes / network_bytes_per_s
    return Size(steps, copies, checkpoint_bytes, store_bytes, replicate_s)


def best_cadence(
    settings: JobSettings, pace: cadence.Pace, hosts: int, mtbf_s: float | None = None
) -> cadence.Cadence:
    """How often `every_steps="auto"` would save at this pace before it has seen a failure.

    Args:
        settings: The job's; `Memory.max_overhead` bounds the answer.
        pace: Seconds of a step, of a save's stall and of its replication.
        hosts: Of the job.
        mtbf_s: The whole job's mean time between failures; None: by the published rate per host.
    """
    expected_s = cadence.mtbf_s(hosts, 0, 0.0) if mtbf_s is None else mtbf_s
    return cadence.choose(pace, expected_s, settings.memory.max_overhead)
