"""Staging: a state's bytes into this host's object store, with one copy while training waits.

Object-store memory for the next save is made ready in the background, while training goes on: new
objects, filled with zeros, which also takes the page faults. A save then copies its tensors
straight into that memory, many with one call, and hands the objects to the holder. Without it
(the first save of a state, saves in close succession, a Ray that maps the store read-only) each
chunk is put as usual, with one copy too, but through the pickling of each tensor's buffer and into
memory that may never have been touched.

Nobody else knows of such an object before it is full, and it is never written again afterwards:
the next save has new ones. A trainer that is stopped in the middle of a copy and wakes up much
later writes into memory that is its own.
"""

import ctypes
import itertools
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError

from replication.pinning import is_shared_memory, put
from tiered.image import Layout, Span, bytes_between, data_chunk, overlapping

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Slot:
    """One chunk's memory in the object store, and what of the state goes where in it.

    Attributes:
        reference: The object.
        view: Its bytes, [n] uint8; keeps the object in memory.
        names: Tensors that lie in it as a whole.
        targets: For each of them the memory that it is copied into, of its dtype and shape.
        parts: Tensors that begin or end in another chunk: name, first byte, last byte + 1, and
            where in this chunk.
    """

    reference: Any
    view: np.ndarray[Any, Any]
    names: tuple[str, ...]
    targets: list[torch.Tensor]
    parts: tuple[tuple[str, int, int, int], ...]

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the tensors' bytes into the object."""
        with torch.no_grad():
            if self.names:
                copy_all(self.targets, [tensors[name] for name in self.names])
            for name, low, high, start in self.parts:
                source = bytes_between(tensors[name], low, high)
                np.copyto(self.view[start : start + high - low], source)


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source into its target: one call for all, where this torch has it."""
    if hasattr(torch, "_foreach_copy_"):
        torch._foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


class Stager:
    """Puts one state's chunks into the object store. One thread saves; another makes memory ready.

    Args:
        chunk_bytes: The size of a full chunk.
    """

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._layout: Layout | None = None
        self._slots: list[Slot] = []
        self._thread: threading.Thread | None = None
        self._is_wanted = threading.Event()
        self._is_possible = True
        self._lock = threading.Lock()

    def prepare(self, layout: Layout) -> None:
        """Make memory for the next save of this layout ready, in the background; idempotent."""
        with self._lock:
            if self._layout is layout or not self._is_possible:
                return
            self._stop()
            self._layout = layout
            self._is_wanted.set()
            self._thread = threading.Thread(
                target=self._prepare, args=(layout,), name="tiered-prepare", daemon=True
            )
            self._thread.start()

    def take(self, layout: Layout) -> list[Slot]:
        """The chunks of this layout, from the first on, for which memory is ready."""
        with self._lock:
            made_for = self._layout
            slots = self._stop()
            return slots if made_for is layout else []

    def release(self) -> None:
        """Give back what is ready and was not used."""
        with self._lock:
            self._stop()

    def _stop(self) -> list[Slot]:
        self._is_wanted.clear()
        if self._thread is not None:
            self._thread.join()  # it finishes the chunk that it is at
        slots, self._slots = self._slots, []
        self._layout, self._thread = None, None
        return slots

    def stage(self, layout: Layout, tensors: Mapping[str, torch.Tensor], index: int,
              slots: Sequence[Slot]) -> Any:  # fmt: skip
        """Put data chunk `index` (from 0) into the object store; return its reference."""
        if index < len(slots):
            slots[index].fill(tensors)
            return slots[index].reference
        start, stop = [0, *layout.stops(self._chunk_bytes)][index : index + 2]
        return put(data_chunk(layout, tensors, start, stop))

    def _prepare(self, layout: Layout) -> None:
        began_s = time.monotonic()
        zeros = np.zeros(min(self._chunk_bytes, max(1, layout.data_bytes)), dtype=np.uint8)
        try:
            for start, stop in itertools.pairwise((0, *layout.stops(self._chunk_bytes))):
                if not self._is_wanted.is_set():
                    return
                reference = put([zeros[: stop - start]])
                (sealed,) = ray.get(reference)
                view = writable(sealed)
                if view is None:
                    self._is_possible = False
                    logger.info("the object store is mapped read-only: saving without preparation")
                    return
                self._slots.append(_slot(layout, reference, view, start, stop))
            logger.debug(
                "memory for the next save is ready: %.1f MB in %.3f s",
                layout.data_bytes / 1e6, time.monotonic() - began_s,
            )  # fmt: skip
        except (RayError, RuntimeError) as error:  # no room, say: the save will put instead
            logger.warning("memory for the next save is not ready: %s", error)


def writable(sealed: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """The same bytes of the object store, writable; None where they are mapped otherwise.

    For an object that nobody else knows yet.
    """
    if not is_shared_memory(sealed):
        return None
    memory: Any = (ctypes.c_ubyte * sealed.nbytes).from_address(sealed.ctypes.data)
    memory.owner = sealed  # it keeps the object where it is
    view: np.ndarray[Any, Any] = np.frombuffer(memory, dtype=np.uint8)
    return view


def _slot(
    layout: Layout, reference: Any, view: np.ndarray[Any, Any], start: int, stop: int
) -> Slot:
    memory = torch.from_numpy(view)
    names, targets, parts = [], [], []
    for span in overlapping(layout.spans, start, stop):
        target = _target(layout, memory, span, start, stop)
        if target is None:
            low, high = max(start, span.start), min(stop, span.stop)
            parts.append((span.name, low - span.start, high - span.start, low - start))
        else:
            names.append(span.name)
            targets.append(target)
    return Slot(reference, view, tuple(names), targets, tuple(parts))


def _target(
    layout: Layout, memory: torch.Tensor, span: Span, start: int, stop: int
) -> torch.Tensor | None:
    """A tensor's place in a chunk, of its dtype and shape; None if it is not all there."""
    if span.start < start or span.stop > stop:
        return None
    dtype, shape = layout.kinds[span.name]
    flat = memory[span.start - start : span.stop - start]
    try:
        return flat.view(dtype).view(shape)
    except RuntimeError:  # not aligned, or a dtype that is no view of bytes
        return None
