"""Amazon SageMaker's tiered checkpointing client, its closed daemon replaced by a discarding one.

So this is the client's own cost: serialising, hashing, and posting over HTTP. What the daemon does,
storing and replicating, is not in it, and nothing can be restored.
"""

import functools
import logging
import subprocess
import sys
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from amzn_sagemaker_checkpointing.checkpointing.filesystem import storage_base
from amzn_sagemaker_checkpointing.checkpointing.filesystem.filesystem import (
    SageMakerTieredStorageWriter,
)
from amzn_sagemaker_checkpointing.config.in_memory_client import InMemoryClientConfig
from amzn_sagemaker_checkpointing.config.sagemaker_checkpoint_config import (
    SageMakerCheckpointConfig,
)
from amzn_sagemaker_checkpointing.storage.clients.inmemory import inmemory_client
from amzn_sagemaker_checkpointing.utils.logging_utils import SageMakerCheckpointingLoggerAdapter

from benchmarks.peers.adapter import Tensors, UnavailableError


class SageMaker:
    """See Adapter."""

    def open(self, tensors: Tensors, folder: str, rank: int, ranks: int) -> None:
        """See Adapter."""
        del folder
        self._state = {f"rank{rank}.{name}": tensor for name, tensor in tensors.items()}
        address = [""]
        if rank == 0:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.peers.discarding_server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert self._server.stdout is not None
            address = [self._server.stdout.readline().strip()]
        dist.broadcast_object_list(address, src=0)
        # The address is fixed in the library, and it logs into /var/log.
        inmemory_client.InMemoryClientConfig = functools.partial(
            InMemoryClientConfig, base_url=address[0]
        )
        quiet = logging.getLogger("benchmark-sagemaker")
        quiet.setLevel(logging.ERROR)
        storage_base._TieredStorageBase._setup_logger = staticmethod(
            lambda *_: SageMakerCheckpointingLoggerAdapter(quiet, {})
        )
        self._config = SageMakerCheckpointConfig(namespace="benchmark", world_size=ranks)
        self._group = dist.new_group(backend="gloo")
        self._future: Any = None

    def save(self, step: int) -> None:
        """See Adapter; as the documentation has it."""
        writer = SageMakerTieredStorageWriter(self._config, step=step)
        self._future = dcp.async_save(self._state, storage_writer=writer, process_group=self._group)

    def finish(self) -> None:
        """See Adapter."""
        getattr(self._future, "upload_completion", self._future).result()

    def restore(self, step: int) -> None:
        """See Adapter."""
        raise UnavailableError("the server discards")

    def forget(self, step: int) -> None:
        """See Adapter; nothing was kept."""
