import logging
import pickle
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import ray
import torch

from replication.pinning import StoreMemory, _OutOfBand
from tiered import slots as slots_module
from tiered import staging
from tiered.copying import LEAST_UNIT_BYTES
from tiered.image import Layout, chunk_sizes, data_chunk, lay_out
from tiered.slots import Slot, Staged, copy_all, slot_of
from tiered.staging import Stager
from tiered.state import Captured, capture

STATE = {
    "double": torch.arange(5, dtype=torch.float64),
    "matrix": torch.arange(40.0).reshape(5, 8),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "half": torch.arange(9).to(torch.bfloat16),
    "eighth": torch.arange(6).to(torch.float8_e4m3fn),
    "flags": torch.tensor([True, False, True]),
    "complex": torch.tensor([1 + 2j, 3 - 4j]),
    "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "scalar": torch.tensor(7),
    "nothing": torch.empty(0, 3),
    "learned": torch.nn.Parameter(torch.ones(3)),
    "mirrored": torch.tensor([[1 + 2j, 3 - 4j], [5j, 6]]).conj(),
    "negative": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "row": torch.arange(12.0).as_strided((1, 5), (7, 1)),
    "column": torch.arange(12.0).as_strided((5, 1), (2, 9)),
    "image": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
}


def fill_all(slots: list[Slot], captured: Captured, threads: int) -> None:
    with Stager(64, threads, lambda *_: []).filling(captured, slots) as filling:
        for index in range(len(slots)):
            filling.fill(index)


def slots_of(
    chunk_bytes: int, unit_bytes: int = LEAST_UNIT_BYTES
) -> tuple[list[Slot], list[bytes]]:
    """Memory as `Stager` makes it, and what must be in it."""
    captured = capture(STATE)
    layout = lay_out(captured)
    sizes = chunk_sizes(layout, 0, chunk_bytes)[1:]
    slots, expected, start = [], [], 0
    for size in sizes:
        view = np.full(size, 255, dtype=np.uint8)
        slots.append(slot_of(layout, Staged(None), view, start, start + size, unit_bytes))
        chunk = data_chunk(layout, captured.tensors, start, start + size)
        expected.append(b"".join(buffer.tobytes() for buffer in chunk))
        start += size
    return slots, expected


