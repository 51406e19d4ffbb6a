"""Chunks in this host's object store: put there with one copy, and pinned by a live view."""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import ray

from replication.records import Buffer, Chunk

MAPS = Path("/proc/self/maps")
SHARED_MEMORY = ("/dev/shm/", "/memfd:")


class _OutOfBand:
    """A chunk on its way into the store: every buffer beside the pickle, none in it.

    Pickling an array costs more than copying a small one: this hands its memory over as it is.
    """

    def __init__(self, chunk: Chunk) -> None:
        self._chunk = chunk

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _as_chunk, tuple(pickle.PickleBuffer(buffer.data) for buffer in self._chunk)


def _as_chunk(*buffers: Any) -> list[Buffer]:
    return [np.frombuffer(buffer, dtype=np.uint8) for buffer in buffers]


def put(chunk: Chunk) -> Any:
    """Copy a chunk into this host's object store, once; return its reference."""
    return ray.put(_OutOfBand(chunk))


def pin(chunk: Chunk) -> Chunk:
    """Copy a chunk into this host's object store; return read-only views that keep it there.

    The reference is dropped on purpose: bytes that only a view keeps are neither evicted nor
    spilled to disk, where a held reference would be under memory pressure.
    """
    pinned: Chunk = ray.get(put(chunk))
    return pinned


def is_shared_memory(buffer: Buffer) -> bool:
    """Whether a buffer lies in one mapping that may be written and is memory, not a file.

    Every client of the object store maps it for reading and writing; only the arrays that Ray makes
    are read-only. Whoever writes to one makes sure that nobody else knows it.
    """
    try:
        lines = MAPS.read_text().splitlines()
    except OSError:
        return False
    return is_in_shared_memory(lines, buffer.ctypes.data, buffer.nbytes)


def is_in_shared_memory(maps: Iterable[str], address: int, size_bytes: int) -> bool:
    """Read that from the lines of /proc/self/maps."""
    for line in maps:
        span, rights, _, _, _, *path = line.split(maxsplit=5)
        start, stop = (int(edge, 16) for edge in span.split("-"))
        if start <= address < stop:
            is_memory = bool(path) and path[0].startswith(SHARED_MEMORY)
            return rights == "rw-s" and is_memory and address + size_bytes <= stop
    return False
