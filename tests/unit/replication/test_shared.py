"""Reading through a file that two mappings share, as two processes do with the object store."""

import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import GetTimeoutError, RayActorError

from replication import shared
from replication.dataplane import Access
from replication.errors import HolderTimeoutError, HolderUnavailableError, ProtocolError
from replication.records import ByteRange, Chunk, ChunkId, Endpoint, ShardKey, Version
from replication.shared import (
    Mapping,
    Place,
    Places,
    SharedMemoryTransport,
    mappings,
    own_mappings,
    places_of,
    view_of,
)
from replication.sink import BLOCK_BYTES, Sink
from replication.transport import Source
from replication.wire import Secret

MAPS = """\
7f0000000000-7f0000100000 rw-s 00002000 00:1a 77     /dev/shm/plasma (deleted)
7f0000200000-7f0000300000 r--s 00000000 00:1a 78     /dev/shm/other
7f0000400000-7f0000500000 rw-p 00000000 00:00 0
7f0000600000-7f0000700000 ---s 00000000 00:1a 79     /dev/shm/none
"""
KEY = ShardKey("job", Version(1, 10), 0)
SIZE = 3 * BLOCK_BYTES + 17
ACCESS = Access(Endpoint("127.0.0.1", 1), Secret(b"s" * 32))
SMAPS = Path("/proc/self/smaps")


@pytest.fixture
def store() -> Iterator[np.ndarray[Any, Any]]:
    """A holder's view of a file; the reader's mapping of it is another one."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(8 << 20)
        holders, readers = mmap.mmap(file.fileno(), 0), mmap.mmap(file.fileno(), 0)
        memory = np.frombuffer(holders, dtype=np.uint8)
        memory[:] = np.random.default_rng(0).integers(0, 256, memory.nbytes, dtype=np.uint8)
        yield memory
        del memory
        readers.close()


def test_only_shared_readable_mappings_count() -> None:
    assert mappings(MAPS.splitlines()) == [
        Mapping(("00:1a", "77"), 0x2000, 0x7F0000000000, 0x7F0000100000),
        Mapping(("00:1a", "78"), 0, 0x7F0000200000, 0x7F0000300000),
    ]


def test_a_place_is_the_same_bytes_in_every_mapping(store: np.ndarray[Any, Any]) -> None:
    chunk: Chunk = [store[4096:5000], store[:0], store[70_000:90_001]]
    places = places_of(chunk, own_mappings())
    assert places is not None
    assert [p.size_bytes for p in places] == [904, 20_001]
    for place, buffer in zip(places, (chunk[0], chunk[2]), strict=True):
        mine = [one for one in own_mappings() if one.file == place.file]
        assert len(mine) == 2
        for one in mine:
            view = view_of(place, [one])
            assert view is not None
            assert not view.flags.writeable
            assert np.array_equal(view, buffer)


def test_private_memory_has_no_place() -> None:
    assert places_of([np.zeros(100_000, dtype=np.uint8)], own_mappings()) is None


@pytest.mark.parametrize(
    "place",
    [
        Place(("00:1a", "78"), 0x100000 - 1, 2),
        Place(("00:1a", "77"), 0x1FFF, 2),
        Place(("00:1b", "77"), 0x3000, 2),
    ],
)
def test_a_place_outside_of_what_is_mapped_has_no_view(place: Place) -> None:
    assert view_of(place, mappings(MAPS.splitlines())) is None


class FakeHolder:
    """An actor whose `places` answers at once."""

    def __init__(self, answer: Any) -> None:
        self.places = self
        self.calls = 0
        self._answer = answer if isinstance(answer, Exception) else [answer]

    def remote(self, key: ShardKey) -> Any:
        self.calls += 1
        return self._answer


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> SharedMemoryTransport:
    def get(reference: Any, timeout: float) -> Any:
        if isinstance(reference, Exception):
            raise reference
        return reference

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(shared, "pin", lambda chunk: chunk)
    return SharedMemoryTransport()


def read(transport: SharedMemoryTransport, answer: Any, size: int = SIZE) -> bytes:
    memory = bytearray(size)
    seen = bytearray()
    sink = Sink([ByteRange(0, size)], [memoryview(memory)], seen.extend)
    transport.read(Source("node", FakeHolder(answer)), ChunkId(KEY, 0, size), sink, 1.0)
    assert bytes(seen) == bytes(memory)
    return bytes(memory)


def test_a_chunk_is_read_with_its_checksum_on_the_way(
    store: np.ndarray[Any, Any], transport: SharedMemoryTransport
) -> None:
    places = places_of([store[:SIZE]], own_mappings())
    assert read(transport, places) == store[:SIZE].tobytes()
    assert transport.bytes_read == SIZE


def test_a_read_goes_on_where_another_one_stopped(
    store: np.ndarray[Any, Any], transport: SharedMemoryTransport
) -> None:
    places = places_of([store[:SIZE]], own_mappings())
    memory = bytearray(SIZE)
    sink = Sink([ByteRange(0, SIZE)], [memoryview(memory)])
    sink.fill([store[:1000].data])
    transport.read(Source("node", FakeHolder(places)), ChunkId(KEY, 0, SIZE), sink, 1.0)
    assert bytes(memory) == store[:SIZE].tobytes()
    assert transport.bytes_read == SIZE - 1000


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the system was asked for this process' mappings."""
    asked: list[int] = []

    def ask() -> list[Mapping]:
        asked.append(1)
        return own_mappings()

    monkeypatch.setattr(shared, "own_mappings", ask)
    return asked


