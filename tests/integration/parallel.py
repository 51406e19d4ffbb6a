"""Ranks that live as long as a module's tests, and are a process group of any size for one call."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import tiered

Job = Callable[..., Any]  # job(rank, world_size, *args) -> a picklable result


class Rank:
    """One process; it joins a new process group for each call."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def run(self, job: Job, rank: int, world_size: int, store: str, args: tuple[Any, ...]) -> Any:
        file_store = dist.FileStore(store, world_size)
        dist.init_process_group("gloo", store=file_store, rank=rank, world_size=world_size)
        try:
            return job(rank, world_size, *args)
        finally:
            dist.destroy_process_group()


class Ranks:
    """Up to so many ranks, spread over hosts."""

    def __init__(self, hosts: list[str], count: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.actors = []
        self.calls = 0
        for rank in range(count):
            where = NodeAffinitySchedulingStrategy(hosts[rank % len(hosts)], soft=False)
            actor: Any = ray.remote(Rank).options(num_cpus=0, scheduling_strategy=where)
            self.actors.append(actor.remote())

    def run(self, job: Job, world_size: int, *args: Any) -> list[Any]:
        """What `job` returns on each rank."""
        self.calls += 1
        store = os.path.join(self.folder.name, str(self.calls))
        calls = [
            actor.run.remote(job, rank, world_size, store, args)
            for rank, actor in enumerate(self.actors[:world_size])
        ]
        return ray.get(calls, timeout=150)  # type: ignore[no-any-return]

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        self.folder.cleanup()


# --- a model in every parallelism ---------------------------------------------------------------


class Net(torch.nn.Module):
    """Rows and columns that no number of ranks divides, tied weights, a buffer, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(13, 10)
        self.outer = torch.nn.Linear(10, 13, bias=False)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.outer(torch.relu(self.inner(x))) * self.scale


def build(kind: str, seed: int, world_size: int) -> tuple[Any, torch.optim.Optimizer]:
    """The model of a seed in a parallelism: ddp, fsdp, columns, hsdp (2 x n/2), tp (x fsdp)."""
    torch.manual_seed(seed)
    net: Any = Net()
    if kind == "ddp":
        net = DistributedDataParallel(net)
    elif kind == "fsdp":
        fully_shard(net.inner)
        fully_shard(net)
    elif kind == "columns":
        mesh = init_device_mesh("cpu", (world_size,))
        by_column = net.outer.weight  # 10 of them: FSDP2 cuts only rows unevenly
        fully_shard(net, mesh=mesh, shard_placement_fn=lambda p: Shard(int(p is by_column)))
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("copies", "parts"))
        fully_shard(net, mesh=mesh)
    elif kind == "tp":
        mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("data", "model"))
        plan: Any = {"inner": ColwiseParallel(), "outer": RowwiseParallel()}
        parallelize_module(net, mesh["model"], plan)
        fully_shard(net, mesh=mesh["data"])
    return net, torch.optim.AdamW(net.parameters(), lr=0.1, foreach=False)


def train(net: Any, optimizer: torch.optim.Optimizer) -> None:
    """One step whose result is the same in no two elements."""
    optimizer.zero_grad()
    for number, parameter in enumerate(net.parameters()):
        parameter.grad = parameter.detach() * (number + 1)
    optimizer.step()


def whole(value: Any) -> Any:
    """A state with every DTensor gathered."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().clone()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: whole(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [whole(inner) for inner in value]
    return value


def state_of(net: Any, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, Any]:
    return {
        "net": net,
        "optimizer": optimizer,
        "rng": tiered.RngState(),
        "loader": tiered.PerRank({"position": 100 + rank}),
        "epoch": 3,
    }


def seen(net: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that is the same in every parallelism."""
    plain = net.module if isinstance(net, DistributedDataParallel) else net
    return {"net": whole(plain.state_dict()), "optimizer": whole(optimizer.state_dict())}
