"""Reading parts of a step's tensors to where they belong, whoever saved which part of them.

Bytes go straight into a tensor where they lie in one run both there and in the shard: that is so
for everything that is sharded by rows. Other parts go through memory of their own, one shard's at a
time.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from replication.records import Buffer
from tiered.alike import Alike
from tiered.boxes import Box, is_run, span_of, strides
from tiered.errors import StepNotFoundError
from tiered.image import bytes_of
from tiered.pieces import Piece
from tiered.saved_step import SavedStep
from tiered.step_index import Read, StepIndex
from tiered.tree import TensorRef

_NOTHING = torch.empty(0)


@dataclass(slots=True)
class Wanted:
    """A box of a tensor of the step, and where it goes.

    Attributes:
        path: The tensor's.
        box: Which part of the whole tensor.
        targets: Tensors of the box's shape, of any device and strides, that get it; none for one
            in memory of its own.
        tensor: One that has it, once it was read.
    """

    path: str
    box: Box
    targets: list[torch.Tensor] = field(default_factory=list)
    tensor: torch.Tensor = _NOTHING


@dataclass(slots=True)
class _Detour:
    """Bytes that are not where they belong yet."""

    memory: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor


def read_tensors(
    step: SavedStep,
    index: StepIndex,
    wanted: Iterable[Wanted],
    order: Callable[[int], Any],
    alike: Alike | None = None,
) -> None:
    """Read everything that is wanted; only chunks with some of it are fetched.

    Args:
        step: Where from.
        index: Of the step, covering all that is wanted.
        wanted: Its tensors are set, and its targets filled.
        order: As for `StepIndex.reads`.
        alike: What is read beside it.

    Raises:
        StepNotFoundError: No tier has an intact copy of some chunk. Targets are undefined then;
            says which.
    """
    wanted, alike = list(wanted), alike or Alike()
    try:
        _read(step, index, wanted, order, alike)
    except StepNotFoundError as error:
        if changed := sorted({one.path for one in wanted if one.targets}.union(alike.tensors)):
            named = f"these tensors may have been overwritten: {', '.join(changed)}"
            reasons = (*error.reasons, named)
            raise StepNotFoundError(error.job, error.wanted, reasons) from error
        raise
    devices = {target.device for one in wanted for target in one.targets}
    for one in wanted:
        one.tensor = _copied(one.tensor, one.targets)
    for name, _, target in alike.copies:
        devices.add(target.device)
        _copied(alike.tensors[name], [target])
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what was queued above reads memory that is freed now


def _read(
    step: SavedStep,
    index: StepIndex,
    wanted: list[Wanted],
    order: Callable[[int], Any],
    alike: Alike,
) -> None:
    by_rank: dict[int, list[tuple[Wanted, Read, Buffer]]] = defaultdict(list)
    for one in wanted:
        one.tensor = _destination(one, index.entries[one.path].dtype)
        reads, left = index.reads(one.path, one.box, order)
        assert not left, f"{one.path}: nobody has {left}"
        memory = bytes_of(one.tensor)
        for read in reads:
            by_rank[read.part.rank].append((one, read, memory))
    if alike.pieces:
        by_rank[alike.rank] += []
    for rank, reads_of_rank in sorted(by_rank.items()):
        pieces, detours = list(alike.pieces) if rank == alike.rank else [], []
        for one, read, memory in reads_of_rank:
            piece, detour = _place(one, read, memory)
            pieces.append(piece)
            detours += [detour] if detour is not None else []
        step.fill(rank, pieces)
        for detour in detours:
            detour.target.copy_(detour.source)


def _place(one: Wanted, read: Read, memory: Buffer) -> tuple[Piece, _Detour | None]:
    """Where a read's bytes go: into the tensor itself, or first into memory of their own."""
    item = one.tensor.element_size()
    part, start = read.part, read.part.span.start
    if read.box == part.box == one.box:  # all of it: the whole span
        return Piece(start, memory), None
    here, there = read.box.within(one.box), read.box.within(part.box)
    first, stop = span_of(there, part.box.shape)
    if is_run(there, part.box.shape) and is_run(here, one.box.shape):
        low, high = span_of(here, one.box.shape)
        return Piece(start + first * item, memory[low * item : high * item]), None
    detour = torch.empty(stop - first, dtype=one.tensor.dtype)
    source = detour.as_strided(there.shape, strides(part.box.shape))
    target = one.tensor[tuple(map(slice, here.offsets, here.stops))]
    return Piece(start + first * item, bytes_of(detour)), _Detour(detour, source, target)


def _destination(one: Wanted, dtype: str) -> torch.Tensor:
    """Where the bytes go: a target itself if they can be written there directly."""
    for target in one.targets:
        is_mirrored = target.is_conj() or target.is_neg()
        if target.device.type == "cpu" and target.is_contiguous() and not is_mirrored:
            return target.detach()
    # Pinned memory goes to a GPU at the speed of the bus, and without the processor.
    is_pinned = any(target.device.type == "cuda" for target in one.targets)
    kind = TensorRef("", dtype, ()).torch_dtype
    return torch.empty(one.box.shape, dtype=kind, pin_memory=is_pinned)


def _copied(source: torch.Tensor, targets: list[torch.Tensor]) -> torch.Tensor:
    """Bring what was read into every target that it was not read into; return one of them."""
    others = [target for target in targets if target.data_ptr() != source.data_ptr()]
    if others:
        with torch.no_grad():
            for target in others:
                target.copy_(source, non_blocking=True)
    return targets[0].detach() if targets else source
