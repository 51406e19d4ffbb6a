"""Which rank this process is, of how many, and in which life of the job.

Asked in this order: what the user passed, the Ray Train context, torch.distributed, the launcher's
environment; else rank 0 of 1.
"""

import os
import sys
import uuid
from dataclasses import dataclass

import torch.distributed as dist

from replication.records import Life, Owner
from tiered.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Worker:
    """One trainer process.

    Attributes:
        rank: From 0.
        world_size: Ranks of the job now.
    """

    rank: int
    world_size: int


def find_worker(rank: int | None, world_size: int | None) -> Worker:
    """Find out who this process is.

    Raises:
        ConfigError: Only one of `rank` and `world_size` was given, or they do not fit.
            Or RANK and WORLD_SIZE of the environment, where they are asked, do not fit.
    """
    if (rank is None) != (world_size is None):
        raise ConfigError("pass both rank= and world_size=, or neither")
    if rank is not None and world_size is not None:
        if type(rank) is not int or type(world_size) is not int or not 0 <= rank < world_size:
            raise ConfigError(
                f"{rank=} must be a whole number of at least 0 and less than {world_size=}"
            )
        return Worker(rank, world_size)
    if worker := _from_ray_train():
        return worker
    if dist.is_available() and dist.is_initialized():
        return Worker(dist.get_rank(), dist.get_world_size())
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _from_environment(os.environ["RANK"], os.environ["WORLD_SIZE"])
    return Worker(0, 1)


def _from_environment(rank: str, world_size: str) -> Worker:
    if rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size):
        return Worker(int(rank), int(world_size))
    raise ConfigError(
        f"the environment has RANK={rank!r} and WORLD_SIZE={world_size!r}: RANK must be a whole "
        "number of at least 0 and less than WORLD_SIZE; unset both, or pass rank= and world_size="
    )


def _from_ray_train() -> Worker | None:
    if "ray.train" not in sys.modules:
        return None
    import ray.train

    try:
        context = ray.train.get_context()
        return Worker(context.get_world_rank(), context.get_world_size())
    except RuntimeError:  # not inside of a training function
        return None


def ranks_on_host(worker: Worker) -> int:
    """Ranks of the job on this host; all of them, if nobody says how many."""
    count = _local_of_ray_train() or os.environ.get("LOCAL_WORLD_SIZE", "")
    if str(count).isdecimal() and 1 <= int(count) <= worker.world_size:
        return int(count)
    return worker.world_size


def _local_of_ray_train() -> int | None:
    if "ray.train" not in sys.modules:
        return None
    import ray.train

    try:
        return int(ray.train.get_context().get_local_world_size())
    except RuntimeError:  # not inside of a training function
        return None


def new_life(worker: Worker, owner: Owner | None) -> tuple[Life, Owner | None]:
    """Name a new life of the job; a collective.

    Args:
        worker: This rank.
        owner: This process, of rank 0; others' do not count.

    Returns:
        The name of the life and rank 0's process: the same on all ranks.

    Raises:
        ConfigError: There are several ranks and no process group to agree through.
    """
    said: list[tuple[str, Owner | None]] = [(uuid.uuid4().hex, owner)]
    if worker.world_size > 1:
        if not (dist.is_available() and dist.is_initialized()):
            raise ConfigError(
                f"{worker.world_size} ranks have to agree on one beginning: call "
                "torch.distributed.init_process_group() before restore() and save()"
            )
        dist.broadcast_object_list(said, src=0)
    name, agreed = said[0]
    return Life(name), agreed
