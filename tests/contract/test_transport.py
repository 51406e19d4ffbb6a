"""What every transport must do: one suite, over TCP, over Ray and a fake of it, and over both."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import psutil
import pytest
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from chaos.local_cluster import LocalCluster
from replication import transport as transport_module
from replication.checksum import Digest, digest
from replication.chunk_server import ChunkServer
from replication.dataplane import ClientLimits, TcpTransport
from replication.errors import (
    HolderTimeoutError,
    HolderUnavailableError,
    ProtocolError,
    ShardNotHeldError,
)
from replication.records import ByteRange, Chunk, ChunkId, ShardKey
from replication.sink import Sink, size_of
from replication.transport import FallbackTransport, RayTransport, Source, Transport
from tests.unit.replication.peers import (
    KEY,
    NODE,
    SECRET,
    Store,
    bytes_of,
    id_of,
    random_chunk,
)

CHUNKS = [random_chunk(100_000, 0, 1, 200_001), random_chunk(0), random_chunk(5000), []]
HANGS = 99  # asking for this chunk takes for ever


class Place(Protocol):
    """A holder with CHUNKS, and a way to it."""

    transport: Transport
    source: Source

    def die(self) -> None: ...

    def close(self) -> None: ...


class TcpPlace:
    def __init__(self) -> None:
        over = self._over = threading.Event()

        class Hanging(Store):
            def read(self, key: ShardKey, index: int) -> Chunk:
                if index == HANGS:
                    over.wait(30.0)
                return super().read(key, index)

        self.server = ChunkServer(Hanging(Store.of(*CHUNKS)).read, SECRET, "127.0.0.1")
        self.transport: Transport = TcpTransport(SECRET, limits=ClientLimits(pause_s=0.0))
        self.source = Source(NODE, None, self.server.endpoint)

    def die(self) -> None:
        self._over.set()
        self.server.close()

    def close(self) -> None:
        self.transport.close()
        self.die()


class FakeHandle:
    """A holder's actor handle; `FakeRay.get` plays the rest."""

    def __init__(self) -> None:
        self.store = Store.of(*CHUNKS)
        self.is_dead = False
        self.failure: Exception | None = None
        self.calls = 0
        self.read_chunk = self

    def remote(self, key: ShardKey, index: int) -> Any:
        self.calls += 1

        def answer(timeout: float) -> Chunk:
            if self.failure is not None:
                raise self.failure
            if self.is_dead:
                raise RayActorError
            if index == HANGS:
                threading.Event().wait(timeout)
                raise GetTimeoutError
            try:
                return self.store.read(key, index)
            except ShardNotHeldError as error:
                raise RayTaskError("read_chunk", "traceback", error) from None

        return answer

    def die(self) -> None:
        self.is_dead = True


class FakeRayPlace:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(transport_module.ray, "get", lambda answer, timeout: answer(timeout))
        self.handle = FakeHandle()
        self.transport: Transport = RayTransport()
        self.source = Source(NODE, self.handle, None)

    def die(self) -> None:
        self.handle.die()

    def close(self) -> None:
        self.transport.close()


class BothPlace(TcpPlace):
    """TCP first, the fake of Ray second."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        patch.setattr(transport_module.ray, "get", lambda answer, timeout: answer(timeout))
        self.handle = FakeHandle()
        self.tcp = self.transport
        self.transport = FallbackTransport(self.tcp, RayTransport())
        self.source = Source(NODE, self.handle, self.server.endpoint)

    def die(self) -> None:
        super().die()
        self.handle.die()


class SecondOnlyPlace(BothPlace):
    """TCP is known and out of order: everything comes by the second way."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(patch)
        self.server.close()


class RealHolder:
    """As much of a holder as `RayTransport` needs."""

    def __init__(self) -> None:
        self.store = Store.of(*CHUNKS)

    def read_chunk(self, key: ShardKey, index: int) -> Chunk:
        if index == HANGS:
            threading.Event().wait(60.0)
        return self.store.read(key, index)

    def pid(self) -> int:
        return os.getpid()


class RealRayPlace:
    def __init__(self) -> None:
        actor: Any = ray.remote(RealHolder).options(num_cpus=0, max_concurrency=8)
        self.transport: Transport = RayTransport()
        self.source = Source(NODE, actor.remote(), None)
        self._process = psutil.Process(ray.get(self.source.actor.pid.remote(), timeout=60))

    def die(self) -> None:
        """`ray.kill` only asks: until the process is gone it may still answer."""
        ray.kill(self.source.actor)
        self._process.wait(timeout=30)

    def close(self) -> None:
        self.die()


