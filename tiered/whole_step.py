"""A step put together for export: its values, and its tensors, window by window."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from tiered.boxes import Box, cut, whole
from tiered.errors import StateError
from tiered.restore import check_whole
from tiered.saved_step import SavedStep
from tiered.step_index import Entry, StepIndex, merged
from tiered.tensor_reads import Wanted, read_tensors
from tiered.tree import TensorRef, dotted, leaves, plain

WINDOW_BYTES = 64 << 20  # of tensors in memory at a time; a full chunk, by default


@dataclass(frozen=True, slots=True)
class WholeTensor:
    """One tensor of the step.

    Attributes:
        name: Its keys below the exported part of the state, joined with dots.
        entry: Who has which part of it.
        memory: Tied tensors have the same.
    """

    name: str
    entry: Entry
    memory: str

    @property
    def dtype(self) -> torch.dtype:
        """As torch has it."""
        return TensorRef(self.name, self.entry.dtype, ()).torch_dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.entry.shape

    @property
    def size_bytes(self) -> int:
        """Of the whole tensor."""
        return whole(self.shape).size * self.dtype.itemsize


class WholeStep:
    """A step, unsharded; reads no tensor before it is asked for.

    Attributes:
        tree: The exported part of the state, with references where tensors were.
        tensors: By name; tied ones each under its own.
    """

    def __init__(self, step: SavedStep, key: str | None = None) -> None:
        """Put the shards together.

        Args:
            step: Open; the caller closes it.
            key: Only what is under this key of the state, named from there; keys joined with dots.

        Raises:
            StateError: The shards do not fit together or do not make up some tensor, or there is
                no dict at `key`; says what there is.
        """
        self._step = step
        views = step.views()
        self._index = StepIndex(views)
        prefix = tuple(key.split(".")) if key else ()
        self.tree = plain(merged(views))
        for part in prefix:
            below = self.tree.get(part)
            if not isinstance(below, dict):
                raise StateError(
                    str(key), f"is no dict of {step}; it has {', '.join(map(str, self.tree))}"
                )
            self.tree = below
        self.tensors = {
            (name := dotted(path)): WholeTensor(
                name, self._index.entries[dotted((*prefix, *path))], ref.name
            )
            for path, ref in leaves(self.tree)
        }
        wanted = {t.name: Wanted(t.entry.path, whole(t.shape)) for t in self.tensors.values()}
        check_whole(self._index, wanted)

    def in_image_order(self) -> list[WholeTensor]:
        """The tensors in the order in which they lie in shards, so that each chunk is read once."""

        def place(tensor: WholeTensor) -> tuple[int, int, int, str]:
            part = tensor.entry.parts[0]
            return (-tensor.dtype.itemsize, part.rank, part.span.start, tensor.name)

        return sorted(self.tensors.values(), key=place)

    def windows(
        self, tensors: Iterable[WholeTensor]
    ) -> Iterator[tuple[WholeTensor, Box, torch.Tensor]]:
        """The tensors' values in order, in row-major parts of at most `WINDOW_BYTES`, verified.

        Raises:
            StepNotFoundError: No tier has an intact copy of some chunk.
        """
        batch: list[tuple[WholeTensor, Box]] = []
        size = 0
        for tensor in tensors:
            itemsize = tensor.dtype.itemsize
            for box in cut(tensor.shape, WINDOW_BYTES // itemsize):
                if batch and size + box.size * itemsize > WINDOW_BYTES:
                    yield from self._read(batch)
                    batch, size = [], 0
                batch.append((tensor, box))
                size += box.size * itemsize
        yield from self._read(batch)

    def window(self, tensor: WholeTensor, box: Box) -> torch.Tensor:
        """One part of a tensor."""
        ((_, _, values),) = self._read([(tensor, box)])
        return values

    def _read(
        self, batch: list[tuple[WholeTensor, Box]]
    ) -> list[tuple[WholeTensor, Box, torch.Tensor]]:
        wanted = [Wanted(tensor.entry.path, box) for tensor, box in batch]
        read_tensors(self._step, self._index, wanted, lambda rank: rank)
        return [(tensor, box, one.tensor) for (tensor, box), one in zip(batch, wanted, strict=True)]