def test_what_is_on_a_gpu_and_what_is_not_go_their_ways_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slots, expected = slots_of(50)
    on_gpu = {id(slot): index % 3 != 1 for index, slot in enumerate(slots)}

    class Copier:
        kind = "cpu"

        def __init__(self) -> None:
            self.begun: list[int] = []
            self.finished: list[int] = []

        def is_needed(self, slot: Slot, _: Any) -> bool:
            return on_gpu[id(slot)]

        def begin(self, slot: Slot, _: Any) -> None:
            assert on_gpu[id(slot)]
            self.begun.append(id(slot))

        def finish(self, slot: Slot) -> None:
            self.finished.append(id(slot))

    copier: Any = Copier()
    captured = capture(STATE)
    with staging.Filling(captured, slots, copier, 2) as filling:
        for index in range(len(slots)):
            filling.fill(index)
    theirs = [id(slot) for slot in slots if on_gpu[id(slot)]]
    assert copier.finished == theirs
    assert list(dict.fromkeys(copier.begun)) == theirs
    for slot, bytes_ in zip(slots, expected, strict=True):
        assert (slot.view.tobytes() == bytes_) != on_gpu[id(slot)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("chunk_bytes", [7, 16, 50, 64, 4096])
def test_prepared_memory_is_filled_with_the_same_bytes(chunk_bytes: int, threads: int) -> None:
    slots, expected = slots_of(chunk_bytes)
    fill_all(slots, capture(STATE), threads)
    assert [slot.view.tobytes() for slot in slots] == expected


@pytest.mark.parametrize("torch_threads", [1, 2])
@pytest.mark.parametrize("unit_bytes", [1, 7, 40, 1000])
@pytest.mark.parametrize("chunk_bytes", [50, 4096])
def test_large_tensors_are_copied_in_pieces_and_small_ones_together(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, unit_bytes: int, torch_threads: int
) -> None:
    monkeypatch.setattr(slots_module, "PARALLEL_ELEMENTS", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
    slots, expected = slots_of(chunk_bytes, unit_bytes)
    fill_all(slots, capture(STATE), 2)
    assert [slot.view.tobytes() for slot in slots] == expected


def units_of(state: dict[str, torch.Tensor]) -> int:
    captured = capture(state)
    layout = lay_out(captured)
    view = np.zeros(layout.data_bytes, dtype=np.uint8)
    slot = slot_of(layout, Staged(None), view, 0, layout.data_bytes, LEAST_UNIT_BYTES)
    return len(list(slot.copies(captured.tensors)))


def test_a_unit_of_work_is_neither_one_small_tensor_nor_all_of_a_large_one() -> None:
    assert units_of({str(n): torch.zeros(25 << 10) for n in range(250)}) == 4  # of 100 KiB each
    assert units_of({"large": torch.zeros(3, 2 << 20)}) == 3
    assert units_of({"mirrored": torch.zeros(3, 2 << 20, dtype=torch.complex64).conj()}) == 1
    assert units_of({"transposed": torch.zeros(3, 2 << 20).t()}) == 1


@pytest.mark.parametrize(
    ("source_at", "target_at", "torch_threads", "by_memcpy"),
    [(0, 8, 1, 3), (3, 8, 1, 4003), (0, 5, 1, 4003), (5, 5, 1, 4003), (0, 8, 2, 4003)],
)
def test_large_copies_are_torchs_where_it_has_one_thread_and_words_are_aligned(
    monkeypatch: pytest.MonkeyPatch,
    source_at: int,
    target_at: int,
    torch_threads: int,
    by_memcpy: int,
) -> None:
    numpys, copied = np.copyto, list[int]()

    def copyto(target: Any, source: Any) -> None:
        copied.append(target.nbytes)
        numpys(target, source)

    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
    monkeypatch.setattr(slots_module.np, "copyto", copyto)
    source, target = (np.arange(5000, dtype=np.uint16).view(np.uint8) for _ in range(2))
    slots_module._copy_here(target[target_at:][:4003], source[source_at:][:4003])
    assert sum(copied) == by_memcpy
    assert target[target_at:][:4003].tobytes() == source[source_at:][:4003].tobytes()


def test_memory_is_prepared_for_units_that_fit_the_state_and_the_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(staging, "unit_bytes", lambda total, threads: 100 * total + threads)
    layout = lay_out(capture(STATE))
    slots = Holder(monkeypatch).prepared(layout)
    assert {slot.unit_bytes for slot in slots} == {100 * layout.data_bytes + 1}


def test_the_front_goes_into_prepared_memory_if_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "put", lambda chunk: chunk)
    stager = Stager(64, 1, lambda *_: [])
    front_slot = Slot(Staged("prepared"), np.zeros(10, dtype=np.uint8), (), [], (), ())
    assert stager.stage_front(b"0123456789", [front_slot]).reference == "prepared"
    assert stager.stage_front(b"abc", [front_slot]).reference == "prepared"
    assert front_slot.view.tobytes() == b"abc3456789"
    for slots in ([], [front_slot]):
        (put,) = stager.stage_front(b"0123456789a", slots).reference
        assert put.tobytes() == b"0123456789a"


class Reference:
    """To memory that a holder has lent."""

    def __init__(self, size_bytes: int) -> None:
        self.memory = np.full(size_bytes, 7, dtype=np.uint8)

    def hex(self) -> str:
        return f"object {id(self)}"


class Holder:
    """Lends memory, a little longer than was asked for: `room` chunks in all, `at_once` a call.

    Args:
        wanted: After so many calls the memory is not wanted any more.
        is_memory: It can be written to.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        *,
        room: int = 99,
        at_once: int = 99,
        wanted: int = 99,
        is_memory: bool = True,
    ) -> None:
        self.lent: list[Reference] = []
        self.calls: list[tuple[int, list[int]]] = []  # so many were kept; sizes
        self._room, self._at_once, self._wanted = room, at_once, wanted
        patch.setattr(ray, "get", self._get)
        patch.setattr(StoreMemory, "holds", lambda *_: is_memory)
        self.stager = Stager(4 << 10, 1, self._lend)

    def prepared(self, layout: Layout, front_bytes: int = 100) -> list[Slot]:
        """What is ready when a preparation for this layout is over."""
        self.ready = staging._Preparation(layout, front_bytes)
        self.ready.is_wanted.set()
        self.stager._prepare(self.ready)
        for slot in self.ready.slots:
            assert slot.staged.is_lent
            assert slot.view.flags.writeable
        return self.ready.slots

    def _lend(self, kept: Sequence[str], sizes: Sequence[int]) -> list[Reference]:
        if not sizes:
            self.lent.clear()
        assert kept == [reference.hex() for reference in self.lent]
        self.calls.append((len(kept), list(sizes)))
        if len(self.calls) == self._wanted:
            self.ready.is_wanted.clear()
        count = min(len(sizes), self._at_once, self._room - len(self.lent))
        new = [Reference(size + 11) for size in sizes[:count]]
        self.lent += new
        return new

    @staticmethod
    def _get(references: list[Reference], timeout: float) -> list[list[Any]]:
        return [[reference.memory] for reference in references]


SIX = lay_out(capture({"weight": torch.ones(5, 1024)}))  # chunks: the front, and five of 4 KiB
SIZES = [100, *(5 * [4 << 10])]


def test_memory_is_borrowed_with_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "BORROWED_AT_ONCE", 4)
    holder = Holder(monkeypatch)
    slots = holder.prepared(SIX)
    assert [slot.view.nbytes for slot in slots] == SIZES
    assert holder.calls == [(0, SIZES[:4]), (4, SIZES[4:])]
    for slot, reference in zip(slots, holder.lent, strict=True):
        assert slot.staged.reference is reference
        assert slot.view.ctypes.data == reference.memory.ctypes.data
    fill_all(slots, capture({"weight": torch.arange(5120.0)}), 1)
    assert slots[1].view.view(np.float32).tolist() == list(range(1024))


def test_what_the_holder_had_no_time_for_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    holder = Holder(monkeypatch, at_once=4)
    assert len(holder.prepared(SIX)) == 6
    assert holder.calls == [(0, SIZES), (4, SIZES[4:])]


def test_what_there_was_room_for_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    holder = Holder(monkeypatch, room=2)
    assert len(holder.prepared(SIX)) == 2
    assert holder.calls == [(0, SIZES), (2, SIZES[2:])]


def test_what_was_borrowed_before_it_was_not_wanted_any_more_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    holder = Holder(monkeypatch, at_once=1, wanted=3)
    assert len(holder.prepared(SIX)) == len(holder.calls) == 3


def test_without_memory_that_can_be_written_nothing_is_prepared(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    holder = Holder(monkeypatch, is_memory=False)
    assert holder.prepared(SIX) == []
    assert "mapped read-only: saving without preparation" in caplog.text
    holder.stager.prepare(SIX, 100)
    assert holder.calls == [(0, SIZES), (0, [])]  # nothing is kept


def test_memory_that_cannot_be_read_is_not_ready(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    holder = Holder(monkeypatch)

    def get(*_: Any, timeout: float) -> None:
        raise ray.exceptions.ObjectLostError("a", None, "b")

    monkeypatch.setattr(ray, "get", get)
    assert holder.prepared(SIX) == []
    assert "memory for the next save is not ready" in caplog.text


def test_once_for_each_layout_the_log_says_that_memory_is_ready(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    holder = Holder(monkeypatch, room=1000)
    one, other = lay_out(capture(STATE)), lay_out(capture({"other": torch.ones(500_000)}))
    lines = []
    for layout in (one, one, other, other):
        holder.lent.clear()
        holder.prepared(layout, 1000)
        lines.append([record.getMessage().rsplit(" in ", 1)[0] for record in caplog.records])
        caplog.clear()
    start = "memory for the next save is ready: "
    assert lines == [[f"{start}0.0 MB"], [], [f"{start}2.0 MB"], []]


def test_a_save_does_without_what_is_lent_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "END_S", 0.01)
    monkeypatch.setattr(staging, "BORROWED_AT_ONCE", 2)
    holder = Holder(monkeypatch)
    is_asked, goes_on = threading.Event(), threading.Event()

    def get(references: list[Reference], timeout: float) -> list[list[Any]]:
        if len(holder.calls) == 2:
            is_asked.set()
            assert goes_on.wait(60.0)
        return [[reference.memory] for reference in references]

    monkeypatch.setattr(ray, "get", get)
    holder.stager.prepare(SIX, 100)
    (thread,) = [t for t in threading.enumerate() if t.name == "tiered-prepare"]
    assert is_asked.wait(60.0)
    slots = holder.stager.take(SIX)
    goes_on.set()
    thread.join(60.0)
    assert len(slots) == 2
    assert len(holder.calls) == 2


def test_copying_works_without_the_fast_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_foreach_copy_")
    target, source = torch.zeros(3), torch.arange(3.0)
    copy_all([target], [source])
    assert torch.equal(target, source)


def test_a_chunk_is_handed_over_without_being_copied_into_a_pickle() -> None:
    chunk = [np.arange(10, dtype=np.uint8), np.arange(3, dtype=np.uint8)]
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(_OutOfBand(chunk), protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 2
    assert len(data) < 200
    again = pickle.loads(data, buffers=buffers)  # noqa: S301 - made three lines above
    assert [a.tolist() for a in again] == [c.tolist() for c in chunk]