@pytest.fixture(scope="module")
def one_host() -> Iterator[LocalCluster]:
    with LocalCluster(hosts=1, object_store_bytes=200 << 20) as running:
        yield running


@pytest.fixture(
    params=["tcp", "fake ray", "both", "second", pytest.param("ray", marks=pytest.mark.cluster)]
)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    made: Place
    match request.param:
        case "tcp":
            made = TcpPlace()
        case "fake ray":
            made = FakeRayPlace(monkeypatch)
        case "both":
            made = BothPlace(monkeypatch)
        case "second":
            made = SecondOnlyPlace(monkeypatch)
        case _:
            request.getfixturevalue("one_host")
            made = RealRayPlace()
    yield made
    made.close()


def read(
    place: Place, index: int, ranges: list[ByteRange], *sizes: int, timeout_s: float = 10.0
) -> bytes:
    buffers = [bytearray(size) for size in sizes]
    sink = Sink(ranges, [memoryview(buffer) for buffer in buffers])
    place.transport.read(place.source, id_of(CHUNKS[index], index), sink, timeout_s)
    return b"".join(buffers)


@pytest.mark.parametrize("index", range(len(CHUNKS)))
def test_a_whole_chunk_is_fetched(place: Place, index: int) -> None:
    chunk = place.transport.fetch(place.source, id_of(CHUNKS[index], index), 10.0)
    assert digest(chunk) == digest(CHUNKS[index])
    assert size_of(chunk) == size_of(CHUNKS[index])
    assert all(buffer.dtype == np.uint8 and buffer.ndim == 1 for buffer in chunk)


def test_ranges_go_where_the_caller_says(place: Place) -> None:
    whole = bytes_of(CHUNKS[0])
    ranges = [ByteRange(99_990, 100_011), ByteRange(5, 5), ByteRange(0, 3), ByteRange(1, 300_002)]
    got = read(place, 0, ranges, 1, 20, 0, 150_000, 150_004)
    assert got == b"".join(whole[r.start : r.stop] for r in ranges)


def test_nothing_can_be_read(place: Place) -> None:
    assert read(place, 0, []) == b""
    assert read(place, 1, [ByteRange(0, 0)], 0) == b""


def test_every_byte_is_seen_once_and_in_order(place: Place) -> None:
    checksum, target = Digest(), bytearray(300_002)
    sink = Sink([ByteRange(0, 300_002)], [memoryview(target)], checksum.update)
    place.transport.read(place.source, id_of(CHUNKS[0]), sink, 10.0)
    assert checksum.digest() == digest(CHUNKS[0])
    assert sink.missing_bytes == 0


def test_a_read_goes_on_where_another_stopped(place: Place) -> None:
    whole = bytes_of(CHUNKS[0])
    seen, target = bytearray(), bytearray(300_002)
    sink = Sink([ByteRange(0, 300_002)], [memoryview(target)], seen.extend)
    sink.fill([memoryview(whole)[:123_456]])
    place.transport.read(place.source, id_of(CHUNKS[0]), sink, 10.0)
    assert target == seen == whole


def test_what_is_not_held_is_an_error_of_its_own(place: Place) -> None:
    for missing in (
        ChunkId(KEY, 50, 10),
        ChunkId(ShardKey("job", KEY.version, 77), 0, 300_002),
    ):
        with pytest.raises(ShardNotHeldError):
            place.transport.fetch(place.source, missing, 10.0)
    assert read(place, 2, [ByteRange(0, 5000)], 5000) == bytes_of(CHUNKS[2])


@pytest.mark.parametrize("size_bytes", [300_001, 300_003, 0])
def test_a_copy_of_another_size_is_refused(place: Place, size_bytes: int) -> None:
    wrong = ChunkId(KEY, 0, size_bytes)
    with pytest.raises(ProtocolError, match="300002 bytes"):
        place.transport.fetch(place.source, wrong, 10.0)
    target = bytearray(size_bytes)
    sink = Sink([ByteRange(0, size_bytes)], [memoryview(target)])
    with pytest.raises(ProtocolError, match="300002 bytes"):
        place.transport.read(place.source, wrong, sink, 10.0)


def test_a_holder_that_hangs_costs_the_deadline(place: Place) -> None:
    began_s = time.monotonic()
    with pytest.raises(HolderTimeoutError):
        place.transport.fetch(place.source, ChunkId(KEY, HANGS, 10), 0.1)
    assert time.monotonic() - began_s < 3.0


