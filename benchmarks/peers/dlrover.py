"""DLRover Flash Checkpoint: one copy into shared memory, in place; its saver started by rank 0.

Without replicas: with `replica_count=2` this version's `load_checkpoint` returns nothing from
memory, even when nothing was lost. Usually `dlrover-run` owns the memory and outlives the trainer;
here the trainer's own saver does, so a restore is in the same process.

Its saver listens before its queue is there, and a message that comes in between is lost, so that
on a busy machine it waits for a minute and fails; `_patient` comes a little later.
"""

import os
import time
from pathlib import Path
from typing import Any

import torch
from dlrover.python.common import multi_process
from dlrover.trainer.torch.flash_checkpoint import engine
from dlrover.trainer.torch.flash_checkpoint.checkpointer import StorageType
from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer

from benchmarks.peers.adapter import Tensors

LISTENING_S = 0.5
_wait_socket_server = engine.wait_socket_server


def _patient(server: Any, timeout: float = 60) -> None:
    _wait_socket_server(server, timeout)
    time.sleep(LISTENING_S)


class Dlrover:
    """See Adapter."""

    def open(self, tensors: Tensors, folder: str, rank: int, ranks: int) -> None:
        """See Adapter."""
        del rank
        os.environ.update(TORCHELASTIC_RUN_ID=Path(folder).name, GROUP_RANK="0")
        os.environ.update(GROUP_WORLD_SIZE="1", NODE_RANK="0", NODE_NUM="1")
        multi_process.SOCKET_TMP_DIR = f"{folder}/"
        engine.wait_socket_server = _patient
        self._tensors = tensors
        self._checkpointer = DdpCheckpointer(
            f"{folder}/checkpoints", local_shard_num=ranks, global_shard_num=ranks
        )

    def save(self, step: int) -> None:
        """See Adapter."""
        self._checkpointer.save_checkpoint(
            step, dict(self._tensors), storage_type=StorageType.MEMORY
        )

    def finish(self) -> None:
        """See Adapter."""

    def restore(self, step: int) -> None:
        """See Adapter."""
        del step
        loaded = self._checkpointer.load_checkpoint()
        if not loaded:
            raise RuntimeError("load_checkpoint() returned nothing from memory")
        torch._foreach_copy_(list(self._tensors.values()), [loaded[name] for name in self._tensors])

    def forget(self, step: int) -> None:
        """See Adapter; it keeps one step, overwritten in place."""
