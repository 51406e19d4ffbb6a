"""After the faults: what is left of the newest step, and what is left behind."""

import contextlib
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import ray

import tiered
from chaos.recorder import HistoryWriter
from chaos.workload import digest
from chaos.world import World
from replication.holder import NAMESPACE, holder_name
from tiered.collection import collect, look
from tiered.garbage import plan_garbage
from tiered.s3 import S3Store

ASK_TIMEOUT_S = 30.0
GONE_WITHIN_S = 30.0
SHARED_MEMORY = Path("/dev/shm")


def segments() -> set[str]:
    """Files in shared memory that no live process has mapped.

    Those of a run are nobody's once its processes are gone; others may be at work on this machine.
    Semaphores are theirs: nothing of a run makes one, and multiprocessing opens its own late.
    """
    mapped = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it is gone
            mapped.append(maps.read_text())
    names = {path.name for path in SHARED_MEMORY.iterdir() if not path.name.startswith("sem.")}
    return {name for name in names if not any(f"/dev/shm/{name}" in text for text in mapped)}


def segments_left(before: set[str]) -> list[str]:
    """Those that were not there before, and stay: others' come and go at any moment."""
    deadline_s = time.monotonic() + GONE_WITHIN_S
    new = segments() - before
    while new and time.monotonic() < deadline_s:
        time.sleep(0.5)
        new &= segments()
    return sorted(new)


def inspect(job: str, history: HistoryWriter) -> None:
    """Read the newest step from outside of a trainer, and every copy of it at its holder."""
    name = history.invoke("inspect")
    found = tiered.recover(job)
    digests = [digest(found.state(rank)) for rank in range(found.world_size)]
    copies = [0] * found.world_size
    for holder in _holders():
        records = ray.get(holder.list_shards.remote(), timeout=ASK_TIMEOUT_S)
        keys = [
            record.key
            for record in records
            if record.key.job == job
            and record.key.version.step == found.step
            and record.key.version.generation == found.generation
        ]
        bad = ray.get(holder.verify.remote(keys), timeout=ASK_TIMEOUT_S)
        for key in keys:
            copies[key.rank] += key not in bad
    history.write("inspect", "ok", name, step=found.step, copies=copies, digests=digests)


def forget(world: World) -> dict[str, list[str]]:
    """Let go of the job, and tell what of it is still in the cluster and on S3 after a while."""
    tiered.forget(world.job)
    deadline_s = time.monotonic() + GONE_WITHIN_S
    return {
        "trainers": _until_empty(lambda: _trainers(world), deadline_s),
        "shards": _until_empty(_shards, deadline_s),
    }


def unfinished_uploads(settings: tiered.S3, job: str) -> list[str]:
    """Uploads that collecting the garbage of a job, without its grace, does not end."""
    with closing(S3Store(settings, job)) as store:
        survey = look(store, job, keep=settings.keep)
        plan = plan_garbage(
            survey.steps,
            survey.parents,
            known_generation=survey.newest_generation,
            now=survey.now,
            keep=settings.keep,
            grace_s=0.0,
        )
        collect(store, plan)
        return [upload.key for upload in store.uploads("data/")]


def _until_empty(find: Callable[[], list[str]], deadline_s: float) -> list[str]:
    while (found := find()) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    return found


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _holders() -> list[Any]:
    found = []
    for node in _alive():
        try:
            found.append(ray.get_actor(holder_name(node["NodeID"]), NAMESPACE))
        except ValueError:  # the head has none
            continue
    return found


def _shards() -> list[str]:
    """What holders still hold."""
    found = []
    for holder in _holders():
        info = ray.get(holder.hello.remote(), timeout=ASK_TIMEOUT_S)
        if info.used_bytes:
            found.append(f"{info.used_bytes} bytes at {info.holder}")
    return found


def _trainers(world: World) -> list[str]:
    """Trainers that outlived their life."""
    if world.cluster is None:
        return []
    hosts = world.cluster.hosts
    found = [p for host in hosts for p in world.processes_of(host, "Rank")]
    return [f"trainer {p.pid}" for p in found if p.status() != psutil.STATUS_ZOMBIE]
