"""PyTorch Distributed Checkpoint with its FileSystemWriter, synchronous and asynchronous."""

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks.peers.adapter import Tensors


class Dcp:
    """See Adapter. Names carry the rank: DCP keeps one of several values of the same name."""

    def open(self, tensors: Tensors, folder: str, rank: int, ranks: int) -> None:
        """See Adapter."""
        del ranks
        self._state: dict[str, Any] = {f"rank{rank}.{k}": v for k, v in tensors.items()}
        self._folder, self._rank = Path(folder), rank

    def save(self, step: int) -> None:
        """See Adapter."""
        dcp.save(self._state, storage_writer=self._writer(step))

    def finish(self) -> None:
        """See Adapter."""

    def restore(self, step: int) -> None:
        """See Adapter."""
        dcp.load(self._state, storage_reader=self._reader(step))

    def forget(self, step: int) -> None:
        """See Adapter."""
        if self._rank == 0:
            shutil.rmtree(self._path(step), ignore_errors=True)

    def _writer(self, step: int) -> Any:
        return dcp.FileSystemWriter(self._path(step), sync_files=False)

    def _reader(self, step: int) -> Any:
        return dcp.FileSystemReader(self._path(step))

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step}"


class DcpAsync(Dcp):
    """`async_save` in a thread, staging into buffers that are kept from save to save."""

    def open(self, tensors: Tensors, folder: str, rank: int, ranks: int) -> None:
        """See Adapter."""
        super().open(tensors, folder, rank, ranks)
        self._group = dist.new_group(backend="gloo")
        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=True,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
        self._stager = DefaultStager(options)
        self._future: Any = None

    def save(self, step: int) -> None:
        """See Adapter."""
        answer = dcp.async_save(
            self._state,
            storage_writer=self._writer(step),
            async_stager=self._stager,
            process_group=self._group,
        )
        self._future = getattr(answer, "upload_completion", answer)

    def finish(self) -> None:
        """See Adapter."""
        assert self._future is not None
        self._future.result()
