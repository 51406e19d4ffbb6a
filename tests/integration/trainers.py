"""Trainers as actors on chosen hosts, so that a test decides who runs and dies where."""

import os
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import tiered

MIB = 1 << 20


def make_state(seed: int, size_bytes: int = 3 * MIB, frozen: int = 0) -> dict[str, Any]:
    """Tensors of several dtypes and some values, different for each seed.

    Beside them, as a base model whose adapter trains, `frozen` layers of a MiB that never change.
    """
    base = {
        f"layers.{i}": torch.full((MIB // 2,), i / 8, dtype=torch.bfloat16) for i in range(frozen)
    }
    generator = torch.Generator().manual_seed(seed)
    floats = size_bytes // 8
    return {
        "weight": torch.randn(floats, generator=generator),
        "half": torch.randn(floats // 2, 2, generator=generator).to(torch.bfloat16),
        "count": torch.tensor(seed),
        **({"base": base} if base else {}),
        "nested": {"lr": seed / 3, "name": f"seed {seed}", "betas": (0.9, [seed])},
    }


def is_same(one: Any, other: Any) -> bool:
    """Bit-equal, structure and types included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


class Trainer:
    """One rank. Each method runs in the actor's process."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.state: dict[str, Any] = {}
        self.handles: dict[int, tiered.SaveHandle] = {}

    def listen(self) -> int:
        """The port of the process group's store, which rank 0 has: one that nobody else took."""
        self.store = self._store(0)
        return self.store.port

    def join(self, port: int) -> None:
        """Make the process group."""
        store = self._store(port) if self.rank else self.store
        torch.distributed.init_process_group(
            "gloo", store=store, rank=self.rank, world_size=self.world_size
        )

    def _store(self, port: int) -> torch.distributed.TCPStore:
        return torch.distributed.TCPStore(
            "127.0.0.1", port, self.world_size, is_master=self.rank == 0, wait_for_workers=False
        )

    def pid(self) -> int:
        return os.getpid()

    def start(
        self, job: str, settings: dict[str, Any], seed: int, **wanted: Any
    ) -> tuple[int, tiered.Restored | None]:
        """Make a checkpointer and restore; returns what restore did."""
        self.shape = (settings.pop("state_bytes", 3 * MIB), settings.pop("frozen", 0))
        self.state = make_state(seed, *self.shape)
        self.checkpointer = tiered.Checkpointer(
            job, rank=self.rank, world_size=self.world_size, **settings
        )
        return self.checkpointer.restore(self.state, **wanted), self.checkpointer.restored

    def save(self, step: int, seed: int, level: str | None = "replicated") -> dict[str, float]:
        """Save the state of `seed` as `step`; returns the levels reached."""
        self.state = make_state(seed, *self.shape)
        handle = self.checkpointer.save(step, self.state, force=True)
        assert handle is not None
        self.handles[step] = handle
        if level is not None:
            handle.wait(level, timeout_s=60)  # type: ignore[arg-type]
        return dict(handle.levels)

    def try_save(self, step: int, seed: int, **options: Any) -> tuple[str, float]:
        """Save if due; returns why it gets no safer, if that is known at once, and the stall."""
        self.state = make_state(seed, *self.shape)
        handle = self.checkpointer.save(step, self.state, **options)
        assert handle is not None
        self.handles[step] = handle
        return str(handle.error or ""), handle.stall_s

    def save_what_is_due(self, steps: range) -> list[int]:
        """Run these steps; returns those that were saved, each committed before the next step."""
        saved = []
        for step in steps:
            self.state["count"] = torch.tensor(step)
            handle = self.checkpointer.save(step, self.state)
            if handle is not None and not handle.error:
                handle.wait("replicated", timeout_s=60)
                saved.append(step)
        return saved

    def stalls(self, steps: range) -> list[float]:
        """Save each of these steps, committed before the next one; how long training stood still.

        The state is the last one saved, but for its count.
        """
        found = []
        for step in steps:
            self.state["count"] = torch.tensor(step)
            handle = self.checkpointer.save(step, self.state)
            assert handle is not None
            self.handles[step] = handle
            handle.wait("replicated", timeout_s=60)
            found.append(handle.stall_s)
        return found

    def counters(self) -> tuple[int, tuple[tiered.DegradedStep, ...]]:
        """Skipped saves, and what is known to be degraded."""
        return self.checkpointer.skipped, self.checkpointer.degraded

    def wait(self, step: int, level: str) -> dict[str, float]:
        return dict(self.handles[step].wait(level, timeout_s=60).levels)  # type: ignore[arg-type]

    def has(self, seed: int) -> bool:
        """Whether the state is now that of `seed`."""
        return is_same(self.state, make_state(seed, *self.shape))

    def close(self) -> None:
        self.checkpointer.close()


def start_trainers(hosts: list[str], **options: Any) -> list[Any]:
    """One trainer on each of `hosts`, rank by rank; returns before they have joined each other."""
    actors = []
    for rank, host in enumerate(hosts):
        where = NodeAffinitySchedulingStrategy(host, soft=False)
        actor: Any = ray.remote(Trainer).options(num_cpus=0, scheduling_strategy=where, **options)
        actors.append(actor.remote(rank, len(hosts)))
    if len(actors) > 1:
        port = actors[0].listen.remote()
        for actor in actors:
            actor.join.remote(port)
    return actors
