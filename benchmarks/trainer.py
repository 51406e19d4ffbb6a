"""A trainer of ours: one rank, as a Ray actor on a chosen host, that holds a state and saves it."""

import logging
import os
import time
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import tiered
from benchmarks import state
from benchmarks.state import StateSpec

SAVE_TIMEOUT_S = 180.0


class Trainer:
    """One rank. Each method runs in the actor's process."""

    def pid(self) -> int:
        """Of the process."""
        return os.getpid()

    def prepare(
        self, spec: dict[str, Any], rank: int, world: int, port: int, *, mine: bool
    ) -> None:
        """Join the process group and have a state: one's own, or something to fill."""
        torch.set_num_threads(1)  # as launchers set it; see benchmarks.limits
        logging.getLogger("tiered").setLevel(logging.INFO)
        assert tiered.Checkpointer is not None  # imported when first used: now, not while measured
        if world > 1:
            address = f"tcp://127.0.0.1:{port}"
            dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
        self._spec, self._rank, self._world = StateSpec.from_dict(spec), rank, world
        make = state.make(self._spec, rank) if mine else state.make_other(self._spec)
        self._tensors = make
        self._handle: tiered.SaveHandle | None = None

    def restore(self, job: str, memory: dict[str, Any]) -> dict[str, Any]:
        """Connect and restore, or begin; how long which part took."""
        began_s = time.monotonic()
        self._checkpointer = tiered.Checkpointer(
            job, memory=tiered.Memory(**memory), rank=self._rank, world_size=self._world
        )
        connected_s = time.monotonic()
        current = {"tensors": self._tensors, "step": -1}
        self._checkpointer.restore(current)
        ended_s = time.monotonic()
        done = self._checkpointer.restored
        return {
            "connect_s": connected_s - began_s,
            "whole_s": ended_s - connected_s,
            "seconds": done.seconds if done is not None else 0.0,
            "source": done.source if done is not None else "",
            "step": done.step if done is not None else -1,
        }

    def stamp(self, step: int, share: float) -> None:
        """Change the state, as training would."""
        state.stamp(self._tensors, step, share)

    def save(self, step: int) -> dict[str, float]:
        """Save; returns when it is replicated."""
        began_s = time.monotonic()
        handle = self._checkpointer.save(step, {"tensors": self._tensors, "step": step}, force=True)
        assert handle is not None
        levels = handle.wait("replicated", timeout_s=SAVE_TIMEOUT_S).levels
        return {
            "began_s": began_s,
            "stall_s": handle.stall_s,
            "staged_s": levels["staged"],
            "replicated_s": levels["replicated"],
            "size_bytes": handle.size_bytes,
        }

    def difference(self, step: int, share: float, frozen_step: int) -> str | None:
        """How the state is not that of `step`, or None."""
        return state.first_difference(
            self._tensors, self._spec, self._rank, step, share, frozen_step
        )


def start_trainers(hosts: list[str]) -> list[Any]:
    """One trainer on each of `hosts`, which may name a host several times; rank by rank."""
    actors = []
    for host in hosts:
        where = NodeAffinitySchedulingStrategy(host, soft=False)
        actor: Any = ray.remote(Trainer).options(num_cpus=0, scheduling_strategy=where)
        actors.append(actor.remote())
    return actors
