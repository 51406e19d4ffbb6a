"""What commands do that is more than a call of a public function: verify, up, down."""

from dataclasses import replace

import ray
from ray.exceptions import RayError
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from replication.holder import NAMESPACE, holder_name
from replication.records import ActorRef, ShardKey, Version
from tiered import cluster, recovery
from tiered.cli.session import err, out
from tiered.config import S3
from tiered.coordinator import SETTLE_TIMEOUT_S, START_TIMEOUT_S
from tiered.errors import DurableStoreDownError, DurableStoreError
from tiered.overview import JobOverview
from tiered.statuses import ShardStatus, StepStatus

READ_BYTES_PER_S = 50e6  # slower than this counts as hung
READ_BASE_S = 30.0
S3_TIMEOUT_S = 10.0


def verify(job: JobOverview, step: int | None, *, with_s3: bool) -> int:
    """Have every copy read; print the bad ones and a summary.

    Args:
        job: With the shards of its steps.
        step: Only this one.
        with_s3: Read durable steps, too.

    Returns:
        How many copies are corrupt, missing or could not be read.
    """
    steps = [s for s in job.steps if step is None or s.step == step]
    copies = [(s, shard, h) for s in steps for shard in s.shards for h in _holders(shard)]
    durable = [s for s in steps if s.is_durable and with_s3]
    total = sum(shard.size_bytes for _, shard, _ in copies) + sum(s.size_bytes for s in durable)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    bad: list[str] = []
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("reading", total=total or None)
        for of, shard, node_id in copies:
            progress.update(task, description=f"step {of.step} rank {shard.rank} on {node_id[:8]}")
            if problem := _read_copy(job.name, of, shard, node_id):
                bad.append(f"step {of.step} rank {shard.rank} on host {node_id[:8]}: {problem}")
            progress.advance(task, shard.size_bytes)
        away = ""  # why S3 does not answer
        for of in durable:
            progress.update(task, description=f"step {of.step} on S3")
            try:
                problems = [away] if away else _read_durable(job.name, of)
            except DurableStoreError as error:
                problems = [f"not read: {error.problem}"]
                away = "not read either" if isinstance(error, DurableStoreDownError) else ""
            bad += [f"step {of.step} on S3: {problem}" for problem in problems]
            progress.advance(task, of.size_bytes)
    for line in bad:
        out.print(f"✗ {line}", style="red", highlight=False, markup=False)
    what = f"{len(copies)} copies in memory and {len(durable)} steps on S3"
    verdict = f"{len(bad)} are corrupt, gone or not read" if bad else "all intact"
    out.print(f"{what} were {'looked at' if bad else 'read'}: {verdict}", highlight=False)
    return len(bad)


def _holders(shard: ShardStatus) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*shard.own, *shard.replicas)))


def _read_copy(job: str, step: StepStatus, shard: ShardStatus, node_id: str) -> str:
    """Have a holder read its copy; returns what is wrong with it. A corrupt one counts no more."""
    key = ShardKey(job, Version(step.generation, step.step), shard.rank)
    timeout_s = READ_BASE_S + shard.size_bytes / READ_BYTES_PER_S
    try:
        holder: ActorRef = ray.get_actor(holder_name(node_id), NAMESPACE)
        missing: list[ShardKey] = ray.get(holder.verify.remote([key]), timeout=timeout_s)
    except ValueError:
        return "its holder is gone"
    except RayError as error:
        return f"not read: {type(error).__name__}"
    return "corrupt or gone" if missing else ""


def _read_durable(job: str, step: StepStatus) -> list[str]:
    """Read a step from S3 alone; an S3 that hangs is not waited for long."""
    actor = cluster.running_coordinator()
    s3: S3 | None = cluster.ask(actor, "durable_settings", job, timeout_s=recovery.ASK_TIMEOUT_S)
    if s3 is None:
        return []
    version = Version(step.generation, step.step)
    return recovery.verify_durable(job, in_a_hurry(s3), version)


def in_a_hurry(s3: S3) -> S3:
    """The same store for somebody who waits for the answer: asked once, and briefly."""
    return replace(s3, max_attempts=1, read_timeout_s=min(S3_TIMEOUT_S, s3.read_timeout_s))


def start() -> int:
    """Start the coordinator, and have it start the holders; returns how many run.

    One that hangs is ended, and started again.

    Raises:
        ConfigError: No Ray cluster is running.
        DeadlineError: They did not start in time.
    """
    if cluster.end_hung_coordinator():
        err.print("the coordinator did not answer: it is started again", highlight=False)
    timeout_s = START_TIMEOUT_S + SETTLE_TIMEOUT_S
    holders: int = cluster.ask(cluster.coordinator(), "hello", timeout_s=timeout_s)
    return holders
