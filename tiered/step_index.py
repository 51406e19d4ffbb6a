"""A step as a whole, from what every rank's shard says of itself: which bytes of which rank are it.

A rank saves what it holds: of a DTensor its local part with its place in the whole, of everything
else all of it. Here these are put together by path (the keys to a value joined with dots):

    sharded      the parts, wherever they are; several ranks may have the same one (HSDP)
    plain        each rank's own. Ranks of data parallelism hold the same value and nobody compares
                 them, so a rank reads its own, and a rank that has none another one's

What cannot be so is refused: parts of wholes of different shapes, and plain tensors that are
certainly different things (other shapes, other bytes) when another number of ranks asks for them.
No I/O.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from replication.records import ShardRecord
from tiered.boxes import Box, Sizes, overlap, whole, without
from tiered.errors import StateError, WorldSizeError
from tiered.image import Span
from tiered.tree import TensorRef, dotted, leaves, renamed

NAMED = 8  # paths in one message


@dataclass(frozen=True, slots=True)
class ShardView:
    """What a shard's first chunk says.

    Attributes:
        rank: Whose.
        tree: The state with a TensorRef, or an Array of one, where a tensor was.
        spans: Where each tensor's bytes are in the shard's tensor data, by name.
        record: Sizes and checksums of its chunks.
    """

    rank: int
    tree: dict[Any, Any]
    spans: Mapping[str, Span]
    record: ShardRecord


class Part(NamedTuple):
    """A part of a tensor, as one rank saved it: row-major bytes without gaps.

    Attributes:
        rank: Who saved it.
        box: Which part of the whole tensor.
        span: Its bytes in that rank's tensor data.
    """

    rank: int
    box: Box
    span: Span


@dataclass(slots=True)
class Entry:
    """One tensor of the step.

    Attributes:
        path: Its keys in the state, joined with dots.
        dtype: As torch spells it without the `torch.`.
        shape: Of the whole tensor.
        is_sharded: Whether the parts make up one tensor, rather than being each rank's own.
        parts: In the order of the shards that were put together.
    """

    path: str
    dtype: str
    shape: Sizes
    is_sharded: bool
    parts: list[Part] = field(default_factory=list)


class Read(NamedTuple):
    """What to read: `box` of the whole tensor, out of one rank's part of it."""

    part: Part
    box: Box


