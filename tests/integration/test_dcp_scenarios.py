"""What PyTorch's own tests of its distributed checkpoint ask of a storage, asked of ours.

The situations are those of torch's test/distributed/checkpoint that depend on where the bytes go:
placements and meshes that change, sharded tensors, objects of each rank, partial loads, whole
training states of each parallelism, asynchronous saves from a thread and from a process.
"""

import io
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard, distribute_tensor, zeros

import tiered
from chaos.local_cluster import LocalCluster
from tests.integration.parallel import Ranks, build, seen, train
from tests.integration.trainers import is_same

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore:.*ShardedTensor.*:FutureWarning"),
]

MEMORY = tiered.Memory(every_steps=1, keep=2, replicas=1, chunk_bytes=4096, prepare=False)


@pytest.fixture(scope="module")
def ranks(cluster: LocalCluster) -> Iterator[Ranks]:
    running = Ranks(cluster.hosts, 4)
    yield running
    running.close()


def save(job: str, state: dict[str, Any], step: int = 1, **options: Any) -> None:
    with tiered.Checkpointer(job, MEMORY, None) as ckpt:
        ckpt.begin_reading()
        writer = tiered.StorageWriter(ckpt, until="replicated")
        dcp.save(state, checkpoint_id=f"run/step-{step}", storage_writer=writer, **options)


def load(job: str, state: dict[str, Any], **options: Any) -> tiered.StorageReader:
    with tiered.Checkpointer(job, MEMORY, None) as ckpt:
        reader = tiered.StorageReader(ckpt)
        dcp.load(state, storage_reader=reader, **options)
    return reader


# --- placements, meshes, sharded tensors --------------------------------------------------------

ONE_D = ([Shard(0)], [Replicate()], [Shard(1)])
TWO_D = list(itertools.product([Replicate(), Shard(0), Shard(1)], repeat=2))
SHAPE = (7, 5)  # no number of ranks divides it


def meshes(world_size: int) -> list[tuple[DeviceMesh, Any]]:
    flat = init_device_mesh("cpu", (world_size,))
    square = init_device_mesh("cpu", (2, world_size // 2)) if world_size % 2 == 0 else None
    found: list[tuple[DeviceMesh, Any]] = [(flat, places) for places in ONE_D]
    return found + [(square, places) for places in TWO_D if square is not None]


def values() -> torch.Tensor:
    return torch.arange(35.0).reshape(SHAPE)


def save_placements(rank: int, world_size: int, job: str) -> None:
    state = {
        f"t{n}": distribute_tensor(values() + n, mesh, places)
        for n, (mesh, places) in enumerate(meshes(world_size))
    }
    save(job, {"tensors": state})


def load_placements(rank: int, world_size: int, job: str, count: int) -> int:
    checked = 0
    with tiered.Checkpointer(job, MEMORY, None) as ckpt:
        reader = tiered.StorageReader(ckpt)  # serves all loads
        for mesh, places in meshes(world_size):
            names = [f"t{n}" for n in range(count)]
            state = {name: zeros(SHAPE, device_mesh=mesh, placements=places) for name in names}
            dcp.load({"tensors": state}, storage_reader=reader)
            for n, name in enumerate(names):
                assert torch.equal(state[name].full_tensor(), values() + n), (n, places, rank)
                checked += 1
    return checked


def test_every_placement_is_loaded_into_every_other(ranks: Ranks, job: str) -> None:
    ranks.run(save_placements, 4, job)
    count = len(ONE_D) + len(TWO_D)
    assert ranks.run(load_placements, 3, job, count) == [3 * count] * 3
    assert ranks.run(load_placements, 4, job, count) == [count * count] * 4


def save_on_some(rank: int, world_size: int, job: str) -> None:
    """A tensor that only ranks 0 and 2 have a part of."""
    mesh = DeviceMesh("cpu", [0, 2])
    tensor = distribute_tensor(values(), mesh, [Shard(0)])
    save(job, {"part": tensor, "all": torch.ones(2) * rank})


def load_on_some(rank: int, world_size: int, job: str) -> Any:
    mesh = DeviceMesh("cpu", [1, 2])
    state = {"part": zeros(SHAPE, device_mesh=mesh, placements=[Shard(1)]), "all": torch.zeros(2)}
    load(job, state)
    return state["part"].to_local().clone(), state["all"].tolist()


def test_a_tensor_on_some_ranks_only(ranks: Ranks, job: str) -> None:
    ranks.run(save_on_some, 4, job)
    found = ranks.run(load_on_some, 4, job)
    assert torch.equal(torch.cat([found[1][0], found[2][0]], dim=1), values())
    assert [own for _, own in found] == [[rank, rank] for rank in range(4)]


def chunked(rank: int, world_size: int, dim: int) -> Any:
    places = [f"rank:{n}/cpu" for n in range(world_size)]
    spec = ChunkShardingSpec(dim=dim, placements=places)  # type: ignore[arg-type]
    return sharded_tensor.zeros(spec, 8, 6)


def save_sharded(rank: int, world_size: int, job: str) -> None:
    tensor, plain = chunked(rank, world_size, 0), torch.arange(48.0).reshape(8, 6)
    for shard in tensor.local_shards():
        offsets, sizes = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        part = plain[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))]
        shard.tensor.copy_(part)
    save(job, {"sharded": tensor, "plain": plain})


