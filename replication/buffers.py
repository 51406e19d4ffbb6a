"""Memory of the object store that is used again: for chunks that arrive, and for saves to come.

`ray.put` of what was received costs a second copy of every byte, and into memory that the object
store has not touched yet a page fault for every 4 KiB: 0.2-0.4 of what the network gave, 0.65 once
the memory is warm. Received straight into object-store memory that an earlier shard has left, a
chunk is where it belongs when its last byte arrives: 1.0 (measured with 64 MiB chunks over
loopback, checksums included).

The trainers of this host write their saves into such memory, too (`tiered.staging`). Made anew for
each save, full of zeros, it took 0.1 s of processor time a GB, the sixth part of all that a save
costs two hosts.

The object store has no public call for that. So a buffer is made by `ray.put`, a view is kept, as
for every chunk that a holder pins, and the bytes are then overwritten through the same mapping, or
through the one of the process that it is lent to. The rules that this rests on:

    1. One process writes to a buffer at a time, and nobody else looks at it then. Its reference
       goes to the trainer that it is lent to (`lend`), and to nobody else; a view is kept all the
       time, so Ray neither moves nor spills the object. What holders hand out by Ray is a copy,
       made by Ray; what they send by TCP is read from here.
    2. A buffer is written while it is leased or lent, then pinned, and from then on read-only. It
       serves again only when no view of it is left in this process: whoever still sends, hashes or
       uploads a chunk keeps it from being overwritten, as with any other memory.
    3. What was lent and never pinned is not used again: a trainer that was stopped in the middle of
       a copy, and was replaced since, may wake up and write on. It keeps that memory as its own.
    4. It is used only if the system says that the mapping is shared, writable and memory (`rw-s`,
       of /dev/shm or a memfd). Where it is not (no /proc, another plasma directory, an object that
       the store had to put into a file) bytes are received into the process' own memory and put,
       and nothing is lent.
    5. Free buffers count against the holder's budget: it calls `trim` with what the budget leaves.
    6. Small chunks that arrive are not worth it: Ray keeps the smallest outside of the store.
"""

import ctypes
import logging
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from replication.pinning import StoreMemory, keep
from replication.records import Buffer, Chunk

logger = logging.getLogger(__name__)

LEAST_BYTES = 1 << 20  # of a chunk that gets a buffer of the object store
ROUND_BYTES = 64 << 10  # sizes are rounded up to this, so that nearly equal ones share
SPARE = 4  # warm buffers of the process' own memory that are kept, where those are needed
MAKE_S = 0.05  # about so long new memory is made for one call of `lend`: a save may wait for it


@dataclass(frozen=True, slots=True)
class Memory:
    """An object of the store.

    Attributes:
        reference: To it.
        buffer: Its bytes, [n] uint8, read-only; pins it.
    """

    reference: Any
    buffer: Buffer


Free = deque[Memory]


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


class Loan:
    """Memory for another process of this host to fill; without `pin` it is not used again."""

    def __init__(self, memory: Memory, free: Free) -> None:
        """Lend `memory`, which belongs to `free` again once it was pinned and let go of."""
        self._memory = memory
        self._free = free

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return self._memory.buffer.nbytes

    @property
    def reference(self) -> Any:
        """By which the other process gets at it."""
        return self._memory.reference

    @property
    def name(self) -> str:
        """What both call it."""
        return str(self._memory.reference.hex())

    def pin(self, size_bytes: int) -> Chunk:
        """The first bytes, which have been filled: read-only, and pinned in the object store.

        Raises:
            ValueError: They are more than was lent.
        """
        if size_bytes > self.size_bytes:
            raise ValueError(f"{size_bytes} bytes of {self.name}, which has {self.size_bytes}")
        return _sealed(_writable(self._memory, size_bytes, self._free))


class Buffers:
    """Memory for chunks to arrive in and for saves to come; safe to call from several threads."""

    def __init__(self, put: Callable[[Chunk], tuple[Any, Chunk]] = keep) -> None:
        """Start with no memory.

        Args:
            put: Copies a chunk into the object store; returns its reference and views that pin it.
        """
        self._put = put
        self._store = StoreMemory()
        self._free: dict[int, Free] = {}
        self._spare: deque[Buffer] = deque(maxlen=SPARE)
        self._lock = threading.Lock()
        self._can_share: bool | None = None  # not known before the first buffer is there

    def lease(self, size_bytes: int) -> Lease:
        """Memory for a chunk of `size_bytes`, warm if there is some.

        Raises:
            Exception: Whatever `put` raises when the object store is full.
        """
        if size_bytes >= LEAST_BYTES:
            free = self._free_of(size_bytes)
            memory = _pop(free) or self._make(size_bytes)
            if memory is not None:
                return Lease(_writable(memory, size_bytes, free), _sealed)
        return self._lease_own(size_bytes)

    def lend(self, sizes: Sequence[int]) -> list[Loan]:
        """Memory of at least these sizes for another process to fill: for the first ones of them.

        For as many as there is free memory, or as can be made in `MAKE_S`, but for one in any case.
        Without any the object store's memory cannot be used. Blocks.

        Raises:
            Exception: Whatever `put` raises when the object store is full, if that was for the
                first one.
        """
        loans: list[Loan] = []
        ends_s = time.monotonic() + MAKE_S
        for size_bytes in sizes:
            free = self._free_of(size_bytes)
            memory = _pop(free)
            if memory is None and not (loans and time.monotonic() > ends_s):
                try:
                    memory = self._make(size_bytes)
                except Exception:  # asked for the rest, it is raised again
                    if not loans:
                        raise
            if memory is None:
                break
            loans.append(Loan(memory, free))
        return loans

    def has_free(self, sizes: Sequence[int]) -> bool:
        """Whether there is free memory for chunks of all these sizes."""
        needed = Counter(map(_rounded, sizes))
        with self._lock:
            return all(len(self._free.get(size, ())) >= count for size, count in needed.items())

    @property
    def free_bytes(self) -> int:
        """Of the object store, kept for what comes."""
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

    def _free_of(self, size_bytes: int) -> Free:
        """The free buffers of a size."""
        with self._lock:
            return self._free.setdefault(_rounded(size_bytes), deque())

    def _make(self, size_bytes: int) -> Memory | None:
        """A new buffer of the object store that nobody else knows; None if it cannot be used."""
        if self._can_share is False:
            return None
        reference, (pinned,) = self._put([np.empty(_rounded(size_bytes), dtype=np.uint8)])
        if self._store.holds(pinned):
            self._can_share = True
            return Memory(reference, pinned)
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
            _, pinned = self._put([memory])
            self._spare.append(whole)
            return pinned

        return Lease(whole[:size_bytes], put)


def _rounded(size_bytes: int) -> int:
    return -(-size_bytes // ROUND_BYTES) * ROUND_BYTES


def _pop(free: Free) -> Memory | None:
    """The warmest buffer, if there is one."""
    try:
        return free.pop()
    except IndexError:
        return None


def _writable(memory: Memory, size_bytes: int, free: Free) -> Buffer:
    """The first bytes of a buffer, to be written; it is free when no view of them is left.

    Every view, of whatever kind, leads back to the one ctypes array that stands for its use. The
    finalizer keeps `memory` alive that long. It may run in any thread, at any point: all that it
    does is one append.
    """
    use = (ctypes.c_uint8 * size_bytes).from_address(memory.buffer.ctypes.data)
    weakref.finalize(use, free.append, memory).atexit = False
    return np.frombuffer(memoryview(use), dtype=np.uint8)


def _sealed(memory: Buffer) -> Chunk:
    memory.flags.writeable = False
    return [memory]
