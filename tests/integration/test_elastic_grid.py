"""Saved by N ranks, loaded by M, from memory, from S3, and from both where hosts were lost.

N ranks save for real. Every rank of every M then reads its part in this process: what it holds is
made under torch's fake process group, in which each rank has its shapes and talks to nobody.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, zeros
from torch.testing._internal.distributed.fake_pg import FakeStore

import tiered
from chaos.local_cluster import LocalCluster
from tests.integration.parallel import Ranks
from tests.waiting import wait_for
from tiered.recovered import Recovered
from tiered.restore import restore_into
from tiered.saved_step import SavedStep
from tiered.state import place_of

pytestmark = pytest.mark.cluster

CHUNK_BYTES = 4096
MEMORY = tiered.Memory(1, 2, 0, CHUNK_BYTES, prepare=False)
S3 = tiered.S3("s3://tests/grid", every_steps=1)
NAMES = ["rows", "columns", "square", "copies", "to_fsdp", "to_dp", "big"]
ROWS, COLUMNS = 131, 13  # primes: no number of ranks divides them


def whole(name: str) -> torch.Tensor:
    """The same in no two elements of no two tensors."""
    start = 100_000 * NAMES.index(name)
    shape = (1024, 64) if name == "big" else (ROWS, COLUMNS)
    return torch.arange(shape[0] * shape[1], dtype=torch.float64).reshape(shape) + start


def state_on(world_size: int, *, is_loading: bool) -> dict[str, Any]:
    """Tensors in every sharding that a world has; the loading one has others than the saving."""
    flat = init_device_mesh("cpu", (world_size,))
    by_rows, by_columns = (flat, [Shard(0)]), (flat, [Shard(1)])
    square, copies = by_rows, by_columns
    if world_size % 2 == 0:
        mesh = init_device_mesh("cpu", (2, world_size // 2))
        square, copies = (mesh, [Shard(0), Shard(1)]), (mesh, [Replicate(), Shard(0)])
    places = {"rows": by_rows, "columns": by_columns, "square": square, "copies": copies}
    if is_loading:
        places = dict(zip(places, (by_columns, by_rows, copies, square), strict=True))
    places |= {"big": by_rows, "to_fsdp" if is_loading else "to_dp": by_rows}
    state: dict[str, Any] = dict.fromkeys(NAMES)
    for name in NAMES:
        value = torch.zeros_like(whole(name)) if is_loading else whole(name)
        if name not in places:
            state[name] = value  # as data parallelism has it
            continue
        where, how = places[name]
        if is_loading:
            state[name] = zeros(value.shape, dtype=value.dtype, device_mesh=where, placements=how)
        else:
            state[name] = distribute_tensor(value, where, how)
    return state | {"epoch": 0 if is_loading else 3}


def save(rank: int, world_size: int, job: str) -> None:
    state = state_on(world_size, is_loading=False)
    state["own"] = {"rank": rank}
    with tiered.Checkpointer(job, MEMORY, S3) as ckpt:
        ckpt.restore({}, strict=False)
        handle = ckpt.save(5, state)
        assert handle is not None
        handle.wait("durable")


@contextlib.contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def check(found: Recovered, rank: int, world_size: int) -> SavedStep:
    """Load one rank's part, compare it with the whole, and with how much had to be read."""
    with fake_rank(rank, world_size):
        state = state_on(world_size, is_loading=True)
        state["own"] = {"rank": -1}
        step = found.open()
        restore_into(state, step, rank, world_size)
        need_bytes = 0
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                continue
            local, part = value, whole(name)
            if isinstance(value, DTensor):
                local, offsets = value.to_local(), place_of(value)
                ends = (a + n for a, n in zip(offsets, local.shape, strict=True))
                part = part[tuple(map(slice, offsets, ends))]
            assert torch.equal(local, part), (name, rank, world_size, str(step))
            need_bytes += local.nbytes if name == "big" else whole(name).nbytes
        assert state["epoch"] == 3
        assert state["own"]["rank"] == rank % step.world_size
    fronts = sum(reader.sources.record.plan.chunk_sizes[0] for reader in step.readers)
    pieces = 6 * step.world_size  # each may begin and end in the middle of a chunk
    read_bytes = sum(step.bytes_by_label.values())
    assert read_bytes <= 2 * fronts + need_bytes + 2 * pieces * CHUNK_BYTES
    return step


def labels(found: Recovered, world_sizes: list[int]) -> set[str]:
    seen: set[str] = set()
    for world_size in world_sizes:
        for rank in range(world_size):
            seen |= {k for k, n in check(found, rank, world_size).bytes_by_label.items() if n}
    return seen


def only_on_s3(job: str) -> list[int]:
    """Ranks of whose shards no memory has a copy any more."""
    sources = tiered.recover(job).sources
    return [rank for rank, places in sources.items() if places == ("S3",)]


def check_grid(cluster: LocalCluster, job: str, saved: list[int], loaded: list[int]) -> None:
    jobs = {count: f"{job}-{count}" for count in saved}
    ranks = Ranks(cluster.hosts, max(saved))
    try:
        for count, name in jobs.items():
            ranks.run(save, count, name)
    finally:
        ranks.close()
    try:
        for name in jobs.values():
            assert "S3" not in labels(tiered.recover(name), loaded)
            assert labels(tiered.recover(S3.uri, job=name), loaded) == {"S3"}
        cluster.kill_host(cluster.hosts[1])
        for count, name in jobs.items():
            lost = list(range(1, count, 3))  # rank r is on host r mod 3
            wait_for(lambda name=name, lost=lost: only_on_s3(name) == lost, 30.0)
            assert ("S3" in labels(tiered.recover(name), loaded)) == bool(lost)
    finally:
        for name in jobs.values():
            tiered.forget(name)
        while len(cluster.hosts) < 3:
            cluster.add_host()


def test_some_numbers_of_ranks_to_others_from_every_tier(cluster: LocalCluster, job: str) -> None:
    check_grid(cluster, job, saved=[1, 4, 5], loaded=[1, 3, 8])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_number_of_ranks_to_every_other_from_every_tier(
    cluster: LocalCluster, job: str
) -> None:
    check_grid(cluster, job, saved=list(range(1, 9)), loaded=list(range(1, 9)))