class StepIndex:
    """Every tensor of a step, by path.

    Attributes:
        views: The shards that were put together: all of a step's, or those that are needed.
        entries: Its tensors by path.
    """

    def __init__(self, views: Sequence[ShardView], skipped: Collection[int] = ()) -> None:
        """Put shards together.

        Args:
            views: What they say of themselves.
            skipped: Ids of dicts in their trees whose tensors are left out.

        Raises:
            StateError: They say what cannot be; names each path.
        """
        self.views = {view.rank: view for view in views}
        self.entries: dict[str, Entry] = {}
        self._odd: set[str] = set()  # plain ones of several shapes or dtypes
        problems: dict[str, str] = {}
        for view in views:
            for path, ref in leaves(view.tree, skipped=skipped):
                name = dotted(path)
                for part in (ref, *ref.more):
                    if problem := self._add(view, name, part, is_first=part is ref):
                        problems[name] = f"of rank {view.rank}: {problem}"
        if problems:
            raise StateError(next(iter(problems)), listed(problems))

    def _add(self, view: ShardView, path: str, ref: TensorRef, *, is_first: bool) -> str:
        """Add one rank's tensor; return what is wrong with it."""
        span, need_bytes = view.spans.get(ref.name), math.prod(ref.shape) * ref.torch_dtype.itemsize
        if span is None:
            return "the shard's tree names it, its image does not have it"
        if span.stop - span.start != need_bytes:
            return f"{span.stop - span.start} bytes saved, {need_bytes} needed"
        is_sharded, shape, box = ref.global_shape is not None, ref.shape, whole(ref.shape)
        if ref.global_shape is not None:
            shape, box = ref.global_shape, Box(ref.offsets or (), ref.shape)
            if not len(shape) == len(box.offsets) == len(box.shape):
                return f"it is the part {ref.shape} at {ref.offsets} of {shape}"
        entry = self.entries.setdefault(path, Entry(path, ref.dtype, shape, is_sharded))
        if same := [part for part in entry.parts if part.rank == view.rank]:
            if any(part.span == span for part in same):  # tied
                return ""
            if is_first:
                return "two values have this name once their paths are joined by dots"
        if entry.is_sharded != is_sharded:
            return "it is a part of a DTensor, or a plain tensor, and the other on other ranks"
        if (entry.dtype, entry.shape) != (ref.dtype, shape):
            if is_sharded:
                return f"it is of {ref.dtype} {shape}, and of {entry.dtype} {entry.shape} on others"
            self._odd.add(path)
            return ""
        entry.parts.append(Part(view.rank, box, span))
        return ""

    def reads(
        self, path: str, wanted: Box, order: Callable[[int], Any]
    ) -> tuple[list[Read], list[Box]]:
        """Which parts make up a box of a tensor, and what of the box nobody has.

        Args:
            path: The tensor's. One that is not sharded is read from one rank.
            wanted: Which box of the whole tensor.
            order: A sort key for ranks: the first of those that have the same is read from.
        """
        entry = self.entries[path]
        if len(entry.parts) == 1 and entry.parts[0].box == wanted and wanted.size:
            return [Read(entry.parts[0], wanted)], []  # nearly always so: as it was saved
        parts = sorted(entry.parts, key=lambda part: order(part.rank))
        found: list[Read] = []
        left = [wanted] if wanted.size else []
        for part in parts if entry.is_sharded else parts[:1]:
            if not left:
                break
            remaining: list[Box] = []
            for box in left:
                if (common := overlap(box, part.box)) is not None:
                    found.append(Read(part, common))
                remaining += without(box, part.box)
            left = remaining
        return found, left

    def check_replicas(self, paths: Iterable[str], world_size: int, where: str) -> None:
        """Refuse plain tensors of which it is certain that ranks do not hold the same.

        With another number of ranks nobody could say whose to take. Chunks that lie within one
        tensor, at the same place on two ranks, have checksums to compare; what is smaller is
        believed to be the same, as PyTorch's DCP does.

        Raises:
            WorldSizeError: There are such tensors; names them.
        """
        if different := self._different(paths):
            reason = (
                f"{len(different)} tensors differ between its ranks and are no DTensors, so that "
                f"nobody can say how to cut them anew: {', '.join(different[:NAMED])}"
            )
            raise WorldSizeError(world_size, len(self.views), where, reason)

    def cut(self, wanted: Iterable[tuple[str, Box]]) -> list[str]:
        """Plain tensors, by path, of which only a part is wanted: DDP's, to be sharded now."""
        known = self.entries
        parts = {path for path, box in wanted if box.shape != known[path].shape}
        return sorted(path for path in parts if not known[path].is_sharded)

    def check_cut(self, wanted: Iterable[tuple[str, Box]]) -> None:
        """Refuse to cut plain tensors of which it is certain that ranks do not hold the same.

        As `check_replicas`, for as many ranks as saved the step: each would take its part from a
        whole of its own, and no two of them would fit together.

        Raises:
            StateError: There are such tensors; names them.
        """
        if different := self._different(self.cut(wanted)):
            problem = (
                "differs between the ranks that saved it and was no DTensor, so that nobody can "
                "say whose is to be sharded now; load it as it was saved, a plain tensor"
            )
            raise StateError(different[0], listed(dict.fromkeys(different, problem)))

    def _different(self, paths: Iterable[str]) -> list[str]:
        return sorted(p for p in set(paths) if p in self._odd or self._is_different(p))

    def _is_different(self, path: str) -> bool:
        entry = self.entries.get(path)
        if entry is None or entry.is_sharded:
            return False
        first, *others = (self._inner_digests(part) for part in entry.parts)
        return any(
            other.get(place, checksum) != checksum
            for other in others
            for place, checksum in first.items()
        )

    def _inner_digests(self, part: Part) -> dict[tuple[int, int], bytes]:
        """The checksums of the chunks that lie within a tensor, by their place in it."""
        record, digests = self.views[part.rank].record, {}
        start = -part.span.start
        for size, checksum in zip(record.plan.chunk_sizes[1:], record.digests[1:], strict=True):
            if start >= 0 and start + size <= part.span.stop - part.span.start:
                digests[start, size] = checksum
            start += size
        return digests


def listed(problems: Mapping[str, str]) -> str:
    """All problems in one line, each with its path; the first ones, if there are many."""
    lines = [f"{path}: {problem}" for path, problem in problems.items()]
    more = f"; and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
    return "; ".join(lines[:NAMED]) + more


def merged(views: Sequence[ShardView]) -> dict[Any, Any]:
    """The first view's tree, and what it does not have from the others', in order.

    Stages of a pipeline hold different layers under one key, say. A reference from another tree
    than the first has its rank before its name, which may mean another tensor here.
    """
    result = views[0].tree
    for view in views[1:]:
        result = _merged(result, view.tree, f"{view.rank}/")
    return result


def _merged(one: Any, other: Any, prefix: str) -> Any:
    if type(one) is not dict or type(other) is not dict:
        return one
    both = {k: _merged(v, other[k], prefix) if k in other else v for k, v in one.items()}
    more = {k: renamed(v, lambda name: prefix + name) for k, v in other.items() if k not in one}
    return both | more
