"""A chunk's memory in the object store, and what of a state goes where in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tiered.boxes import Sizes, strides
from tiered.image import Layout, bytes_between, overlapping


@dataclass(frozen=True, slots=True)
class Staged:
    """A chunk in the object store.

    Attributes:
        reference: The object.
        is_pinned: The holder has pinned it already, by its name.
    """

    reference: Any
    is_pinned: bool = False

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
        parts: Tensors that begin or end in another chunk: name, first byte, last byte + 1, and
            where in this chunk.
    """

    staged: Staged
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


def slot_of(
    layout: Layout, staged: Staged, view: np.ndarray[Any, Any], start: int, stop: int
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
    return Slot(staged, view, tuple(names), targets, tuple(parts))


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
