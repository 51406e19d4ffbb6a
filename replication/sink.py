"""Where the bytes of a read go, and which of them are still missing.

Rules:
    1. A read is a list of ranges of one chunk, and a list of buffers that take their bytes in the
       same order. The two are cut independently; only their sums agree.
    2. Bytes arrive in that order, each exactly once. Whoever was interrupted asks for `missing` and
       goes on, over another connection or another transport: nothing is received twice.
    3. `received` sees every byte once, in order, right after it arrived and while it is still in
       the processor's cache. A checksum can so be computed while the next bytes are on the wire.

This is a core: it knows no sockets.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from replication.errors import ReadCancelledError
from replication.records import ByteRange, Chunk

# Copied at once, and seen by `received` while they are in the processor's cache. Up to glibc 2.38 a
# copy of less than an AMD processor's L2 cache, 1 MiB on newer ones, is one instruction that does
# not read first what it overwrites; to a place that is not aligned that is slow.
BLOCK_BYTES = 768 << 10
LEAST_SEEN = BLOCK_BYTES // 2  # bytes of small buffers that `received` sees at once
SMALL_BYTES = 32 << 10  # what is less is copied before another thread could have been let on

Received = Callable[[memoryview], object]


class Sink:
    """The caller's buffers, filled from the front.

    One reader at a time; what `next_views` returned is void after `advance`.

    Attributes:
        done_bytes: How many have arrived.
        total_bytes: How many are wanted.
        is_cancelled: Nobody wants them any more; see `replication.cancelling`.
    """

    is_cancelled = False

    def __init__(
        self,
        ranges: Iterable[ByteRange],
        into: Iterable[memoryview],
        received: Received | None = None,
    ) -> None:
        """Start with every byte missing.

        Args:
            ranges: Which bytes of the chunk, in the order in which they are wanted.
            into: Writable, contiguous memory for just so many bytes. The caller owns it, and does
                not touch it before the read is over; after a failure its contents are undefined.
            received: Called with each run of bytes as it arrives.

        Raises:
            ValueError: A buffer is read-only, or the sizes do not agree.
        """
        self._ranges = _joined(ranges)
        self._views = [view.cast("B") for view in into if view.nbytes]
        self._received = received
        self._view = self._offset = 0  # the next free byte
        self.done_bytes = 0
        self.total_bytes = sum(r.size_bytes for r in self._ranges)
        if any(view.readonly for view in self._views):
            raise ValueError("a buffer to read into is read-only")
        if (room := sum(view.nbytes for view in self._views)) != self.total_bytes:
            raise ValueError(f"{self.total_bytes} bytes are to go into buffers of {room} bytes")

    @property
    def missing_bytes(self) -> int:
        """How many bytes have not arrived yet."""
        return self.total_bytes - self.done_bytes

    def missing(self, limit: int | None = None) -> list[ByteRange]:
        """What has not arrived yet; with a limit just the first so many ranges of it."""
        skip = self.done_bytes
        found: list[ByteRange] = []
        for whole in self._ranges:
            if len(found) == limit:
                break
            if skip < whole.size_bytes:
                found.append(ByteRange(whole.start + skip, whole.stop))
            skip = max(0, skip - whole.size_bytes)
        return found

    def next_views(self, limit_bytes: int, limit: int = 1) -> list[memoryview]:
        """Where the next bytes go: at most so many bytes, in at most so many pieces."""
        found: list[memoryview] = []
        index, offset = self._view, self._offset
        while limit_bytes and len(found) < limit and index < len(self._views):
            piece = self._views[index][offset : offset + limit_bytes]
            found.append(piece)
            limit_bytes -= piece.nbytes
            index, offset = index + 1, 0
        return found

    def advance(self, size_bytes: int) -> None:
        """So many bytes more have arrived where `next_views` said."""
        assert 0 <= size_bytes <= self.missing_bytes
        self.done_bytes += size_bytes
        while size_bytes:
            view = self._views[self._view]
            step = min(size_bytes, view.nbytes - self._offset)
            if self._received is not None:
                self._received(view[self._offset : self._offset + step])
            self._offset += step
            size_bytes -= step
            if self._offset == view.nbytes:
                self._view, self._offset = self._view + 1, 0

    def writing(self, interrupt: Callable[[], None]) -> AbstractContextManager[None]:
        """Around whatever writes to `next_views`; `interrupt` ends that from another thread."""
        return nullcontext()

    def fill(self, pieces: Iterable[memoryview]) -> None:
        """Copy the missing bytes from memory; `pieces` begins with the first of them.

        `received` sees the pieces themselves, a block at a time when it was copied, or several
        buffers that are smaller.

        Raises:
            ReadCancelledError: See `replication.cancelling`; the sink is of no use then.
        """
        with self.writing(_nothing):
            for piece in pieces:
                assert piece.nbytes <= self.missing_bytes, "more bytes than are missing"
                self._copy(piece.cast("B"))

    def _copy(self, source: memoryview) -> None:
        views, view_index, offset = self._views, self._view, self._offset
        received, start, seen, size_bytes = self._received, 0, 0, source.nbytes
        memory = np.frombuffer(source, np.uint8)
        while start < size_bytes:
            if self.is_cancelled:
                raise ReadCancelledError
            view = views[view_index]
            step = view.nbytes - offset
            if step >= SMALL_BYTES:  # up to a multiple of a block in the view, which is aligned
                step = min(step, BLOCK_BYTES - offset % BLOCK_BYTES)
            stop = min(start + step, size_bytes)
            end = offset + stop - start
            if stop - start < SMALL_BYTES:
                view[offset:end] = source[start:stop]
            else:
                np.copyto(np.frombuffer(view, np.uint8, stop - start, offset), memory[start:stop])
            start, offset = stop, end
            if offset == view.nbytes:
                view_index, offset = view_index + 1, 0
            if received is not None and (start - seen >= LEAST_SEEN or start == size_bytes):
                received(source[seen:start])
                seen = start
        self._view, self._offset = view_index, offset
        self.done_bytes += size_bytes


def _nothing() -> None:
    """`fill` looks after each block, which is copied in no time."""


def gather(chunk: Chunk, ranges: Sequence[ByteRange]) -> list[memoryview]:
    """Views of just these ranges of a chunk, in order; nothing is copied."""
    views = [buffer.data.cast("B") for buffer in chunk if buffer.nbytes]
    stops = list(itertools.accumulate(view.nbytes for view in views))
    found = []
    for wanted in ranges:
        start = wanted.start
        index = bisect.bisect_right(stops, start)
        while start < wanted.stop:
            view = views[index]
            begin = stops[index] - view.nbytes
            piece = view[start - begin : wanted.stop - begin]
            found.append(piece)
            start += piece.nbytes
            index += 1
    return found


def size_of(chunk: Chunk) -> int:
    """Bytes of a chunk."""
    return sum(buffer.nbytes for buffer in chunk)


def _joined(ranges: Iterable[ByteRange]) -> list[ByteRange]:
    """The same bytes in the same order, in as few ranges as possible."""
    joined: list[ByteRange] = []
    for one in ranges:
        if one.size_bytes < 0 or one.start < 0:
            raise ValueError(f"{one} is no range of bytes")
        if joined and joined[-1].stop == one.start:
            joined[-1] = ByteRange(joined[-1].start, one.stop)
        elif one.size_bytes:
            joined.append(one)
    return joined
