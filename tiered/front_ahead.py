"""A shard's first chunk, read before it is known whether the shard will be restored: mostly it is.

While the coordinator decides, a rank has little to do. The newest shard of its own on its host is
in most cases what it will be told to restore; so the header and the tree of that one are read
meanwhile, which of 10,000 tensors takes a third as long as copying them. It counts if that shard is
to be restored indeed, and the bytes that were read have the checksum of its first chunk.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from replication.checksum import digest
from replication.records import ShardKey, ShardPlan, ShardRecord
from tiered.collector import collector_paused
from tiered.image import Span, read_front
from tiered.tree import read_tree


@dataclass(frozen=True, slots=True)
class ReadFront:
    """What a first chunk says.

    Attributes:
        tree: See `tiered.step_index.ShardView`.
        spans: The same.
        size_bytes: Of the chunk.
    """

    tree: dict[Any, Any]
    spans: Mapping[str, Span]
    size_bytes: int


def read_first(first: bytes, plan: ShardPlan, *, allow_pickle: bool) -> ReadFront:
    """Read a first chunk.

    Raises:
        StateError: It is no shard's image, or holds pickled values that may not be read.
    """
    front = read_front(first, plan)
    tree = read_tree(front.tree, allow_pickle=allow_pickle)
    return ReadFront(tree, {span.name: span for span in front.spans}, len(first))


class FrontAhead:
    """One thread reads; another one takes what was read."""

    def __init__(self) -> None:
        """Nothing is read yet."""
        self._lock = threading.Lock()
        self._key: ShardKey | None = None  # of the shard that is being read, or was
        self._found: tuple[bytes, ReadFront] | None = None  # with its checksum
        self._is_over = False

    def read(self, key: ShardKey, first: bytes, sizes: Sequence[int]) -> None:
        """Read the first chunk of a shard; nothing in it is believed.

        Args:
            key: The shard.
            first: Its first chunk.
            sizes: Of all its chunks.
        """
        self._key = key
        with self._lock, collector_paused():
            if self._is_over:
                return
            try:  # what is pickled is not touched before its checksum is known
                front = read_first(first, ShardPlan(1, tuple(sizes)), allow_pickle=False)
            except Exception:  # noqa: BLE001 - of any bytes; whoever reads it again says what is wrong
                return
            self._found = digest([np.frombuffer(first, dtype=np.uint8)]), front

    def take(self, record: ShardRecord) -> ReadFront | None:
        """What was read, if it is of this shard; what is not begun by now is not waited for."""
        if self._key not in (None, record.key):
            return None
        with self._lock:
            found, self._found, self._is_over = self._found, None, True
            is_it = found is not None and (self._key, found[0]) == (record.key, record.digests[0])
            return found[1] if found is not None and is_it else None

    def close(self) -> None:
        """Read nothing any more; returns when what is being read is read."""
        with self._lock:
            self._is_over, self._found = True, None
