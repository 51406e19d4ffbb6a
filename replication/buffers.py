"""Where chunks from other holders arrive: memory of the object store that is used again.

`ray.put` of what was received costs a second copy of every byte, and into memory that the object
store has not touched yet a page fault for every 4 KiB: 0.2-0.4 of what the network gave, 0.65 once
the memory is warm. Received straight into object-store memory that an earlier shard has left, a
chunk is where it belongs when its last byte arrives: 1.0 (measured with 64 MiB chunks over
loopback, checksums included).

The object store has no public call for that. So a buffer is made by `ray.put`, the reference is
dropped and a view kept, as for every chunk that a holder pins, and the bytes are then overwritten
through the same mapping. The rules that this rests on:

    1. Nobody but this process can see a buffer. Its reference never leaves `_make` and is gone
       before the buffer is used, so no other process can ask for the object, and Ray neither moves
       nor spills it. What holders hand out by Ray is a copy, made by Ray; what they send by TCP is
       read from here.
    2. A buffer is written while it is leased, then pinned, and from then on read-only. It is lent
       to the next lease only when no view of it is left anywhere: whoever still sends, hashes or
       uploads a chunk keeps it from being overwritten, as with any other memory.
    3. It is used only if the system says that the mapping is shared, writable and memory (`rw-s`,
       of /dev/shm or a memfd). Where it is not (no /proc, another plasma directory, an object that
       the store had to put into a file) bytes are received into the process' own memory and put.
    4. Free buffers count against the holder's budget: it calls `trim` with what the budget leaves.
    5. Small chunks are not worth it: Ray keeps the smallest outside of the store anyway.
"""

import ctypes
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np

from replication.pinning import StoreMemory, pin
from replication.records import Buffer, Chunk

logger = logging.getLogger(__name__)

LEAST_BYTES = 1 << 20  # of a chunk that gets a buffer of the object store
ROUND_BYTES = 64 << 10  # sizes are rounded up to this, so that nearly equal ones share
SPARE = 4  # warm buffers of the process' own memory that are kept, where those are needed


class Lease:
    """Memory for one chunk that is about to arrive; dropped without `pin`, it is free again."""

    def __init__(self, memory: Buffer, keep: Callable[[Buffer], Chunk]) -> None:
        """Lend `memory`; `keep` makes a pinned chunk of it."""
        self._memory: Buffer | None = memory
        self._keep = keep

    @property
    def view(self) -> memoryview:
        """Where the bytes go; not to be used after `pin`."""
        assert self._memory is not None, "a lease is pinned once"
        return self._memory.data

    def pin(self) -> Chunk:
        """The bytes, whole and verified: read-only, and pinned in the object store."""
        memory, self._memory = self._memory, None
        assert memory is not None, "a lease is pinned once"
        return self._keep(memory)


class ReceiveBuffers:
    """Lends memory for chunks to arrive in; safe to call from several threads."""

    def __init__(self, put: Callable[[Chunk], Chunk] = pin) -> None:
        """Start with no memory.

        Args:
            put: Copies a chunk into the object store and returns views that pin it.
        """
        self._put = put
        self._store = StoreMemory()
        self._free: dict[int, deque[Buffer]] = {}
        self._spare: deque[Buffer] = deque(maxlen=SPARE)
        self._lock = threading.Lock()
        self._can_share: bool | None = None  # not known before the first buffer is there

    def lease(self, size_bytes: int) -> Lease:
        """Memory for a chunk of `size_bytes`, warm if there is some.

        Raises:
            Exception: Whatever `put` raises when the object store is full.
        """
        if size_bytes >= LEAST_BYTES and self._can_share is not False:
            rounded = -(-size_bytes // ROUND_BYTES) * ROUND_BYTES
            with self._lock:
                free = self._free.setdefault(rounded, deque())
            try:
                pinned: Buffer | None = free.pop()  # the warmest
            except IndexError:
                pinned = self._make(rounded)
            if pinned is not None:
                return Lease(_writable(pinned, size_bytes, free), _sealed)
        return self._lease_own(size_bytes)

    @property
    def free_bytes(self) -> int:
        """Of the object store, kept for chunks to come."""
        with self._lock:
            return sum(size * len(free) for size, free in self._free.items())

    def trim(self, keep_bytes: int) -> None:
        """Give free buffers back to the object store, until at most `keep_bytes` are left."""
        with self._lock:
            free_bytes = sum(size * len(free) for size, free in self._free.items())
            for size in sorted(self._free, reverse=True):
                free = self._free[size]
                while free and free_bytes > keep_bytes:
                    try:
                        free.popleft()
                    except IndexError:  # lent meanwhile
                        break
                    free_bytes -= size
                if not free and not keep_bytes:
                    del self._free[size]

    def _make(self, size_bytes: int) -> Buffer | None:
        """A new buffer of the object store that nobody else knows; None if it cannot be used."""
        (pinned,) = self._put([np.empty(size_bytes, dtype=np.uint8)])
        if self._store.holds(pinned):
            self._can_share = True
            return pinned
        if self._can_share is None:  # else it is just this one: the store was full
            logger.warning("object store memory is not writable here: chunks are copied into it")
            self._can_share = False
        return None

    def _lease_own(self, size_bytes: int) -> Lease:
        """Memory of this process, to be put when the bytes are there."""
        try:
            whole = self._spare.pop()
        except IndexError:
            whole = np.empty(0, dtype=np.uint8)
        if whole.nbytes < size_bytes:
            whole = np.empty(size_bytes, dtype=np.uint8)

        def put(memory: Buffer) -> Chunk:
            pinned = self._put([memory])
            self._spare.append(whole)
            return pinned

        return Lease(whole[:size_bytes], put)


def _writable(pinned: Buffer, size_bytes: int, free: "deque[Buffer]") -> Buffer:
    """The first bytes of a pinned buffer, to be written; it is free when no view of them is left.

    Every view, of whatever kind, leads back to the one ctypes array that stands for the loan. The
    finalizer keeps `pinned`, and so the memory, alive that long. It may run in any thread, at any
    point: all that it does is one append.
    """
    loan = (ctypes.c_uint8 * size_bytes).from_address(pinned.ctypes.data)
    weakref.finalize(loan, free.append, pinned).atexit = False
    return np.frombuffer(memoryview(loan), dtype=np.uint8)


def _sealed(memory: Buffer) -> Chunk:
    memory.flags.writeable = False
    return [memory]
