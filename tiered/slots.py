"""A chunk's memory in the object store, and what of a state goes where in it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from tiered import bulk
from tiered.boxes import Sizes, strides
from tiered.copying import LEAST_UNIT_BYTES, Unit
from tiered.image import Layout, bytes_between, bytes_of, overlapping

WORD_BYTES = 8
PARALLEL_ELEMENTS = 32768  # torch copies more than that with its own threads, if it has several


@dataclass(frozen=True, slots=True)
class Staged:
    """A chunk in the object store.

    Attributes:
        reference: The object.
        is_lent: It is the holder's, which knows it by its name.
    """

    reference: Any
    is_lent: bool = False

    @property
    def name(self) -> str:
        """What the holder knows it by."""
        return str(self.reference.hex())


@dataclass(frozen=True, slots=True)
class Slot:
    """One chunk's memory in the object store, and what of the state goes where in it.

    The first chunk's, the front's, has a little room to spare, and no tensors.

    Attributes:
        staged: The object.
        view: Its bytes, [n] uint8; keeps the object in memory.
        names: Tensors that lie in it as a whole.
        targets: For each of them the memory that it is copied into, of its dtype and shape.
        runs: Of those that follow each other, first and last + 1, which one thread copies with one
            call; one that is larger than `unit_bytes` is alone, and copied in pieces if it can be.
        parts: Tensors that begin or end in another chunk: name, first byte, last byte + 1, and
            where in this chunk.
        unit_bytes: About what one thread copies with one call.
    """

    staged: Staged
    view: np.ndarray[Any, Any]
    names: tuple[str, ...]
    targets: list[torch.Tensor]
    runs: tuple[tuple[int, int], ...]
    parts: tuple[tuple[str, int, int, int], ...]
    unit_bytes: int = LEAST_UNIT_BYTES

    def copies(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[Unit]:
        """What copies the tensors' bytes into the object, in any order and in any threads."""
        for first, last in self.runs:
            source, target = tensors[self.names[first]], self.targets[first]
            if target.nbytes > self.unit_bytes and _is_plain(source):
                start = target.data_ptr() - self.view.ctypes.data
                yield from self._pieces(source, 0, target.nbytes, start)
            else:
                names = self.names[first:last]
                yield partial(copy_all, self.targets[first:last], [tensors[n] for n in names])
        for name, low, high, start in self.parts:
            yield from self._pieces(tensors[name], low, high, start)

    def _pieces(self, source: torch.Tensor, low: int, high: int, start: int) -> Iterator[Unit]:
        """Bytes `low` to `high` of a tensor; one that has to be made dense first, in one piece."""
        step = self.unit_bytes if _is_plain(source) else high - low
        for first in range(low, high, step):
            last = min(first + step, high)
            place = self.view[start + first - low : start + last - low]
            yield partial(_copy_bytes, place, source, first, last)


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source into its target: one call for all, where this torch has it.

    If torch has several threads, they would wait for each other after every large tensor: those
    are copied by this thread alone.
    """
    with torch.no_grad():
        pairs = list(zip(targets, sources, strict=True))
        if torch.get_num_threads() > 1:
            for target, source in filter(_is_shared_by_threads, pairs):
                np.copyto(bytes_of(target), bytes_of(source))
            pairs = [pair for pair in pairs if not _is_shared_by_threads(pair)]
        if not hasattr(torch, "_foreach_copy_"):
            for target, source in pairs:
                target.copy_(source)
        elif pairs:
            torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])


def _is_shared_by_threads(pair: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return pair[0].numel() > PARALLEL_ELEMENTS and _is_plain(pair[1])


def _is_plain(source: torch.Tensor) -> bool:
    """Whether its bytes are in memory as they are to be saved."""
    is_mirrored = source.is_conj() or source.is_neg()
    return source.device.type == "cpu" and source.is_contiguous() and not is_mirrored


def _copy_bytes(place: np.ndarray[Any, Any], source: torch.Tensor, first: int, last: int) -> None:
    with torch.no_grad():
        _copy_here(place, bytes_between(source, first, last))


def _copy_here(target: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> None:
    """Copy [n] uint8, in this thread alone.

    Large tensors are copied 5-9 % faster by torch's loop over words than by the memcpy that numpy
    calls (two threads, glibc 2.36 on an AMD processor).
    """
    is_aligned = not (target.ctypes.data | source.ctypes.data) % WORD_BYTES
    if torch.get_num_threads() > 1 or not is_aligned:
        np.copyto(target, source)
        return
    stop = target.nbytes - target.nbytes % WORD_BYTES
    words, others = (torch.from_numpy(memory[:stop].view(np.int64)) for memory in (target, source))
    words.copy_(others)
    np.copyto(target[stop:], source[stop:])


def slot_of(
    layout: Layout,
    staged: Staged,
    view: np.ndarray[Any, Any],
    start: int,
    stop: int,
    unit_bytes: int,
) -> Slot:
    """What of a layout's tensor data lies between `start` and `stop`, and where in `view`."""
    memory = _Memory(view)
    names, targets, parts = [], [], []
    for span in overlapping(layout.spans, start, stop):
        target = None
        if start <= span.start and span.stop <= stop:
            target = memory.tensor(span.start - start, *layout.kinds[span.name])
        if target is None:
            low, high = max(start, span.start), min(stop, span.stop)
            parts.append((span.name, low - span.start, high - span.start, low - start))
        else:
            names.append(span.name)
            targets.append(target)
    runs = tuple(_runs(targets, unit_bytes))
    return Slot(staged, view, tuple(names), targets, runs, tuple(parts), unit_bytes)


def _runs(targets: list[torch.Tensor], unit_bytes: int) -> Iterator[tuple[int, int]]:
    """See `Slot.runs`: up to `unit_bytes` together."""
    first = run_bytes = 0
    for index, size_bytes in enumerate(bulk.sizes(targets)):
        if index > first and run_bytes + size_bytes > unit_bytes:
            yield first, index
            first, run_bytes = index, 0
        run_bytes += size_bytes
    if first < len(targets):
        yield first, len(targets)


class _Memory:
    """A chunk's memory, as tensors; there may be thousands, so each takes one call."""

    def __init__(self, view: np.ndarray[Any, Any]) -> None:
        self._bytes = torch.from_numpy(view)
        self._by_dtype: dict[torch.dtype, torch.Tensor | None] = {}
        self._strides: dict[torch.Size, Sizes] = {}

    def tensor(self, start: int, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor | None:
        """The one that begins at a byte; None if that is not aligned for it."""
        if dtype not in self._by_dtype:
            self._by_dtype[dtype] = self._whole(dtype)
        if shape not in self._strides:
            self._strides[shape] = strides(shape)
        whole, (offset, rest) = self._by_dtype[dtype], divmod(start, dtype.itemsize)
        if whole is None or rest:
            return None
        return whole.as_strided(shape, self._strides[shape], offset)

    def _whole(self, dtype: torch.dtype) -> torch.Tensor | None:
        size_bytes = self._bytes.nbytes - self._bytes.nbytes % dtype.itemsize
        try:
            return self._bytes[:size_bytes].view(dtype)
        except RuntimeError:  # a dtype that is no view of bytes
            return None
