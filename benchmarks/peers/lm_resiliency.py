"""lm-resiliency: GEMINI by its first author; pairs of trainers exchange copies over gloo."""

import torch
from lm_resiliency.checkpointing.config import InMemoryCkptConfig
from lm_resiliency.checkpointing.manager import InMemoryCheckpointManager

from benchmarks.peers.adapter import Tensors


class LmResiliency:
    """See Adapter."""

    def open(self, tensors: Tensors, folder: str, rank: int, ranks: int) -> None:
        """See Adapter."""
        del rank, ranks
        self._tensors = list(tensors.values())
        config = InMemoryCkptConfig(
            interval=1,
            replication_jump=1,
            disk_flush_interval=0,
            disk_folder=f"{folder}/disk",
            run_id="benchmark",
            pin_memory=False,  # there is no accelerator to copy from
        )
        self._manager = InMemoryCheckpointManager(config)

    def save(self, step: int) -> None:
        """Return once the host copy is done: only then may a CPU tensor be changed."""
        self._manager.save_tensors(self._tensors, step)
        self._manager.maybe_wait()

    def finish(self) -> None:
        """See Adapter."""
        if not self._manager.finalize_replication(timeout_s=120):
            raise RuntimeError("the pair did not finish its exchange")

    def restore(self, step: int) -> None:
        """See Adapter."""
        loaded = self._manager.load_tensors()
        if loaded is None or loaded[1] != step:
            raise RuntimeError(f"load_tensors() has not got step {step}")
        torch._foreach_copy_(self._tensors, loaded[0])

    def forget(self, step: int) -> None:
        """See Adapter; it keeps two steps."""
