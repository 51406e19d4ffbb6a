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


def keep(chunk: Chunk) -> tuple[Any, Chunk]:
    """Copy a chunk into this host's object store; return its reference, and views that pin it.

    While a view is there the bytes are neither evicted nor spilled to disk, with the reference or
    without; what only a reference keeps would be spilled under memory pressure.
    """
    reference = put(chunk)
    return reference, ray.get(reference)


def pin(chunk: Chunk) -> Chunk:
    """Copy a chunk into this host's object store; return read-only views that keep it there."""
    return keep(chunk)[1]


class StoreMemory:
    """Tells whether a buffer lies in one mapping that may be written and is memory, not a file.

    Every client of the object store maps it for reading and writing; only the arrays that Ray makes
    are read-only. Whoever writes to one makes sure that nobody reads it then.

    The system is asked once for each mapping: /proc/self/maps has hundreds of lines, and costs
    milliseconds. The store's memory stays mapped as long as the process is connected; what Ray maps
    and unmaps in between are files, for objects that the memory had no room for.
    """

    def __init__(self) -> None:
        self._known: list[tuple[int, int]] = []

    def holds(self, buffer: Buffer) -> bool:
        """Whether all of the buffer is such memory; False where the system does not say."""
        start = buffer.ctypes.data
        stop = start + buffer.nbytes
        if not any(first <= start and stop <= last for first, last in self._known):
            try:
                self._known = writable_memory(MAPS.read_text().splitlines())
            except OSError:
                return False
        return any(first <= start and stop <= last for first, last in self._known)


def writable_memory(maps: Iterable[str]) -> list[tuple[int, int]]:
    """First address and last + 1 of such mappings, from the lines of /proc/self/maps."""
    found = []
    for line in maps:
        span, rights, _, _, _, *path = line.split(maxsplit=5)
        if rights == "rw-s" and path and path[0].startswith(SHARED_MEMORY):
            start, stop = (int(edge, 16) for edge in span.split("-"))
            found.append((start, stop))
    return found
