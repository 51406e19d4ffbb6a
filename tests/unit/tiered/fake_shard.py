"""A shard in plain memory, saved and read through the real modules; and what `equal` means."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
import torch

from replication.checksum import digest
from replication.errors import HolderUnavailableError
from replication.records import Chunk, ShardKey, ShardPlan, ShardRecord, Version
from replication.sink import Sink
from tiered import restore
from tiered.boxes import Box
from tiered.fetch import ShardReader
from tiered.history import ShardSources
from tiered.image import chunk_sizes, data_chunk, front, lay_out
from tiered.saved_step import SavedStep
from tiered.state import Captured, capture
from tiered.tree import EXT_TENSOR, TensorRef, dtype_name

KEY = ShardKey("job", Version(2, 40), 0)


class MemoryTier:
    """A Tier over a list of chunks that can be damaged; counts what it is asked for."""

    def __init__(self, chunks: list[Chunk], label: str = "RAM", name: str = "host a") -> None:
        self.chunks = chunks
        self.label = label
        self.name = name
        self.is_dead = False
        self.corrupt: set[int] = set()
        self.asked: list[int] = []
        self.closed = 0

    def read(self, index: int) -> Chunk:
        self.asked.append(index)
        if self.is_dead:
            raise HolderUnavailableError(self.name, "it is dead")
        chunk = [buffer.copy() for buffer in self.chunks[index]]
        if index in self.corrupt:
            chunk[-1][-1] ^= 1
        return chunk

    def read_into(self, index: int, sink: Sink) -> None:
        sink.fill(buffer.data for buffer in self.read(index))

    def is_at_hand(self, _index: int) -> bool:
        return False

    def close(self) -> None:
        self.closed += 1


class Shard:
    """A saved state: its chunks, its record, its image."""

    def __init__(
        self,
        state: Mapping[Any, Any] | Captured,
        chunk_bytes: int = 4096,
        *,
        allow_pickle: bool = False,
    ) -> None:
        if isinstance(state, Captured):
            captured = state
        else:
            captured = capture(state, allow_pickle=allow_pickle)
        layout = lay_out(captured)
        first = front(layout, KEY, 1, captured.tree)
        sizes = chunk_sizes(layout, len(first), chunk_bytes)
        self.chunks: list[Chunk] = [[np.frombuffer(first, dtype=np.uint8)]]
        start = 0
        for size in sizes[1:]:
            chunk = data_chunk(layout, captured.tensors, start, start + size)
            self.chunks.append([buffer.copy() for buffer in chunk])
            start += size
        digests = tuple(digest(chunk) for chunk in self.chunks)
        self.record = ShardRecord(KEY, ShardPlan(1, sizes), digests)

    @property
    def image(self) -> bytes:
        return b"".join(buffer.tobytes() for chunk in self.chunks for buffer in chunk)

    def reader(self, *tiers: MemoryTier) -> ShardReader:
        sources = ShardSources(self.record, (), is_durable=False)
        return ShardReader(sources, list(tiers) or [MemoryTier(self.chunks)])


def raw(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg()
    dense = plain.clone(memory_format=torch.contiguous_format)
    return bytes(dense.reshape(-1).view(torch.uint8).numpy().tobytes())


def differences(one: Any, other: Any, path: str = "state") -> Iterator[str]:
    """Every place where two states are not the same types and the same bits.

    An OrderedDict comes back as a dict; everything else keeps its type.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        if [(type(k), repr(k)) for k in one] != [(type(k), repr(k)) for k in other]:
            yield f"{path}: keys {list(one)} became {list(other)}"
            return
        for (key, a), b in zip(one.items(), other.values(), strict=True):
            yield from differences(a, b, f"{path}[{key!r}]")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if (one.dtype, one.shape, raw(one)) != (other.dtype, other.shape, raw(other)):
            yield f"{path}: {one} became {other}"
    elif type(one) is not type(other):
        yield f"{path}: {type(one)} became {type(other)}"
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield f"{path}: length {len(one)} became {len(other)}"
            return
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{path}[{index}]")
    elif isinstance(one, np.ndarray | np.generic):
        if (one.dtype, one.shape, one.tobytes()) != (other.dtype, other.shape, other.tobytes()):
            yield f"{path}: {one!r} became {other!r}"
    elif isinstance(one, float):
        if struct.pack("d", one) != struct.pack("d", other):
            yield f"{path}: {one!r} became {other!r}"
    elif isinstance(one, complex):
        if struct.pack("dd", one.real, one.imag) != struct.pack("dd", other.real, other.imag):
            yield f"{path}: {one!r} became {other!r}"
    elif one != other:
        yield f"{path}: {one!r} became {other!r}"


def assert_same(one: Any, other: Any) -> None:
    assert list(differences(one, other)) == []


def restore_into(state: Any, reader: ShardReader, *, allow_pickle: bool = False) -> None:
    """Fill a state from a step of one rank."""
    restore.restore_into(state, SavedStep([reader], allow_pickle=allow_pickle))


def read_state(reader: ShardReader, *, allow_pickle: bool = False) -> Any:
    """The state of a step of one rank."""
    return restore.read_state(SavedStep([reader], allow_pickle=allow_pickle))


def part_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(map(slice, box.offsets, box.stops))]


def shard_of(values: dict[str, Any], boxes: dict[str, Box], **options: Any) -> Shard:
    """A rank's shard, in which some tensors are local parts of DTensors."""
    captured = capture({k: v for k, v in values.items() if k not in boxes})
    tree = msgpack.unpackb(captured.tree)
    tensors = dict(captured.tensors)
    for name, box in boxes.items():
        whole_tensor = values[name]
        local = part_of(whole_tensor, box).contiguous()
        dtype = dtype_name(local.dtype)
        ref = TensorRef(name, dtype, box.shape, box.offsets, tuple(whole_tensor.shape))
        tree[name] = msgpack.ExtType(EXT_TENSOR, ref.pack())
        tensors[name] = local
    return Shard(Captured(msgpack.packb(tree), tensors), **options)


def step_of(shards: Sequence[Shard]) -> SavedStep:
    return SavedStep([shard.reader() for shard in shards])
