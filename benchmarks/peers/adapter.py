"""What an adapter does, and the process that runs it: one rank of a peer."""

import importlib
import os
import time
from typing import Any, Protocol

import torch
import torch.distributed as dist

from benchmarks import state
from benchmarks.state import StateSpec

Tensors = dict[str, torch.Tensor]


class UnavailableError(Exception):
    """A peer cannot run here; says why."""


class Adapter(Protocol):
    """One rank. Expect `open`, then any number of `save` with its `finish`, and `restore`."""

    def open(self, tensors: Tensors, folder: str, rank: int, ranks: int) -> None:
        """Get ready.

        Args:
            tensors: The state that will be saved or filled, in place, by all later calls.
            folder: In tmpfs, the same for all ranks, and after a restart.
            rank: Of this process; the process group is initialised, gloo.
            ranks: In all.

        Raises:
            UnavailableError: This cannot work here.
        """

    def save(self, step: int) -> None:
        """Save the tensors; returns when training may go on and change them."""

    def finish(self) -> None:
        """Return when the save is complete."""

    def restore(self, step: int) -> None:
        """Fill the tensors with those of the step that was saved last."""

    def forget(self, step: int) -> None:
        """Delete what an older step left, if the peer does not do so; not measured."""


class Rank:
    """Serves an adapter's calls; see `benchmarks.worker`."""

    def prepare(
        self,
        adapter: str,
        spec: dict[str, Any],
        rank: int,
        ranks: int,
        port: int,
        folder: str,
        mine: bool,
    ) -> None:
        """Join the process group, have a state, and open the adapter."""
        torch.set_num_threads(1)  # as launchers set it; see benchmarks.limits
        self._spec, self._rank, self._ranks = StateSpec.from_dict(spec), rank, ranks
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
        os.environ.update(LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
        os.environ.update(MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
        make = state.make(self._spec, rank) if mine else state.make_other(self._spec)
        self._tensors = make
        module, _, name = adapter.partition(":")
        self._adapter: Adapter = getattr(importlib.import_module(module), name)()
        self._adapter.open(self._tensors, folder, rank, ranks)

    def stamp(self, step: int, share: float) -> None:
        """Change the state, as training would."""
        state.stamp(self._tensors, step, share)

    def save(self, step: int) -> dict[str, float]:
        """Save and finish; when it began, could go on, and was complete."""
        began_s = time.monotonic()
        self._adapter.save(step)
        returned_s = time.monotonic()
        self._adapter.finish()
        return {"began_s": began_s, "returned_s": returned_s, "complete_s": time.monotonic()}

    def forget(self, step: int) -> None:
        """See Adapter."""
        self._adapter.forget(step)

    def overwrite(self) -> None:
        """Spoil the state, so that a restore has something to do."""
        for tensor in self._tensors.values():
            state.raw(tensor).fill(1)

    def restore(self, step: int) -> dict[str, float]:
        """Restore; when it began and ended."""
        began_s = time.monotonic()
        self._adapter.restore(step)
        return {"began_s": began_s, "ended_s": time.monotonic()}

    def difference(self, step: int) -> str | None:
        """How the state is not that of `step`, or None."""
        return state.first_difference(self._tensors, self._spec, self._rank, step)
