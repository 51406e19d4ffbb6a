"""Steps saved by N ranks in one parallelism, loaded by M in another, on a real cluster."""

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import tiered
from chaos.local_cluster import LocalCluster
from tests.integration.parallel import Ranks, build, seen, state_of, train
from tests.integration.trainers import is_same
from tiered.s3 import S3Store

pytestmark = pytest.mark.cluster

MEMORY = tiered.Memory(every_steps=1, keep=2, replicas=1, chunk_bytes=4096, prepare=False)
S3 = tiered.S3("s3://tests/reshard", every_steps=10)

SAVED = [("ddp", 1), ("fsdp", 2), ("ddp", 3), ("hsdp", 4), ("tp", 4), ("columns", 5), ("fsdp", 8)]
LOADED = [("ddp", 1), ("fsdp", 3), ("hsdp", 4), ("columns", 2)]


@pytest.fixture(scope="module")
def ranks(cluster: LocalCluster) -> Iterator[Ranks]:
    running = Ranks(cluster.hosts, 8)
    yield running
    running.close()


def checkpointer(job: str, s3: tiered.S3 | None = None) -> tiered.Checkpointer:
    return tiered.Checkpointer(job, MEMORY, s3)


def save(rank: int, world_size: int, job: str, kind: str, step: int, s3: Any = None) -> Any:
    net, optimizer = build(kind, 1, world_size)
    train(net, optimizer)
    with checkpointer(job, s3) as ckpt:
        ckpt.restore({}, strict=False)
        torch.manual_seed(rank)
        handle = ckpt.save(step, state_of(net, optimizer, rank), force=True)
        assert handle is not None
        handle.wait("durable" if s3 else "replicated")
    return seen(net, optimizer)


def restore(rank: int, world_size: int, job: str, kind: str, is_stepped: bool) -> Any:
    net, optimizer = build(kind, 2, world_size)
    if is_stepped:
        train(net, optimizer)
    state = state_of(net, optimizer, rank)
    state["loader"].value = {"position": -1}
    torch.manual_seed(77)
    with checkpointer(job) as ckpt:
        start = ckpt.restore(state)
        restored = ckpt.restored
    assert restored is not None
    drawn = torch.initial_seed()
    result = seen(net, optimizer)
    train(net, optimizer)  # what was restored can go on
    return start, result, state["loader"].value["position"], drawn, restored.kept


@pytest.mark.parametrize(("kind", "count"), SAVED)
def test_a_step_goes_to_any_number_of_ranks_in_any_parallelism(
    ranks: Ranks, job: str, kind: str, count: int
) -> None:
    expected = ranks.run(save, count, job, kind, 10)[0]
    for number, (to, loaded) in enumerate(LOADED):
        found = ranks.run(restore, loaded, job, to, number % 2 == 0)
        for rank, (start, state, position, drawn, kept) in enumerate(found):
            assert start == 11
            assert is_same(state["net"], expected["net"]), f"{kind} x {count} -> {to} x {loaded}"
            assert is_same(state["optimizer"]["state"], expected["optimizer"]["state"])
            own = rank < count
            assert position == (100 + rank if own else -1)
            assert drawn == (rank if own else 77)
            assert kept == (() if own else ("rng", "loader"))


def test_generations_of_other_world_sizes_follow_each_other(ranks: Ranks, job: str) -> None:
    """Commit, retention and the branch go by the world of each step."""
    for step, count in ((10, 4), (11, 2), (12, 3)):
        expected = ranks.run(save, count, job, "fsdp", step)[0]
    assert tiered.status(job).committed == (12,)
    older = tiered.recover(job, before=12)
    assert (older.step, older.world_size) == (11, 2)
    found = tiered.recover(job)
    assert (found.step, found.world_size) == (12, 3)
    assert is_same(found.state_dict()["net"], expected["net"])


