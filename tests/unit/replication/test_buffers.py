"""Memory that chunks arrive or are staged in: used again, never while anybody still sees it."""

import ctypes
import gc
import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from replication import buffers, pinning
from replication.buffers import LEAST_BYTES, ROUND_BYTES, Buffers, Lease, Loan
from replication.records import Chunk

MIB = 1 << 20


@dataclass(frozen=True)
class Reference:
    """To an object, which has a number."""

    number: int

    def hex(self) -> str:
        return f"object {self.number}"


class FakeObjectStore:
    """Copies into shared memory, as the object store does, and hands out read-only views."""

    def __init__(self, *, is_memory: bool = True) -> None:
        self.is_memory = is_memory
        self.puts, self.room = 0, 1000

    def put(self, chunk: Chunk) -> tuple[Reference, Chunk]:
        if self.puts == self.room:
            raise MemoryError
        self.puts += 1
        pinned = []
        for buffer in chunk:
            if self.is_memory:
                descriptor = os.memfd_create("store")
                os.ftruncate(descriptor, buffer.nbytes + 1)  # an empty file cannot be mapped
                memory = mmap.mmap(descriptor, buffer.nbytes + 1)
                os.close(descriptor)
                view = np.frombuffer(memory, dtype=np.uint8)[: buffer.nbytes]
            else:
                view = np.empty(buffer.nbytes, dtype=np.uint8)
            view[:] = buffer
            view.flags.writeable = False
            pinned.append(view)
        return Reference(self.puts), pinned


@pytest.fixture
def store() -> FakeObjectStore:
    return FakeObjectStore()


@pytest.fixture(autouse=True)
def no_garbage() -> Iterator[None]:
    """What a view keeps is free when the view is gone, without a collection of cycles."""
    gc.disable()
    yield
    gc.enable()


def filled(lease: Lease, value: int) -> Chunk:
    np.frombuffer(lease.view, dtype=np.uint8)[:] = value
    return lease.pin()


def test_what_was_received_is_pinned_where_it_lies(store: FakeObjectStore) -> None:
    received = Buffers(store.put)
    lease = received.lease(MIB + 5)
    assert lease.view.nbytes == MIB + 5
    address = np.frombuffer(lease.view, dtype=np.uint8).ctypes.data
    (buffer,) = filled(lease, 7)
    assert buffer.ctypes.data == address
    assert (buffer.nbytes, buffer.min(), buffer.max()) == (MIB + 5, 7, 7)
    assert not buffer.flags.writeable
    assert store.puts == 1


def test_memory_is_used_again_when_the_last_view_is_gone(store: FakeObjectStore) -> None:
    received = Buffers(store.put)
    (first,) = filled(received.lease(2 * MIB), 1)
    part, raw = first[100:200], first.data
    del first
    for _ in range(2):  # a slice, then a memoryview: whatever it is, it keeps the bytes
        (other,) = filled(received.lease(2 * MIB), 2)
        assert np.frombuffer(part, np.uint8).max() == 1
        del other
    assert store.puts == 2
    del part
    assert received.free_bytes == 2 * MIB
    assert raw[0] == 1
    del raw
    assert received.free_bytes == 4 * MIB
    both = [received.lease(2 * MIB), received.lease(2 * MIB)]
    assert store.puts == 2
    del both
    assert received.free_bytes == 4 * MIB


def test_a_lease_that_was_dropped_is_free_again(store: FakeObjectStore) -> None:
    received = Buffers(store.put)
    lease = received.lease(MIB)
    view = lease.view
    del lease
    assert received.free_bytes == 0  # whoever still writes there keeps it
    view[0] = 1
    del view
    assert received.free_bytes == MIB
    received.lease(MIB)
    assert store.puts == 1


def test_nearly_equal_sizes_share(store: FakeObjectStore) -> None:
    received = Buffers(store.put)
    for size in (MIB + 1, MIB + ROUND_BYTES, MIB + 77):
        (buffer,) = filled(received.lease(size), 1)
        assert buffer.nbytes == size
        del buffer
    assert store.puts == 1
    assert received.free_bytes == MIB + ROUND_BYTES
    received.lease(MIB)
    assert store.puts == 2


