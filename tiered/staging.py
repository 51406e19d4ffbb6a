"""Staging: a state's bytes into this host's object store, with one copy while training waits.

Object-store memory for the next save is made ready in the background, while training goes on:
the holder lends it, what a collected step has left or new objects (`replication.buffers`), and its
pages are mapped here. A save then copies its tensors straight into that memory, in a few threads,
and tells the holder so with one small call for the whole shard. Without it (the first save of a
state, saves in close succession, a Ray that maps the store read-only) each chunk is put as usual,
with one copy too, but through the pickling of each tensor's buffer and into memory that may never
have been touched.

Nobody else reads such memory before it is full, and this process writes to it no more once the
holder was told. A trainer that is stopped in the middle of a copy and wakes up much later writes
into memory that has not been used for anything else.
"""

import ctypes
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import ray
from ray.exceptions import RayError

from replication.pinning import StoreMemory, put
from replication.shared import touch
from tiered.copying import Copying, unit_bytes
from tiered.device_copy import BUFFERS, DeviceCopier
from tiered.image import Layout, data_chunk
from tiered.slots import Slot, Staged, slot_of
from tiered.state import Captured

logger = logging.getLogger(__name__)

END_S = 0.25  # so long a save waits for what is being made ready; it does without the rest
GET_S = 2.0  # for that memory: it is on this host
BORROWED_AT_ONCE = 16  # chunks, with one call of the holder
FRONT_ROOM_BYTES = 8 << 10  # the next front may be so much longer than the last one
FRONT_LEAST_BYTES = 128 << 10  # Ray keeps objects of less than 100 KiB outside of the store


class Stager:
    """Puts one state's chunks into the object store. One thread saves; another makes memory ready.

    Args:
        chunk_bytes: The size of a full chunk.
        threads: That copy at a time, the one that saves included.
        borrow: Asks the holder for memory, as `OwnHolder.borrow`: names of what was lent before and
            is kept, and the sizes of more; returns references.
    """

    def __init__(
        self,
        chunk_bytes: int,
        threads: int,
        borrow: Callable[[Sequence[str], Sequence[int]], Sequence[Any]],
    ) -> None:
        self._chunk_bytes = chunk_bytes
        self._threads = threads
        self._borrow = borrow
        self._store = StoreMemory()
        self._device_copier = DeviceCopier(threads)
        self._ready: _Preparation | None = None
        self._is_possible = True
        self._told_of: Layout | None = None  # each layout once, for the log's reader
        self._lock = threading.Lock()

    def prepare(self, layout: Layout, front_bytes: int) -> None:
        """Make memory for the next save of this layout ready, in the background; idempotent.

        Args:
            layout: Of the tensors.
            front_bytes: Of the last save's front; the next one's is about as long.
        """
        with self._lock:
            if not self._is_possible or (self._ready is not None and self._ready.layout is layout):
                return
            self._stop()
            room_bytes = max(front_bytes + FRONT_ROOM_BYTES, FRONT_LEAST_BYTES)
            self._ready = _Preparation(layout, room_bytes)
            self._ready.begin(self._prepare)

    def take(self, layout: Layout) -> list[Slot]:
        """The chunks of this layout, from the front on, for which memory is ready."""
        self._device_copier.discard()
        with self._lock:
            made_for, slots = self._stop()
        return slots if made_for is layout else []

    def give_back(self, layout: Layout, slots: list[Slot]) -> None:
        """Take memory back, filled or not, of which nobody has been told."""
        with self._lock:
            if slots and self._ready is None:  # none: they are still to be made ready
                self._ready = _Preparation(layout, slots[0].view.nbytes, slots)

    def stage_front(self, front: bytes, slots: Sequence[Slot]) -> Staged:
        """Put the first chunk into the object store."""
        memory = np.frombuffer(front, dtype=np.uint8)
        if slots and memory.nbytes <= slots[0].view.nbytes:
            np.copyto(slots[0].view[: memory.nbytes], memory)
            return slots[0].staged
        return Staged(put([memory]))

    def filling(self, captured: Captured, slots: Sequence[Slot]) -> "Filling":
        """Begin to copy a state into memory that is ready."""
        return Filling(captured, slots, self._device_copier, self._threads)

    def stage(self, layout: Layout, index: int, filling: "Filling") -> Staged:
        """Put chunk `index` into the object store, one of tensors: from 1; in their order."""
        if index < len(filling.slots):
            filling.fill(index)
            return filling.slots[index].staged
        start, stop = [0, *layout.stops(self._chunk_bytes)][index - 1 : index + 1]
        return Staged(put(data_chunk(layout, filling.captured.tensors, start, stop)))

    def release(self) -> None:
        """Give back what is ready and was not used."""
        with self._lock:
            self._stop()

    def _stop(self) -> tuple[Layout | None, list[Slot]]:
        ready, self._ready = self._ready, None
        return (None, []) if ready is None else (ready.layout, ready.end())

    def _prepare(self, ready: "_Preparation") -> None:
        began_s, layout = time.monotonic(), ready.layout
        try:
            is_whole = self._make(ready)
        except (RayError, RuntimeError) as error:  # no room, say: the save will put instead
            why = getattr(error, "cause", None) or error
            logger.warning("memory for the next save is not ready: %s", why)
            return
        if is_whole:
            is_news, self._told_of = self._told_of is not layout, layout
            logger.log(
                logging.INFO if is_news else logging.DEBUG,
                "memory for the next save is ready: %.1f MB in %.3f s",
                layout.data_bytes / 1e6, time.monotonic() - began_s,
            )  # fmt: skip

    def _make(self, ready: "_Preparation") -> bool:
        """Make memory ready, a few chunks at a time, while it is wanted; whether that is all."""
        layout, slots = ready.layout, ready.slots
        at_a_time = unit_bytes(layout.data_bytes, self._threads)
        spans = [(0, 0), *itertools.pairwise((0, *layout.stops(self._chunk_bytes)))]
        while len(slots) < len(spans):
            if not ready.is_wanted.is_set():
                return False
            following = spans[len(slots) : len(slots) + BORROWED_AT_ONCE]
            sizes = [stop - start or ready.front_bytes for start, stop in following]
            references = self._borrow([slot.staged.name for slot in slots], sizes)
            if not references:
                return False
            made = []
            lent = ray.get(list(references), timeout=GET_S)
            for reference, (memory,), size_bytes, span in zip(
                references, lent, sizes, following, strict=False
            ):
                if not self._store.holds(memory):
                    self._is_possible = False
                    logger.info("the object store is mapped read-only: saving without preparation")
                    self._borrow([], [])  # the holder may have that back
                    return False
                if ready.is_wanted.is_set():
                    touch(memory)
                view = writable(memory)[:size_bytes]
                staged = Staged(reference, is_lent=True)
                made.append(slot_of(layout, staged, view, *span, at_a_time))
            if not ready.add(made):
                return False
        return True