def load_sharded(rank: int, world_size: int, job: str) -> None:
    whole = torch.arange(48.0).reshape(8, 6)
    state = {"sharded": chunked(rank, world_size, 1), "plain": torch.zeros(8, 6)}
    load(job, state)
    for shard in state["sharded"].local_shards():
        offsets, sizes = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        part = whole[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))]
        assert torch.equal(shard.tensor, part)
    assert torch.equal(state["plain"], whole)
    swapped = {"sharded": torch.zeros(8, 6), "plain": chunked(rank, world_size, 0)}
    load(job, swapped)
    assert torch.equal(swapped["sharded"], whole)
    mine = swapped["plain"].local_shards()[0]
    start = mine.metadata.shard_offsets[0]
    assert torch.equal(mine.tensor, whole[start : start + len(mine.tensor)])


def test_sharded_tensors_by_rows_by_columns_and_as_plain_ones(ranks: Ranks, job: str) -> None:
    ranks.run(save_sharded, 2, job)
    ranks.run(load_sharded, 2, job)


# --- objects of each rank, keys in another order, parts of a step -------------------------------


def save_objects(rank: int, world_size: int, job: str) -> None:
    mine = {f"key{n}": n for n in range(5)}
    order = list(mine) if rank % 2 else list(mine)[::-1]
    state = {
        "same": {key: mine[key] for key in order},
        "rng": torch.get_rng_state(),
        "loader": {"seen": [rank] * 3, "file": io.BytesIO(bytes([rank]))},
        "replicated": torch.arange(10.0),
    }
    keys = list(state) if rank % 2 else list(state)[::-1]
    torch.manual_seed(rank)
    state["rng"] = torch.get_rng_state()
    save(job, {key: state[key] for key in keys})


def load_objects(rank: int, world_size: int, job: str) -> Any:
    state = {
        "replicated": torch.zeros(10),
        "loader": {"seen": [0] * 3, "file": io.BytesIO()},
        "rng": torch.zeros_like(torch.get_rng_state()),
        "same": {f"key{(n + rank) % 5}": -1 for n in range(5)},
    }
    reader = load(job, state)
    torch.set_rng_state(state["rng"])  # type: ignore[arg-type]
    loader: Any = state["loader"]
    assert state["same"] == {f"key{n}": n for n in range(5)}
    assert torch.equal(state["replicated"], torch.arange(10.0))  # type: ignore[arg-type]
    return loader["seen"], loader["file"].read(), torch.initial_seed(), reader.unexpected


def test_each_rank_gets_its_own_objects_whatever_the_order_of_the_keys(
    ranks: Ranks, job: str
) -> None:
    ranks.run(save_objects, 4, job)
    found = ranks.run(load_objects, 4, job)
    for rank, (own, file, seed, unexpected) in enumerate(found):
        assert (own, file, seed, unexpected) == ([rank] * 3, bytes([rank]), rank, ())