def test_the_system_is_asked_for_a_mapping_once(
    store: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, places = counted(monkeypatch), Places()
    for start in (0, 4096, 1 << 20):
        chunk = [store[start : start + SIZE]]
        assert places.of(chunk) == places_of(chunk, own_mappings())
    assert len(asked) == 1
    assert places.of([np.zeros(100_000, dtype=np.uint8)]) is None
    assert len(asked) == 2


def test_where_the_sentinel_lies_is_read_without_asking_again(
    store: np.ndarray[Any, Any],
    transport: SharedMemoryTransport,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = counted(monkeypatch)
    monkeypatch.setattr(shared, "pin", lambda chunk: [store[4 << 20 : 5 << 20]])
    places = places_of([store[:SIZE]], own_mappings())
    for _ in range(3):
        assert read(transport, places) == store[:SIZE].tobytes()
    assert len(asked) == 1
    transport.close()  # the sentinel goes, and with it what is known of its mapping
    assert read(transport, places) == store[:SIZE].tobytes()
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (None, HolderUnavailableError),
        ([Place(("ff:ff", "1"), 0, SIZE)], HolderUnavailableError),
        (GetTimeoutError(), HolderTimeoutError),
        (RayActorError(), HolderUnavailableError),
    ],
)
def test_what_cannot_be_read_so_is_said(
    transport: SharedMemoryTransport, answer: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        read(transport, answer)


def test_a_holder_is_asked_once_for_all_of_a_shard(
    store: np.ndarray[Any, Any], transport: SharedMemoryTransport
) -> None:
    chunks = [store[:5000], store[8192:20_000], np.zeros(3000, dtype=np.uint8)]
    holder = FakeHolder(None)
    holder._answer = [places_of([chunk], own_mappings()) for chunk in chunks]
    source = Source("node", holder)
    for index, chunk in enumerate(chunks[:2]):
        got = transport.fetch(source, ChunkId(KEY, index, chunk.nbytes), 1.0)
        assert np.array_equal(np.concatenate(got), chunk)
    for index in (2, 3):  # in memory of its own, and one that is not there
        with pytest.raises(HolderUnavailableError):
            transport.fetch(source, ChunkId(KEY, index, 3000), 1.0)
    assert holder.calls == 1


def test_buffers_without_a_gap_between_them_are_one_place(store: np.ndarray[Any, Any]) -> None:
    chunk: Chunk = [store[:64], store[64:128], store[192:256]]
    places = places_of(chunk, own_mappings())
    assert places is not None
    assert [place.size_bytes for place in places] == [128, 64]


def test_a_copy_of_another_size_is_refused(
    store: np.ndarray[Any, Any], transport: SharedMemoryTransport
) -> None:
    places = places_of([store[: SIZE - 1]], own_mappings())
    with pytest.raises(ProtocolError):
        read(transport, places)


# --- getting ready ------------------------------------------------------------------------------


def mapped_bytes(mapping: Mapping) -> int:
    """How much of a mapping this process has page table entries for, by /proc/self/smaps."""
    parts = SMAPS.read_text().split(f"{mapping.start:x}-{mapping.stop:x} ")
    (line,) = [line for line in parts[1].splitlines() if line.startswith("Rss:")][:1]
    return int(line.split()[1]) << 10


class ReadyHolder(FakeHolder):
    """Also tells of the newest shard."""

    def __init__(self, newest: Any) -> None:
        super().__init__(newest and newest[1])
        self._answer = newest and newest[1]
        self.newest_places = ReadyHolder.Call(newest, KEY.job, KEY.rank)
        self.access = ReadyHolder.Call(ACCESS)

    class Call:
        def __init__(self, answer: Any, *expected: Any) -> None:
            self._answer, self._expected = answer, expected

        def remote(self, *args: Any) -> Any:
            assert args == self._expected
            return self._answer


def test_the_shard_that_is_likely_wanted_is_mapped_and_located_ahead(
    transport: SharedMemoryTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(8 << 20)
        file.write(bytes(range(256)) * (SIZE // 256 + 1))
        file.flush()
        memory = np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.uint8)
        (mine,) = (one for one in own_mappings() if one.start == memory.ctypes.data)
        monkeypatch.setattr(shared, "pin", lambda chunk: [memory[7 << 20 :]])
        holder = ReadyHolder((KEY, [places_of([memory[:SIZE]], own_mappings()), None]))
        before = mapped_bytes(mine)
        transport.open(Source("node", holder), KEY.job, KEY.rank, 1.0)
        assert before < SIZE <= mapped_bytes(mine)
        assert transport.access_beside("node", KEY) is ACCESS
        assert transport.access_beside("node", KEY._replace(rank=1)) is None  # it would be asked
        assert transport.is_mapped("node", ChunkId(KEY, 0, SIZE))
        assert not transport.is_mapped("node", ChunkId(KEY, 1, SIZE))
        assert not transport.is_mapped("node", ChunkId(KEY._replace(rank=1), 0, SIZE))
        (got,) = transport.fetch(Source("node", holder), ChunkId(KEY, 0, SIZE), 1.0)
        assert np.array_equal(got, memory[:SIZE])
        assert holder.calls == 0


@pytest.mark.parametrize("answer", [RayActorError(), GetTimeoutError()])
def test_a_holder_that_does_not_say_how_it_is_reached_is_asked_again(
    transport: SharedMemoryTransport, answer: Any
) -> None:
    silent = ReadyHolder(None)
    silent.access = ReadyHolder.Call(answer)
    transport.open(Source("node", silent), KEY.job, KEY.rank, 1.0)
    assert transport.access_beside("node", KEY) is None


@pytest.mark.parametrize("newest", [None, RayActorError(), GetTimeoutError()])
def test_a_holder_that_cannot_tell_is_asked_when_it_is_needed(
    store: np.ndarray[Any, Any], transport: SharedMemoryTransport, newest: Any
) -> None:
    silent = ReadyHolder(None)
    silent.newest_places = ReadyHolder.Call(newest, KEY.job, KEY.rank)
    transport.open(Source("node", silent), KEY.job, KEY.rank, 1.0)
    assert read(transport, places_of([store[:SIZE]], own_mappings())) == store[:SIZE].tobytes()


def test_nothing_is_mapped_any_more_for_who_is_done(
    store: np.ndarray[Any, Any], transport: SharedMemoryTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "pin", lambda chunk: [store[4 << 20 : 5 << 20]])
    touched: list[int] = []

    def touch(view: Any) -> None:
        touched.append(view.nbytes)
        transport.close()

    monkeypatch.setattr(shared, "touch", touch)
    places = [places_of([store[start : start + 5000]], own_mappings()) for start in (0, 8192)]
    holder = ReadyHolder((KEY, places))
    transport.open(Source("node", holder), KEY.job, KEY.rank, 1.0)
    assert touched == [5000]
    assert transport.access_beside("node", KEY) is None