class Filling:
    """A state on its way into memory that is ready; a context manager that ends its threads.

    Args:
        captured: The state.
        slots: The memory.
        copier: For what is on a GPU.
        threads: That copy what is not, this one included.
    """

    def __init__(
        self, captured: Captured, slots: Sequence[Slot], copier: DeviceCopier, threads: int
    ) -> None:
        self.captured = captured
        self.slots = slots
        self._copier = copier
        tensors = captured.tensors
        has_gpu = copier.kind in captured.device_types
        self._of_gpu = [has_gpu and copier.is_needed(slot, tensors) for slot in slots]
        # Of another kind of device this thread alone knows the stream that training uses.
        is_known = captured.device_types <= {"cpu", copier.kind}
        self._copying = Copying(
            [
                () if is_of_gpu else tuple(slot.copies(tensors))
                for slot, is_of_gpu in zip(slots, self._of_gpu, strict=True)
            ],
            threads if is_known else 1,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._copying.stop()

    def fill(self, index: int) -> None:
        """Have a slot filled, each after those before; of a GPU the next one's is on its way."""
        if not self._of_gpu[index]:
            self._copying.finish(index)
            return
        for following in range(index, min(index + BUFFERS, len(self.slots))):
            if self._of_gpu[following]:
                self._copier.begin(self.slots[following], self.captured.tensors)
        self._copier.finish(self.slots[index])


class _Preparation:
    """Memory that is being made ready for one save, by a thread of its own."""

    def __init__(self, layout: Layout, front_bytes: int, slots: list[Slot] | None = None) -> None:
        self.layout = layout
        self.front_bytes = front_bytes
        self.slots: list[Slot] = slots or []
        self.is_wanted = threading.Event()
        self._is_over = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, prepare: Callable[["_Preparation"], None]) -> None:
        self.is_wanted.set()
        self._thread = threading.Thread(
            target=prepare, args=(self,), name="tiered-prepare", daemon=True
        )
        self._thread.start()

    def add(self, made: Sequence[Slot]) -> bool:
        """These chunks are ready, too; False if it is too late."""
        with self._lock:
            if not self._is_over:
                self.slots += made
            return not self._is_over

    def end(self) -> list[Slot]:
        """The chunks, from the first on, that are ready; what is being lent just now may be late.

        The holder learns with the next preparation that nobody has a use for that.
        """
        self.is_wanted.clear()
        if self._thread is not None:
            self._thread.join(END_S)
        with self._lock:
            self._is_over = True
        return self.slots


def writable(sealed: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same bytes of the object store, writable; for memory that was lent to us."""
    memory: Any = (ctypes.c_ubyte * sealed.nbytes).from_address(sealed.ctypes.data)
    memory.owner = sealed  # it keeps the object where it is
    view: np.ndarray[Any, Any] = np.frombuffer(memory, dtype=np.uint8)
    return view
