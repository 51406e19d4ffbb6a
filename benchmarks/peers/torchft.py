"""torchft: no checkpoint, but the transfer of a live state to another replica (PGTransport, gloo).

Here every rank gives its state to the other rank of its pair, which receives it in place, in warm
memory; a restore is the way back. So it is a bar for moving tensors between processes.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore
from torchft.checkpointing.pg_transport import PGTransport
from torchft.process_group import ProcessGroupGloo

from benchmarks.peers.adapter import Tensors

TIMEOUT = timedelta(seconds=120)


class Torchft:
    """See Adapter."""

    def open(self, tensors: Tensors, folder: str, rank: int, ranks: int) -> None:
        """See Adapter."""
        del folder
        self._own, self._rank, self._mate = tensors, rank, rank ^ 1
        self._held = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
        if rank == 0:
            self._store = TCPStore(
                "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT
            )
        port = [self._store.port if rank == 0 else 0]
        dist.broadcast_object_list(port, src=0)
        group = ProcessGroupGloo(timeout=TIMEOUT)
        group.configure(f"127.0.0.1:{port[0]}/benchmark", "0", rank, ranks)
        device = torch.device("cpu")
        self._into_held = PGTransport(group, TIMEOUT, device, state_dict=lambda: self._held)
        self._into_own = PGTransport(group, TIMEOUT, device, state_dict=lambda: self._own)

    def save(self, step: int) -> None:
        """See Adapter."""
        self._exchange(self._own, self._into_held, step)

    def finish(self) -> None:
        """See Adapter."""

    def restore(self, step: int) -> None:
        """See Adapter."""
        self._exchange(self._held, self._into_own, step)

    def forget(self, step: int) -> None:
        """See Adapter; the other rank holds one state."""

    def _exchange(self, given: Tensors, transport: Any, step: int) -> None:
        for turn in (0, 1):
            if self._rank % 2 == turn:
                transport.send_checkpoint([self._mate], step, given, TIMEOUT)
            else:
                transport.recv_checkpoint(self._mate, transport.metadata(), step, TIMEOUT)
