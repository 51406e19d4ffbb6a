"""NVIDIA Resiliency Extension: local checkpoints in tmpfs, copied within cliques of two ranks.

It asks for CUDA tensors in two places, which `OnCpu` leaves out; what it does is the same.
"""

from typing import Any

import torch
from nvidia_resiliency_ext.checkpointing.local.basic_state_dict import (
    BasicTensorAwareStateDict,
)
from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import (
    LocalCheckpointManager,
)
from nvidia_resiliency_ext.checkpointing.local.replication.strategies import (
    CliqueReplicationStrategy,
)

from benchmarks.peers.adapter import Tensors


class OnCpu(BasicTensorAwareStateDict):
    """The same state, of CPU tensors."""

    def __init__(self, state_dict: dict[str, Any]) -> None:
        self.state_dict = state_dict
        self._is_hollow = False

    def restore_tensor_device(self, non_blocking: bool = True) -> None:
        """Leave the tensors on the CPU."""


class NvidiaLocal:
    """See Adapter."""

    def open(self, tensors: Tensors, folder: str, rank: int, ranks: int) -> None:
        """See Adapter."""
        del rank, ranks
        self._tensors = tensors
        strategy = CliqueReplicationStrategy.from_replication_params(
            replication_jump=1, replication_factor=2
        )
        self._manager = LocalCheckpointManager(f"{folder}/local", repl_strategy=strategy)

    def save(self, step: int) -> None:
        """See Adapter; `is_async` needs CUDA, and replicates before it returns as well."""
        self._manager.save(OnCpu(dict(self._tensors)), step)

    def finish(self) -> None:
        """See Adapter."""

    def restore(self, step: int) -> None:
        """See Adapter."""
        if (found := self._manager.find_latest()) != step:
            raise RuntimeError(f"find_latest() is {found}, not {step}")
        loaded, _ = self._manager.load()
        torch._foreach_copy_(
            list(self._tensors.values()), [loaded.state_dict[name] for name in self._tensors]
        )

    def forget(self, step: int) -> None:
        """See Adapter; it keeps one step and deletes the one before."""
