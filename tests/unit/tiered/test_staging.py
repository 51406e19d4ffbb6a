import logging
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import ray
import torch

from replication.pinning import StoreMemory, _OutOfBand
from tiered import slots as slots_module
from tiered import staging
from tiered.image import chunk_sizes, data_chunk, lay_out
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
    with Stager(64, threads, lambda *_: True).filling(captured, slots) as filling:
        for index in range(len(slots)):
            filling.fill(index)


def slots_of(chunk_bytes: int) -> tuple[list[Slot], list[bytes]]:
    """Memory as `Stager` makes it, and what must be in it."""
    captured = capture(STATE)
    layout = lay_out(captured)
    sizes = chunk_sizes(layout, 0, chunk_bytes)[1:]
    slots, expected, start = [], [], 0
    for size in sizes:
        view = np.full(size, 255, dtype=np.uint8)
        slots.append(slot_of(layout, Staged(None), view, start, start + size))
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
    monkeypatch.setattr(slots_module, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(slots_module, "PARALLEL_ELEMENTS", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
    slots, expected = slots_of(chunk_bytes)
    fill_all(slots, capture(STATE), 2)
    assert [slot.view.tobytes() for slot in slots] == expected


def units_of(state: dict[str, torch.Tensor]) -> int:
    captured = capture(state)
    layout = lay_out(captured)
    view = np.zeros(layout.data_bytes, dtype=np.uint8)
    slot = slot_of(layout, Staged(None), view, 0, layout.data_bytes)
    return len(list(slot.copies(captured.tensors)))


def test_a_unit_of_work_is_neither_one_small_tensor_nor_all_of_a_large_one() -> None:
    assert units_of({str(n): torch.zeros(25 << 10) for n in range(250)}) == 4  # of 100 KiB each
    assert units_of({"large": torch.zeros(3, 2 << 20)}) == 3
    assert units_of({"mirrored": torch.zeros(3, 2 << 20, dtype=torch.complex64).conj()}) == 1
    assert units_of({"transposed": torch.zeros(3, 2 << 20).t()}) == 1


def test_the_front_goes_into_prepared_memory_if_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "put", lambda chunk: chunk)
    stager = Stager(64, 1, lambda *_: True)
    front_slot = Slot(Staged("prepared"), np.zeros(10, dtype=np.uint8), (), [], (), ())
    assert stager.stage_front(b"0123456789", [front_slot]).reference == "prepared"
    assert stager.stage_front(b"abc", [front_slot]).reference == "prepared"
    assert front_slot.view.tobytes() == b"abc3456789"
    for slots in ([], [front_slot]):
        (put,) = stager.stage_front(b"0123456789a", slots).reference
        assert put.tobytes() == b"0123456789a"


class Reference:
    """Of a chunk that nobody copies."""

    def __init__(self, chunk: Any) -> None:
        self.chunk = chunk

    def hex(self) -> str:
        return f"object {id(self)}"


def test_once_for_each_layout_the_log_says_that_memory_is_ready(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(staging, "put", Reference)
    monkeypatch.setattr(ray, "get", lambda reference: reference.chunk)
    monkeypatch.setattr(StoreMemory, "holds", lambda *_: True)
    caplog.set_level(logging.INFO)
    stager = Stager(64, 1, lambda *_: True)
    one, other = lay_out(capture(STATE)), lay_out(capture({"other": torch.ones(500_000)}))
    lines = []
    for layout in (one, one, other, other):
        ready = staging._Preparation(layout, 1000)
        ready.is_wanted.set()
        stager._prepare(ready)
        lines.append([record.getMessage().rsplit(" in ", 1)[0] for record in caplog.records])
        caplog.clear()
    start = "memory for the next save is ready: "
    assert lines == [[f"{start}0.0 MB"], [], [f"{start}2.0 MB"], []]


class Store:
    """An object store and a holder; a preparation of six chunks, 100 bytes and five of 4 KiB.

    Args:
        answers: What the holder says to each call.
        room: So many objects fit.
        wanted: After so many objects the memory is not wanted any more.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, *answers: bool, room: int = 99, wanted: int = 99
    ) -> None:
        self.made: list[Reference] = []
        self.calls: list[tuple[int, int]] = []
        self._answers, self._room, self._wanted = list(answers), room, wanted
        patch.setattr(staging, "put", self._put)
        patch.setattr(ray, "get", lambda reference: reference.chunk)
        patch.setattr(StoreMemory, "holds", lambda *_: True)
        self.stager = Stager(4 << 10, 1, self._pin)
        self.ready = staging._Preparation(lay_out(capture({"weight": torch.ones(5, 1024)})), 100)
        self.ready.is_wanted.set()

    def prepared(self) -> list[bool]:
        """Make it; of each chunk that is ready then, whether it is pinned."""
        self.stager._prepare(self.ready)
        slots = self.ready.slots
        assert [slot.staged.reference for slot in slots] == self.made[: len(slots)]
        return [slot.staged.is_pinned for slot in slots]

    def _put(self, chunk: Any) -> Reference:
        if len(self.made) == self._room:
            raise ray.exceptions.ObjectStoreFullError
        self.made.append(Reference(chunk))
        if len(self.made) == self._wanted:
            self.ready.is_wanted.clear()
        return self.made[-1]

    def _pin(self, names: Sequence[str], references: Sequence[Any]) -> bool:
        assert names == [reference.hex() for reference in self.made]
        assert references == self.made[len(names) - len(references) :]
        self.calls.append((len(names), len(references)))
        return self._answers.pop(0)


@pytest.mark.parametrize("bound", ["PIN_BYTES", "PIN_CHUNKS"])
def test_memory_is_pinned_with_few_calls(monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    monkeypatch.setattr(staging, bound, {"PIN_BYTES": 10 << 10, "PIN_CHUNKS": 4}[bound])
    store = Store(monkeypatch, True, True)
    assert store.prepared() == [True] * 6
    assert store.calls == [(4, 4), (6, 2)]


def test_a_holder_that_does_not_answer_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PIN_CHUNKS", 2)
    store = Store(monkeypatch, True, False)
    assert store.prepared() == [True] * 2 + [False] * 4
    assert store.calls == [(2, 2), (4, 2)]


def test_what_was_made_before_it_was_not_wanted_any_more_is_pinned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = Store(monkeypatch, True, wanted=3)
    assert store.prepared() == [True] * 3
    assert store.calls == [(3, 3)]


def test_what_there_was_room_for_is_ready(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(monkeypatch, True, room=2)
    assert store.prepared() == [True] * 2
    assert "memory for the next save is not ready" in caplog.text


def test_memory_that_others_have_replaced_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(monkeypatch, wanted=3)
    store.ready.is_abandoned = True
    assert store.prepared() == store.calls == []


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