def local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def load_parts(rank: int, world_size: int, job: str) -> None:
    net, _ = build("fsdp", 2, world_size)
    model_state = get_model_state_dict(net)
    before = {key: local(value).clone() for key, value in model_state.items()}

    def is_untouched() -> bool:
        return is_same(before, {key: local(value) for key, value in model_state.items()})

    wrong = {"model": {**model_state, "more": torch.zeros(2), "less": torch.zeros(1)}}
    wrong["model"]["scale"] = zeros((3,), device_mesh=init_device_mesh("cpu", (world_size,)))
    with pytest.raises(CheckpointException) as caught:
        load(job, wrong)
    for problem, _ in caught.value.failures.values():
        for text in ("model.more", "model.less", "model.scale: was saved with shape [1]"):
            assert text in str(problem)
    assert len(caught.value.failures) == world_size
    assert is_untouched()

    planner = DefaultLoadPlanner(allow_partial_load=True)
    more = {"model": {**model_state, "more": torch.zeros(2)}}
    reader = load(job, more, planner=planner)
    assert reader.missing == ("model.more",)
    assert "optim.state.outer.weight.exp_avg" in reader.unexpected
    assert not is_untouched()


def read_keys(rank: int, world_size: int, job: str) -> Any:
    with tiered.Checkpointer(job, MEMORY, None) as ckpt:
        reader = tiered.StorageReader(ckpt)
        model = _load_state_dict_from_keys("model", storage_reader=reader)
        state = _load_state_dict_from_keys({"optim.state"}, storage_reader=reader)
    return model, state


def save_training(rank: int, world_size: int, job: str, kind: str) -> Any:
    net, optimizer = build(kind, 1, world_size)
    train(net, optimizer)
    expected = seen(net, optimizer)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    save(job, {"model": model_state, "optim": optimizer_state})
    return expected


def test_parts_of_a_step_are_loaded_and_all_that_is_wrong_is_said_at_once(
    ranks: Ranks, job: str
) -> None:
    expected = ranks.run(save_training, 4, job, "fsdp")[0]
    ranks.run(load_parts, 3, job)
    model, state = ranks.run(read_keys, 1, job)[0]
    assert list(model) == ["model"]
    assert is_same(model["model"], dict(expected["net"]))
    assert list(state["optim"]) == ["state"]
    first = state["optim"]["state"]["scale"]["exp_avg"]
    assert torch.equal(first, expected["optimizer"]["state"][0]["exp_avg"])


# --- whole training states ----------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net1, self.net2 = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net2(torch.relu(self.net1(x)))


@dataclass
class Progress:
    """A Stateful with everything that a training loop keeps."""

    step: int = 0
    losses: list[float] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        file = io.BytesIO()
        torch.save(self.losses, file)
        return {"step": torch.tensor(self.step, dtype=torch.int32), "losses": file}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = int(state_dict["step"])
        self.losses = torch.load(state_dict["losses"], weights_only=True)


class Whole:
    """A model with its optimizer, as torch's recipes have it: a Stateful over get_state_dict."""

    def __init__(self, net: Any, optimizer: Any, options: StateDictOptions | None) -> None:
        self.net, self.optimizer, self.options = net, optimizer, options

    def state_dict(self) -> dict[str, Any]:
        model, optim = get_state_dict(self.net, self.optimizer, options=self.options)
        return {"model": model, "optim": optim}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(
            self.net, self.optimizer, model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optim"], options=self.options,
        )  # fmt: skip