def test_a_dead_holder_is_unavailable_long_before_the_deadline(place: Place) -> None:
    read(place, 2, [ByteRange(0, 5000)], 5000)
    place.die()
    began_s = time.monotonic()
    for _ in range(2):
        with pytest.raises(HolderUnavailableError):
            read(place, 2, [ByteRange(0, 5000)], 5000)
    assert time.monotonic() - began_s < 8.0


def test_several_threads_read_at_once(place: Place) -> None:
    def one(n: int) -> bool:
        index = n % 3
        size = size_of(CHUNKS[index])
        return read(place, index, [ByteRange(0, size)], size) == bytes_of(CHUNKS[index])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(12)))


def test_after_close_reads_work_again(place: Place) -> None:
    for _ in range(2):
        assert read(place, 2, [ByteRange(0, 5000)], 5000) == bytes_of(CHUNKS[2])
        place.transport.close()


# --- the fallback itself ------------------------------------------------------------------------


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Iterator[BothPlace]:
    made = BothPlace(monkeypatch)
    yield made
    made.close()


def fetch(place: Place, index: int = 2) -> None:
    place.transport.fetch(place.source, id_of(CHUNKS[index], index), 5.0)


def test_the_first_way_is_used_while_it_works(both: BothPlace) -> None:
    fetch(both)
    read(both, 0, [ByteRange(10, 20)], 10)
    assert both.handle.calls == 0
    assert (both.tcp.bytes_read, both.transport.bytes_read) == (5010, 5010)


def test_a_change_of_ways_is_logged_once_each(
    both: BothPlace, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="replication.transport")
    both.server.close()
    for _ in range(3):
        fetch(both)
    assert caplog.text.count("its chunks come by way of ray") == 1
    assert (both.tcp.bytes_read, both.transport.bytes_read) == (0, 15_000)
    both.server = ChunkServer(Store.of(*CHUNKS).read, SECRET, "127.0.0.1")
    both.source = Source(NODE, both.handle, both.server.endpoint)
    for _ in range(3):
        fetch(both)
    assert caplog.text.count("come by way of tcp again") == 1
    assert both.handle.calls == 3


def test_neither_a_deadline_nor_a_missing_chunk_is_tried_twice(both: BothPlace) -> None:
    with pytest.raises(HolderTimeoutError):
        both.transport.fetch(both.source, ChunkId(KEY, HANGS, 10), 0.05)
    with pytest.raises(ShardNotHeldError):
        both.transport.fetch(both.source, ChunkId(KEY, 50, 10), 5.0)
    assert both.handle.calls == 0


def test_without_an_endpoint_the_second_way_is_no_failure(
    both: BothPlace, caplog: pytest.LogCaptureFixture
) -> None:
    both.source = Source(NODE, both.handle, None)
    fetch(both)
    assert both.handle.calls == 1
    assert caplog.text == ""


def test_a_way_that_needs_no_endpoint_is_tried_without_one(both: BothPlace) -> None:
    both.transport = FallbackTransport(RayTransport(), both.tcp, needs_endpoint=False)
    both.source = Source(NODE, both.handle, None)
    fetch(both)
    assert (both.handle.calls, both.tcp.bytes_read) == (1, 0)


def test_the_second_way_goes_on_where_the_first_stopped(both: BothPlace) -> None:
    class Half:
        name, bytes_read = "half", 0

        def read(self, source: Source, chunk: ChunkId, sink: Sink, timeout_s: float) -> None:
            sink.fill([memoryview(bytes_of(CHUNKS[0]))[:1000]])
            raise HolderUnavailableError(NODE, "cut off")

        def fetch(self, source: Source, chunk: ChunkId, timeout_s: float) -> Chunk:
            raise NotImplementedError

        def close(self) -> None: ...

    both.transport = FallbackTransport(Half(), RayTransport())
    checksum, target = Digest(), bytearray(300_002)
    sink = Sink([ByteRange(0, 300_002)], [memoryview(target)], checksum.update)
    both.transport.read(both.source, id_of(CHUNKS[0]), sink, 5.0)
    assert checksum.digest() == digest(CHUNKS[0])


@pytest.mark.parametrize(
    "failure",
    [
        RayActorError(),
        ObjectLostError("00" * 28, "address", ""),
        RayTaskError("read_chunk", "traceback\nKeyError: 'a bug'", KeyError("a bug")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_ray_says_the_holder_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    place = FakeRayPlace(monkeypatch)
    place.handle.failure = failure
    with pytest.raises(HolderUnavailableError):
        fetch(place)
