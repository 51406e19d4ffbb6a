"""Where bytes of a read go: any cut of ranges and buffers, interrupted anywhere."""

import threading
from itertools import accumulate, pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.cancelling import CancellableSink
from replication.errors import ReadCancelledError
from replication.records import ByteRange, Chunk
from replication.sink import BLOCK_BYTES, LEAST_SEEN, Sink, gather, size_of
from tests.waiting import wait_for

DATA = bytes(range(256))


def memory(*sizes: int) -> list[bytearray]:
    return [bytearray(size) for size in sizes]


def views(buffers: list[bytearray]) -> list[memoryview]:
    return [memoryview(buffer) for buffer in buffers]


def cut(total: int, points: list[int]) -> list[int]:
    edges = sorted({0, total, *(point % (total + 1) for point in points)})
    return [stop - start for start, stop in pairwise(edges)]


def chunk_of(data: bytes, sizes: list[int]) -> Chunk:
    stops = list(accumulate(sizes))
    starts = [0, *stops[:-1]]
    pairs = zip(starts, stops, strict=True)
    return [np.frombuffer(data[start:stop], dtype=np.uint8) for start, stop in pairs]


ranges_of_data = st.lists(
    st.tuples(st.integers(0, 256), st.integers(0, 256)).map(
        lambda pair: ByteRange(min(pair), max(pair))
    ),
    max_size=8,
)
points = st.lists(st.integers(0, 10_000), max_size=8)


@given(ranges_of_data, points, points, st.lists(st.integers(1, 300), min_size=1), st.integers(1, 4))
def test_any_read_in_any_pieces_puts_each_byte_in_its_place(
    ranges: list[ByteRange], into: list[int], held: list[int], steps: list[int], limit: int
) -> None:
    wanted = b"".join(DATA[r.start : r.stop] for r in ranges)
    buffers = memory(*cut(len(wanted), into))
    seen = bytearray()
    sink = Sink(ranges, views(buffers), seen.extend)
    chunk = chunk_of(DATA, cut(len(DATA), held))
    turn = 0
    while sink.missing_bytes:
        # As after a broken connection: what is missing is asked for again, and a bit of it arrives.
        (first, *_) = asked = gather(chunk, sink.missing(limit))
        assert sum(piece.nbytes for piece in asked) <= sink.missing_bytes
        size = min(steps[turn % len(steps)], first.nbytes)
        turn += 1
        source = first[:size]
        for view in sink.next_views(size, 3):
            view[:] = source[: view.nbytes]
            sink.advance(view.nbytes)
            source = source[view.nbytes :]
    assert b"".join(buffers) == wanted == seen
    assert sink.missing() == []
    assert sink.next_views(100) == []


@given(ranges_of_data, points, points, st.integers(0, 2000))
def test_the_rest_of_an_interrupted_read_can_be_copied_from_memory(
    ranges: list[ByteRange], into: list[int], held: list[int], before: int
) -> None:
    wanted = b"".join(DATA[r.start : r.stop] for r in ranges)
    buffers = memory(*cut(len(wanted), into))
    seen = bytearray()
    sink = Sink(ranges, views(buffers), seen.extend)
    source = memoryview(wanted)[: before % (len(wanted) + 1)]
    while source:
        (view,) = sink.next_views(source.nbytes)
        view[:] = source[: view.nbytes]
        source = source[view.nbytes :]
        sink.advance(view.nbytes)
    chunk = chunk_of(DATA, cut(len(DATA), held))
    sink.fill(gather(chunk, sink.missing()))
    assert b"".join(buffers) == wanted == seen


@given(points, points, st.integers(1, 8), st.integers(1, 40))
def test_large_and_small_buffers_are_filled_and_seen_in_order(
    into: list[int], held: list[int], small: int, block: int
) -> None:
    buffers, seen = memory(*cut(len(DATA), into)), bytearray()
    sizes = {"BLOCK_BYTES": block, "LEAST_SEEN": block // 2, "SMALL_BYTES": small}
    with mock.patch.multiple("replication.sink", **sizes):
        sink = Sink([ByteRange(0, len(DATA))], views(buffers), seen.extend)
        sink.fill(gather(chunk_of(DATA, cut(len(DATA), held)), sink.missing()))
    assert b"".join(buffers) == DATA == seen
    assert sink.missing() == []


def test_many_small_buffers_are_seen_in_a_few_calls() -> None:
    seen: list[int] = []
    count = 2 * LEAST_SEEN // 1024
    sink = Sink(
        [ByteRange(0, count * 1024)],
        views(memory(*[1024] * count)),
        lambda s: seen.append(s.nbytes),
    )
    sink.fill([memoryview(bytes(count * 1024))])
    assert seen == [LEAST_SEEN, LEAST_SEEN]


def test_a_copy_that_is_cancelled_ends_after_its_block() -> None:
    (buffer,) = memory(4 * BLOCK_BYTES)
    ended: list[bool] = []

    def cancel(_: memoryview) -> None:
        thread.start()
        wait_for(lambda: sink.is_cancelled)

    sink = CancellableSink([ByteRange(0, len(buffer))], views([buffer]), cancel)
    thread = threading.Thread(target=lambda: ended.append(sink.cancel()))
    with pytest.raises(ReadCancelledError):
        sink.fill([memoryview(b"x" * len(buffer))])
    thread.join()
    assert ended == [True]
    assert buffer == b"x" * BLOCK_BYTES + bytes(3 * BLOCK_BYTES)


def test_neighbouring_ranges_become_one() -> None:
    ranges = [ByteRange(0, 3), ByteRange(3, 5), ByteRange(7, 7), ByteRange(5, 6), ByteRange(9, 10)]
    sink = Sink(ranges, views(memory(7)))
    assert sink.missing() == [ByteRange(0, 6), ByteRange(9, 10)]
    assert sink.missing(1) == [ByteRange(0, 6)]
    sink.advance(2)
    assert sink.missing() == [ByteRange(2, 6), ByteRange(9, 10)]
    assert (sink.done_bytes, sink.missing_bytes, sink.total_bytes) == (2, 5, 7)


def test_buffers_of_any_type_are_filled_as_bytes() -> None:
    numbers = np.zeros(2, dtype=np.float64)
    sink = Sink([ByteRange(0, 16)], [numbers.data])
    sink.fill([memoryview(np.array([1.5, -2.5]).tobytes())])
    assert numbers.tolist() == [1.5, -2.5]


def test_what_cannot_be_read_into_is_refused_before_any_byte() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Sink([ByteRange(0, 3)], [memoryview(b"abc")])
    with pytest.raises(ValueError, match="4 bytes are to go into buffers of 3 bytes"):
        Sink([ByteRange(0, 4)], views(memory(3)))
    for wrong in (ByteRange(3, 2), ByteRange(-1, 2)):
        with pytest.raises(ValueError, match="no range"):
            Sink([wrong], [])


def test_gathered_views_are_the_chunks_own_memory() -> None:
    chunk = [np.zeros(4, dtype=np.uint8), np.zeros(0, dtype=np.uint8), np.zeros(4, dtype=np.uint8)]
    pieces = gather(chunk, [ByteRange(3, 6)])
    chunk[0][3], chunk[2][0] = 1, 2
    assert b"".join(pieces) == b"\1\2\0"
    assert size_of(chunk) == 8
    assert gather([], []) == []
