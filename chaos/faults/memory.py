"""Bytes in memory: flipped, cut off, or crowded by another job."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from chaos.schedule import Planned
from chaos.world import Aim, World, pick
from replication.holder import NAMESPACE, holder_name
from replication.records import ShardKey
from replication.shared import Place, mappings

ASK_TIMEOUT_S = 3.0
PIECE_BYTES = 8 << 20


def write_into(pid: int, place: Place, change: Callable[[bytes], bytes]) -> None:
    """Change bytes of an object store behind its back, through a process that has it mapped.

    The kernel writes for us (/proc/PID/mem), whatever the process may do with the page.

    Raises:
        OSError: The process is gone, or has no such mapping.
    """
    for one in mappings(Path(f"/proc/{pid}/maps").read_text().splitlines()):
        start = one.start + place.offset - one.offset
        if one.file == place.file and one.start <= start and start + place.size_bytes <= one.stop:
            memory = os.open(f"/proc/{pid}/mem", os.O_RDWR)
            try:
                new = change(os.pread(memory, place.size_bytes, start))
                os.pwrite(memory, new, start)
                if os.pread(memory, place.size_bytes, start) != new:
                    raise OSError("the memory did not change")
            finally:
                os.close(memory)
            return
    raise OSError(f"process {pid} does not map the place")


def flipped(content: bytes, where: float) -> bytes:
    """One bit of it inverted, in the byte at `where`, from 0 to 1."""
    index = int(where * len(content))
    return content[:index] + bytes([content[index] ^ 0x10]) + content[index + 1 :]


def cut(content: bytes, where: float) -> bytes:
    """Nothing but zeros from `where` on, and something else than there was in any case."""
    index = int(where * len(content))
    zeros = bytes(len(content) - index)
    return content[:index] + (zeros if content[index:] != zeros else b"\1" + zeros[1:])


def find_chunk(holder: Any, key: ShardKey, index: int) -> Place | None:
    """Where most of a chunk lies in the object store of a holder's host; None if nothing does."""
    chunks: list[list[Place] | None] = ray.get(holder.places.remote(key), timeout=ASK_TIMEOUT_S)
    places = chunks[index] if index < len(chunks) else None
    return max(places, key=lambda one: one.size_bytes) if places else None


def _damage(world: World, planned: Planned, change: Callable[[bytes, float], bytes]) -> Aim | None:
    hosts = world.spare_hosts(1)
    if not hosts:
        return None
    host = pick(hosts, planned.picks[0])
    processes = world.processes_of(host, "Holder")
    if not processes:
        return None
    try:
        holder: Any = ray.get_actor(holder_name(host), NAMESPACE)
        held = ray.get(holder.list_shards.remote(), timeout=ASK_TIMEOUT_S)
        records = sorted((r for r in held if r.key.job == world.job), key=lambda r: r.key)
        if not records:
            return None
        # Newer ones more often: the older a version is, the less anybody needs it.
        record = records[int(planned.picks[1] ** 0.3 * len(records))]
        index = int(planned.picks[2] * len(record.plan.chunk_sizes))
        place = find_chunk(holder, record.key, index)
    except (RayError, ValueError):  # nobody answers: nothing to damage now
        return None
    if place is None:
        return None

    def strike() -> None:
        write_into(processes[0].pid, place, lambda content: change(content, planned.picks[2]))

    target = f"chunk {index} of {record.key} on {host[:8]}"
    return Aim(target, strike, lost=frozenset({host}), step=record.key.version.step)


def flip(world: World, planned: Planned) -> Aim | None:
    """A bit of a pinned chunk flips."""
    return _damage(world, planned, flipped)


def truncate(world: World, planned: Planned) -> Aim | None:
    """The end of a pinned chunk is gone."""
    return _damage(world, planned, cut)


def _crowd(size_bytes: int, for_s: float) -> int:
    """Another job's task: fill the object store of this host, and hold on to it for a while."""
    until_s = time.monotonic() + for_s
    held = []
    for number in range(max(1, size_bytes // PIECE_BYTES)):
        if time.monotonic() > until_s:
            break
        held.append(ray.put(np.full(PIECE_BYTES, number % 251, dtype=np.uint8)))
    time.sleep(max(0.0, until_s - time.monotonic()))
    return len(held)


def store_full(world: World, planned: Planned) -> Aim | None:
    """Another job puts as much as the store has into it: Ray evicts and spills what it can."""
    nodes = [
        (node["NodeID"], int(node["Resources"].get("object_store_memory", 0)))
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0
    ]
    free = [(h, size) for h, size in sorted(nodes) if h not in world.busy]
    if not free:
        return None
    host, size_bytes = free[int(planned.picks[0] * len(free))]

    def strike() -> None:
        where = NodeAffinitySchedulingStrategy(host, soft=False)
        task: Any = ray.remote(_crowd).options(num_cpus=0, max_retries=0, scheduling_strategy=where)
        task.remote(size_bytes, planned.for_s)

    return Aim(f"the object store of {host[:8]}", strike, lambda: None)


MECHANISMS: Mapping[str, Callable[[World, Planned], Aim | None]] = {
    "flip": flip,
    "truncate": truncate,
    "store-full": store_full,
}