def test_trim_gives_memory_back_to_the_object_store(store: FakeObjectStore) -> None:
    received = Buffers(store.put)
    leases = [received.lease(size * MIB) for size in (1, 1, 2, 4)]
    kept = leases.pop()
    leases.clear()
    assert received.free_bytes == 4 * MIB
    received.trim(4 * MIB)
    assert received.free_bytes == 4 * MIB
    received.trim(3 * MIB)
    assert received.free_bytes == 2 * MIB  # the largest went first
    received.trim(0)
    assert received.free_bytes == 0
    filled(kept, 9)  # lent before, and alive as long as it is
    received.trim(0)
    assert received.free_bytes == 0


def test_small_chunks_are_put(store: FakeObjectStore) -> None:
    received = Buffers(store.put)
    for size in (0, 1, LEAST_BYTES - 1):
        (buffer,) = filled(received.lease(size), 3)
        assert buffer.tolist() == [3] * size
        assert not buffer.flags.writeable
    assert store.puts == 3
    assert received.free_bytes == 0


def test_where_object_store_memory_cannot_be_written_chunks_are_put(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = FakeObjectStore(is_memory=False)
    received = Buffers(store.put)
    for value in (1, 2):
        (buffer,) = filled(received.lease(MIB), value)
        assert (buffer.min(), buffer.max()) == (value, value)
    assert store.puts == 3  # one of them to find out
    assert caplog.text.count("not writable here") == 1
    assert received.free_bytes == 0


def test_one_object_that_went_to_a_file_changes_nothing_for_the_others(
    store: FakeObjectStore,
) -> None:
    received = Buffers(store.put)
    held = filled(received.lease(MIB), 1)
    store.is_memory = False
    (buffer,) = filled(received.lease(MIB), 2)
    assert buffer.max() == 2
    store.is_memory = True
    del held
    (buffer,) = filled(received.lease(MIB), 3)
    assert store.puts == 3
    assert buffer.max() == 3


def test_without_proc_chunks_are_put(
    store: FakeObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinning, "MAPS", pinning.MAPS / "nothing here")
    (buffer,) = filled(Buffers(store.put).lease(MIB), 4)
    assert buffer.max() == 4
    assert store.puts == 2


def test_own_memory_is_warm_and_not_pinned_twice() -> None:
    store = FakeObjectStore(is_memory=False)
    received = Buffers(store.put)
    filled(received.lease(MIB), 1)
    lease = received.lease(MIB)
    address = np.frombuffer(lease.view, np.uint8).ctypes.data
    lease.pin()
    with pytest.raises(AssertionError):
        lease.pin()
    again = received.lease(1000)
    assert np.frombuffer(again.view, np.uint8).ctypes.data == address


def written_elsewhere(loan: Loan, value: int) -> None:
    """As another process writes that has the same memory mapped."""
    buffer = loan._memory.buffer
    (ctypes.c_uint8 * buffer.nbytes).from_address(buffer.ctypes.data)[:] = [value] * buffer.nbytes


def test_what_was_lent_and_staged_serves_again_when_the_last_view_is_gone(
    store: FakeObjectStore,
) -> None:
    memory = Buffers(store.put)
    first, second = memory.lend([100_000, 3])
    assert (first.name, first.reference) == ("object 1", Reference(1))
    assert (first.size_bytes, second.size_bytes) == (2 * ROUND_BYTES, ROUND_BYTES)
    written_elsewhere(first, 7)
    (chunk,) = first.pin(100_000)
    del first
    assert (chunk.nbytes, chunk.min(), chunk.max()) == (100_000, 7, 7)
    assert not chunk.flags.writeable
    (other,) = memory.lend([100_000])
    assert other.name == "object 3"
    sending = chunk.data[5:6]
    del chunk
    assert memory.free_bytes == 0
    del sending
    assert memory.free_bytes == 2 * ROUND_BYTES
    (again,) = memory.lend([90_000])
    assert again.name == "object 1"
    assert (store.puts, memory.free_bytes) == (3, 0)


def test_what_was_lent_and_not_staged_does_not_serve_again(store: FakeObjectStore) -> None:
    memory = Buffers(store.put)
    loans = memory.lend([MIB])
    loans.clear()  # whoever has it may write on
    assert memory.free_bytes == 0
    (other,) = memory.lend([MIB])
    assert other.name == "object 2"


def test_what_a_shard_from_elsewhere_has_left_is_lent_too(store: FakeObjectStore) -> None:
    memory = Buffers(store.put)
    filled(memory.lease(MIB), 1)
    (loan,) = memory.lend([MIB - 1])
    assert loan.name == "object 1"
    loan.pin(1)
    memory.lease(MIB)
    assert store.puts == 1


def test_free_memory_is_lent_at_once_and_new_memory_as_time_allows(
    store: FakeObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Buffers(store.put)
    monkeypatch.setattr(buffers, "MAKE_S", -1.0)
    assert len(memory.lend([MIB, MIB, MIB])) == 1  # one in any case
    monkeypatch.setattr(buffers, "MAKE_S", 60.0)
    loans = memory.lend([MIB, MIB, MIB])
    assert len(loans) == 3
    for loan in loans:
        loan.pin(MIB)
    del loan, loans
    monkeypatch.setattr(buffers, "MAKE_S", -1.0)
    assert len(memory.lend([MIB, MIB, MIB, MIB])) == 3


def test_when_the_store_is_full_what_there_was_room_for_is_lent(store: FakeObjectStore) -> None:
    memory = Buffers(store.put)
    store.room = 2
    assert [loan.name for loan in memory.lend([MIB] * 3)] == ["object 1", "object 2"]
    with pytest.raises(MemoryError):
        memory.lend([MIB])


def test_no_more_is_pinned_than_was_lent(store: FakeObjectStore) -> None:
    (loan,) = Buffers(store.put).lend([5])
    with pytest.raises(ValueError, match="object 1, which has 65536"):
        loan.pin(ROUND_BYTES + 1)


def test_where_object_store_memory_cannot_be_written_nothing_is_lent() -> None:
    store = FakeObjectStore(is_memory=False)
    memory = Buffers(store.put)
    assert memory.lend([MIB]) == memory.lend([MIB]) == []
    assert store.puts == 1  # to find out


def test_threads_never_share_memory(store: FakeObjectStore) -> None:
    received = Buffers(store.put)
    problems = []

    def work(value: int) -> None:
        for _ in range(50):
            (buffer,) = filled(received.lease(MIB), value)
            if (buffer.min(), buffer.max()) != (value, value):
                problems.append(value)
            received.trim(2 * MIB)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)
    assert problems == []
    assert store.puts < 50


MAPS = """\
00400000-00452000 r-xp 00000000 08:02 173521      /usr/bin/python
7f0000000000-7f0000100000 rw-s 00000000 00:1b 447 /dev/shm/plasmaX (deleted)
7f0000200000-7f0000300000 r--s 00000000 00:1b 447 /dev/shm/plasmaX (deleted)
7f0000400000-7f0000500000 rw-p 00000000 00:00 0
7f0000600000-7f0000700000 rw-s 00000000 00:1b 447 /tmp/ray/plasmaX (deleted)
7f0000800000-7f0000900000 rw-s 00000000 00:01 447 /memfd:store (deleted)
"""


@pytest.mark.parametrize(
    ("address", "size", "expected"),
    [
        (0x7F0000000000, 0x100000, True),
        (0x7F0000000040, 0x100000, False),  # over the end
        (0x7F0000200000, 10, False),  # read-only
        (0x7F0000400000, 10, False),  # private
        (0x7F0000600000, 10, False),  # a file
        (0x7F0000800000, 10, True),
        (0x7F0000A00000, 10, False),  # nothing
    ],
)
def test_the_system_says_what_memory_is(address: int, size: int, expected: bool) -> None:
    found = pinning.writable_memory(MAPS.splitlines())
    assert any(start <= address and address + size <= stop for start, stop in found) is expected


def test_the_system_is_asked_once_for_a_mapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = np.zeros(100, dtype=np.uint8)
    start = buffer.ctypes.data
    maps = tmp_path / "maps"
    maps.write_text(f"{start:x}-{start + 100:x} rw-s 00000000 00:1b 447 /dev/shm/plasma\n")
    monkeypatch.setattr(pinning, "MAPS", maps)
    memory = pinning.StoreMemory()
    assert memory.holds(buffer)
    maps.unlink()
    assert memory.holds(buffer[10:])
    assert not memory.holds(np.zeros(200, dtype=np.uint8))