def learn(net: Any, optimizer: Any, scheduler: Any, progress: Progress, steps: int) -> None:
    for _ in range(steps):
        torch.manual_seed(progress.step)
        loss = net(torch.rand(8, 8)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        progress.step += 1
        progress.losses.append(loss.item())


def training(
    world_size: int, kind: str, options: StateDictOptions | None
) -> tuple[dict[str, Any], Callable[[int], list[float]]]:
    net: Any = Model()
    if kind == "fsdp1":
        mesh = init_device_mesh("cpu", (world_size,))
        net = FullyShardedDataParallel(
            net, device_mesh=mesh, device_id=torch.device("cpu"), use_orig_params=True
        )
    elif kind == "fsdp2":
        fully_shard(net)
    elif kind == "ddp":
        net = torch.nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
    progress = Progress()
    state = {
        "app": Whole(net, optimizer, options), "scheduler": scheduler, "progress": progress
    }  # fmt: skip

    def go_on(steps: int) -> list[float]:
        learn(net, optimizer, scheduler, progress, steps)
        return progress.losses

    return state, go_on


OPTIONS = {"": None, "flattened": StateDictOptions(flatten_optimizer_state_dict=True)}


def train_and_save(rank: int, world_size: int, job: str, kind: str, options: str) -> list[float]:
    state, go_on = training(world_size, kind, OPTIONS[options])
    go_on(3)
    save(job, state, step=2)
    return go_on(3)


def resume(rank: int, world_size: int, job: str, kind: str, options: str) -> list[float]:
    state, go_on = training(world_size, kind, OPTIONS[options])
    load(job, state)
    return go_on(3)


@pytest.mark.parametrize(
    ("kind", "options", "to"),
    [
        ("ddp", "", "fsdp2"),
        pytest.param("fsdp1", "", "fsdp1", marks=pytest.mark.slow),
        pytest.param("fsdp2", "flattened", "fsdp2", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_training_goes_on_as_the_first_one(
    ranks: Ranks, job: str, kind: str, options: str, to: str
) -> None:
    expected = ranks.run(train_and_save, 2, job, kind, options)
    for world_size in (2, 3):
        found = ranks.run(resume, world_size, job, to, options)
        assert found[0] == pytest.approx(expected[0], rel=1e-4)
        assert found[0][:3] == expected[0][:3]


def save_full(rank: int, world_size: int, job: str) -> Any:
    net, optimizer = build("fsdp", 1, world_size)
    train(net, optimizer)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model = get_model_state_dict(net, options=options)
    optim = get_optimizer_state_dict(net, optimizer, options=options)
    assert bool(model) == (rank == 0)
    save(job, {"model": model, "optim": optim})
    return seen(net, optimizer)


def load_full(rank: int, world_size: int, job: str) -> Any:
    net, optimizer = build("fsdp", 2, world_size)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = tiered.recover(job).state_dict() if rank == 0 else {"model": {}, "optim": {}}
    set_model_state_dict(net, state["model"], options=options)
    set_optimizer_state_dict(net, optimizer, state["optim"], options=options)
    return seen(net, optimizer)


def test_full_states_that_only_rank_0_has(ranks: Ranks, job: str) -> None:
    expected = ranks.run(save_full, 3, job)[0]
    for world_size in (1, 4):
        found = ranks.run(load_full, world_size, job)
        for state in found:
            assert is_same(state["net"], expected["net"])
            assert is_same(state["optimizer"]["state"], expected["optimizer"]["state"])


# --- asynchronous saves -------------------------------------------------------------------------

ASYNC = Path(__file__).with_name("dcp_async.py")


@pytest.mark.parametrize("ranks_count", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_async_saves_from_a_thread_and_from_a_process(
    cluster: LocalCluster, job: str, ranks_count: int
) -> None:
    environment = {
        **os.environ, "RAY_ADDRESS": cluster.address, "JOB": job, "OMP_NUM_THREADS": "1"
    }  # fmt: skip
    command = [sys.executable, str(ASYNC)]
    if ranks_count > 1:
        run = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks_count}")
        command = [sys.executable, *run, str(ASYNC)]
    done = subprocess.run(
        command, env=environment, text=True, capture_output=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ways = ["thread", "named", "process"] if ranks_count > 1 else ["thread", "named"]
    lines = re.findall(r"^rank (\d) (\w+): (\d+) (.*)$", done.stdout, re.MULTILINE)
    expected = [
        (str(rank), way, str(step), f"x={step}.0 own={rank}")
        for rank in range(ranks_count)
        for step, way in enumerate(ways)
    ]
    assert sorted(lines) == sorted(expected)
