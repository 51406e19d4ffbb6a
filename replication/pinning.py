"""Chunks in this host's object store: put there with one copy, and pinned by a live view."""

import pickle
from typing import Any

import numpy as np
import ray

from replication.records import Buffer, Chunk


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
