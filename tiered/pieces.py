"""What is wanted of a shard's tensor data and where it goes, cut at the edges of chunks."""

import bisect
import threading
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from replication.records import Buffer


class Piece(NamedTuple):
    """Bytes that are wanted, and where they go.

    Attributes:
        start: The first byte, counted from the start of the image's tensor data, as `Span`s are.
        into: Writable, contiguous memory for them, [n] uint8; the caller's.
    """

    start: int
    into: Buffer


class Run:
    """Pieces in order, without overlaps; often thousands of them, so little is done for each.

    Args:
        pieces: They; those without bytes are left out.

    Raises:
        ValueError: They overlap, or are not in order.
    """

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces = [piece for piece in pieces if piece.into.nbytes]
        self._starts = [start for start, _ in self._pieces]
        self._stops = [start + into.nbytes for start, into in self._pieces]
        for stop, start in zip(self._stops, self._starts[1:], strict=False):
            if start < stop:
                raise ValueError(f"bytes from {start} are wanted after those up to {stop}")

    def wants(self, start: int, stop: int) -> bool:
        """Whether some of bytes `start` to `stop` are wanted."""
        first, last = self._between(start, stop)
        return first < last

    def places(self, start: int, stop: int, scratch: threading.local) -> list[memoryview]:
        """Where bytes `start` to `stop` go; what nobody wants, into scratch memory.

        Each byte has a place of its own there: it is hashed after it arrived, perhaps together with
        the next ones.
        """
        places: list[memoryview] = []

        def skip(low: int, high: int) -> None:
            if getattr(scratch, "memory", np.empty(0)).nbytes < stop - start:
                scratch.memory = np.empty(stop - start, dtype=np.uint8)
            places.append(scratch.memory[low - start : high - start].data)

        at = start
        for index in range(*self._between(start, stop)):
            low, high, into = self._starts[index], self._stops[index], self._pieces[index].into
            if low < start or high > stop:
                begin, low, high = low, max(low, start), min(high, stop)
                into = into[low - begin : high - begin]
            if at < low:
                skip(at, low)
            places.append(into.data)
            at = high
        if at < stop:
            skip(at, stop)
        return places

    def _between(self, start: int, stop: int) -> tuple[int, int]:
        """The first piece, and the one after the last, that have some of these bytes."""
        return bisect.bisect_right(self._stops, start), bisect.bisect_left(self._starts, stop)


def runs(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Pieces of any order in few runs, without empty ones: what is wanted twice is read twice."""
    found: list[list[Piece]] = []
    stops: list[int] = []  # of each
    wanted = [piece for piece in pieces if piece.into.nbytes]
    for piece in sorted(wanted, key=lambda piece: piece.start):
        stop = piece.start + piece.into.nbytes
        for index, before in enumerate(stops):
            if before <= piece.start:
                found[index].append(piece)
                stops[index] = stop
                break
        else:
            found.append([piece])
            stops.append(stop)
    return found
