"""Checksums: xxh3-128, which measures 18-27 GB/s where a memory copy measures 10."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import xxhash

DIGEST_BYTES = 16


class Digest:
    """The xxh3-128 checksum of bytes that arrive piece by piece; lets other threads run."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, piece: memoryview) -> None:
        """Take the next bytes."""
        self._state.update(piece)

    def digest(self) -> bytes:
        """The checksum, 16 bytes, of all bytes so far."""
        return self._state.digest()


def digest(buffers: Iterable[npt.NDArray[np.uint8]]) -> bytes:
    """Return the xxh3-128 checksum, 16 bytes, of the concatenation of `buffers` ([n] uint8)."""
    state = xxhash.xxh3_128()
    for buffer in buffers:
        state.update(buffer)  # type: ignore[arg-type]  # any object with the buffer protocol
    return state.digest()


def combine(digests: Iterable[bytes]) -> bytes:
    """Return one checksum, 16 bytes, over an ordered list of checksums."""
    return xxhash.xxh3_128_digest(b"".join(digests))
