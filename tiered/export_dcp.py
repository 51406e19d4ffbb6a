"""A step as a directory for `torch.distributed.checkpoint.load`, by DCP's own writer.

Apart from the other formats (`tiered.export`), since importing DCP takes as long as half of torch.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from replication.errors import TieredError
from tiered import torch_versions
from tiered.boxes import Box, cut, whole
from tiered.errors import ConfigError
from tiered.export import mapped, new_folder
from tiered.tree import Array, TensorRef
from tiered.whole_step import WINDOW_BYTES, WholeStep


class _Planner(DefaultSavePlanner):
    """Has DCP's own writer write the step: its values are read when it asks for them."""

    def __init__(self, step: WholeStep) -> None:
        super().__init__()
        self._step = step

        def leaf(value: Any, name: str) -> Any:
            if isinstance(value, TensorRef):
                shape, dtype = step.tensors[name].shape, step.tensors[name].dtype
                return torch.empty(shape, dtype=dtype, device="meta")
            return value

        self._flat, self._paths = torch_versions.flattened(mapped(step.tree, leaf))
        flat = self._flat
        self._tensors = [t for t in step.in_image_order() if isinstance(flat[t.name], torch.Tensor)]
        # in the order of the plan, which the writer keeps
        self._ahead = step.windows(self._tensors)
        self._written: torch.Tensor | None = None

    def create_local_plan(self) -> SavePlan:
        """Called by `dcp.save`. Tensors come in parts of at most `WINDOW_BYTES`."""
        items = []
        for tensor in self._tensors:
            properties, size = TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape)
            for number, box in enumerate(cut(tensor.shape, WINDOW_BYTES // tensor.dtype.itemsize)):
                place = torch.Size(box.offsets)
                chunk = ChunkStorageMetadata(place, torch.Size(box.shape))
                data = TensorWriteData(chunk, properties, size)
                index = MetadataIndex(tensor.name, place, number)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        for name, value in self._flat.items():
            if not isinstance(value, torch.Tensor):
                items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
        self.plan = SavePlan(items, planner_data=self._paths)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Called by the writer, for one item after the other.

        torch 2.13's writer keeps every tensor of a file until the file's end, and needs none of
        them once the next one is asked for: the memory of the last one is taken from it. (malloc
        may keep what is smaller than the 32 MiB from which it asks the kernel.)
        """
        name = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            value = self._flat[name]
            if isinstance(value, Array):
                tensor = self._step.tensors[name]
                value = self._step.window(tensor, whole(tensor.shape)).numpy()
            data = io.BytesIO()
            torch.save(value, data)
            return data
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        wanted = Box(tuple(chunk.offsets), tuple(chunk.sizes))
        if self._written is not None:
            self._written.untyped_storage().resize_(0)
        tensor, box, values = next(self._ahead)
        if (tensor.name, box) != (name, wanted):  # a writer that asks in another order
            values = self._step.window(self._step.tensors[name], wanted)
        self._written = values.clone()  # as memory that numpy has seen cannot be taken
        return self._written


def write_dcp(step: WholeStep, folder: Path) -> list[Path]:
    """Write a directory as `dcp.save` with its `FileSystemWriter` does."""
    with new_folder(folder) as partial:
        # Nothing copied ahead: what it has asked for before is written then.
        writer = FileSystemWriter(partial, thread_count=1, per_thread_copy_ahead=0)
        with calling_dcp(f"{folder} cannot be written"):
            torch_versions.save_alone(writer, _Planner(step))
        names = sorted(path.name for path in partial.iterdir())
    return [folder / name for name in names]


@contextlib.contextmanager
def calling_dcp(what: str) -> Iterator[None]:
    """DCP's errors as ours: its own is a BaseException around each rank's; and no warning."""
    try:
        with warnings.catch_warnings():
            # that there is no process group, which was said already
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        for problem, _ in error.failures.values():
            if isinstance(problem, TieredError):
                raise problem from None
        raise ConfigError(f"{what} by DCP: {error}") from error