def test_a_step_is_read_from_outside_whole_or_in_parts(
    ranks: Ranks, job: str, cluster: LocalCluster, tmp_path: Path
) -> None:
    expected = ranks.run(save, 4, job, "fsdp", 10, S3)[0]
    by_name = tiered.recover(job)
    on_s3 = tiered.recover(S3.uri, job=job)
    for found in (by_name, on_s3):
        infos = found.keys()
        weight = infos["net.inner.weight"]
        assert (weight.shape, weight.dtype, weight.is_sharded) == ((10, 13), torch.float32, True)
        assert infos["rng.torch"].ranks == (0, 1, 2, 3)
        key = "optimizer.state.0.exp_avg"
        assert torch.equal(found.tensor(key), expected["optimizer"]["state"][0]["exp_avg"])
        state = found.state_dict()
        assert is_same(state["net"], expected["net"])
        assert state["loader"] == {"value": {"position": 100}}
        assert found.state(3)["loader"] == {"value": {"position": 103}}
        model = torch.nn.ModuleDict()
        net, _ = build("", 3, 1)
        model = {"net": net}
        filled = found.load_into(model, world_size=1, strict=False)
        assert filled.unexpected == ("optimizer", "rng", "loader", "epoch")
        assert is_same(dict(net.state_dict()), dict(expected["net"]))
    assert set(on_s3.sources[0]) == {"S3"}
    name = f"reshard/{job}/data/{on_s3.generation:08d}-{10:012d}/rank-00000.safetensors"
    with closing(S3Store(S3, job)) as store:
        body = store.link.client().get_object(Bucket="tests", Key=name)["Body"].read()
    (tmp_path / "rank.safetensors").write_bytes(body)
    with safe_open(tmp_path / "rank.safetensors", framework="pt") as shard:  # as it lies in S3
        mine = on_s3.state(0)["net"]["inner.weight"]
        assert torch.equal(shard.get_tensor("net.inner.weight"), mine)
    script = f"""
        import ray, tiered
        found = tiered.recover({S3.uri!r}, job={job!r})
        assert found.tensor("net.inner.weight").shape == (10, 13)
        assert not ray.is_initialized()
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)


# --- through DCP --------------------------------------------------------------------------------


def dcp_save(rank: int, world_size: int, job: str, kind: str, is_async: bool) -> Any:
    net, optimizer = build(kind, 1, world_size)
    train(net, optimizer)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    state = {"model": model_state, "optim": optimizer_state, "own": {"rank": rank}, "epoch": 3}
    expected = seen(net, optimizer)
    with checkpointer(job) as ckpt:
        writer = tiered.StorageWriter(ckpt, 10, until="replicated")
        if is_async:
            future: Any = dcp.async_save(state, storage_writer=writer)
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.zero_()
            future.result(timeout=60)
        else:
            dcp.save(state, storage_writer=writer)
    return expected


def dcp_load(rank: int, world_size: int, job: str, kind: str) -> Any:
    net, optimizer = build(kind, 2, world_size)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    state = {"model": model_state, "optim": optimizer_state, "own": {"rank": -1}, "epoch": 0}
    with checkpointer(job) as ckpt:
        reader = tiered.StorageReader(ckpt)
        dcp.load(state, storage_reader=reader)
        set_state_dict(
            net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
        )
    steps: list[Any] = [None] * world_size
    dist.all_gather_object(steps, reader.step)
    return seen(net, optimizer), state["own"]["rank"], state["epoch"], steps


@pytest.mark.parametrize(("kind", "count", "is_async"), [("fsdp", 4, False), ("ddp", 2, True)])
def test_dcp_saves_and_loads_in_any_parallelism(
    ranks: Ranks, job: str, kind: str, count: int, is_async: bool
) -> None:
    expected = ranks.run(dcp_save, count, job, kind, is_async)[0]
    for to, loaded in ((kind, count), ("fsdp", 3)):
        for rank, (state, own, epoch, steps) in enumerate(ranks.run(dcp_load, loaded, job, to)):
            assert is_same(state["net"], expected["net"])
            assert is_same(state["optimizer"]["state"], expected["optimizer"]["state"])
            assert (own, epoch, steps) == (rank % count, 3, [10] * loaded)
