"""An image in pinned chunks, as a file: the whole of it or a part, and no copy of either."""

import bisect
import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from replication.records import Buffer


class ImageBytes:
    """The concatenation of buffers, which stay where they are."""

    def __init__(self, buffers: Iterable["Buffer"]) -> None:
        self.views = [buffer.data for buffer in buffers if buffer.size]
        self.starts = [0, *itertools.accumulate(view.nbytes for view in self.views)]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole image."""
        return self.starts[-1]

    def pieces(self, start: int, size_bytes: int) -> Iterator[memoryview]:
        """The buffers, cut where needed, that make up a part; ends with the image."""
        index = bisect.bisect_right(self.starts, start) - 1
        while size_bytes > 0 and index < len(self.views):
            offset = start - self.starts[index]
            piece = self.views[index][offset : offset + size_bytes]
            yield piece
            start += len(piece)
            size_bytes -= len(piece)
            index += 1


class ImageFile(io.RawIOBase):
    """A read-only, seekable file over a part of an image. Not thread-safe; each upload has its own.

    `read` of a size hands out views of the image and copies nothing; it ends where a buffer does,
    and so may be short before the end of the file.

    Args:
        image: The whole.
        start: Where the file begins in it.
        size_bytes: Of the file; None: to the end of the image.
        before_read: Called with the size of each read before it.
    """

    def __init__(
        self,
        image: ImageBytes,
        start: int = 0,
        size_bytes: int | None = None,
        before_read: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        left = image.size_bytes - start
        self.size_bytes = left if size_bytes is None else min(size_bytes, left)
        self._image = image
        self._start = start
        self._position = 0
        self._before_read = before_read

    def readable(self) -> bool:
        """Always True."""
        return True

    def seekable(self) -> bool:
        """Always True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the next read to `offset`, which may be beyond the end; return where it is."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}, before the start of the file")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1, /) -> memoryview | bytes:
        """The next bytes: at most `size`, or a copy of all that are left; none at the end."""
        left = max(0, self.size_bytes - self._position)
        pieces = self._image.pieces(self._start + self._position, left)
        is_all = size is None or size < 0
        piece = b"".join(pieces) if is_all else next(pieces, b"")[:size]
        if piece and self._before_read is not None:
            self._before_read(len(piece))
        self._position += len(piece)
        return piece

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Fill the start of `buffer` with the next bytes; return how many there were."""
        target = memoryview(buffer).cast("B")
        piece = self.read(len(target))
        target[: len(piece)] = piece
        return len(piece)
