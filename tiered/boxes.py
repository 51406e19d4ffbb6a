"""Rectangular parts of a tensor: where they overlap, what they leave out, which bytes they are.

A box is a part of a tensor of any number of dimensions, half open, in elements. Rows are the last
dimension; bytes are counted in row-major order from the tensor's first one. A core: no torch.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Sizes = tuple[int, ...]


class Box(NamedTuple):
    """The part of a tensor at `offsets` that has `shape`; a scalar's has no dimensions."""

    offsets: Sizes
    shape: Sizes

    @property
    def stops(self) -> Sizes:
        """Where it ends in each dimension."""
        return tuple(o + n for o, n in zip(self.offsets, self.shape, strict=True))

    @property
    def size(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    def within(self, outer: "Box") -> "Box":
        """The same part, counted from the start of `outer`."""
        offsets = tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True))
        return Box(offsets, self.shape)


def whole(shape: Iterable[int]) -> Box:
    """All of a tensor."""
    sizes = tuple(shape)
    return Box((0,) * len(sizes), sizes)


def overlap(one: Box, other: Box) -> Box | None:
    """What two boxes have in common, None if that is nothing."""
    starts = tuple(map(max, one.offsets, other.offsets))
    stops = tuple(map(min, one.stops, other.stops))
    if any(stop <= start for start, stop in zip(starts, stops, strict=True)):
        return None
    return Box(starts, tuple(stop - start for start, stop in zip(starts, stops, strict=True)))


def without(box: Box, taken: Box) -> list[Box]:
    """`box` less `taken`, as boxes that do not overlap; two at most for each dimension."""
    common = overlap(box, taken)
    if common is None:
        return [box] if box.size else []
    left, rest = [], box
    for axis in range(len(box.shape)):
        for start, stop in (
            (rest.offsets[axis], common.offsets[axis]),
            (common.stops[axis], rest.stops[axis]),
        ):
            if start < stop:
                left.append(_cut(rest, axis, start, stop))
        rest = _cut(rest, axis, common.offsets[axis], common.stops[axis])
    return left


def _cut(box: Box, axis: int, start: int, stop: int) -> Box:
    offsets = (*box.offsets[:axis], start, *box.offsets[axis + 1 :])
    return Box(offsets, (*box.shape[:axis], stop - start, *box.shape[axis + 1 :]))


def strides(shape: Sequence[int]) -> Sizes:
    """Elements from one index to the next, in each dimension of a row-major tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def span_of(part: Box, shape: Sizes) -> tuple[int, int]:
    """The shortest run of elements that has all of `part`: its first, and one past its last.

    Args:
        part: Not empty; in a tensor of `shape`.
        shape: Of the tensor.
    """
    steps = strides(shape)
    first = sum(o * step for o, step in zip(part.offsets, steps, strict=True))
    last = sum((s - 1) * step for s, step in zip(part.stops, steps, strict=True))
    return first, last + 1


def is_run(part: Box, shape: Sizes) -> bool:
    """Whether the elements of `part` lie one after the other in a tensor of `shape`."""
    first, stop = span_of(part, shape)
    return stop - first == part.size


def cut(shape: Sizes, at_most: int) -> list[Box]:
    """A tensor in boxes of `at_most` elements, in row-major order, each of them one run.

    One without elements is one box.
    """
    boxes: list[Box] = []

    def add(offsets: Sizes, rest: Sizes) -> None:
        if math.prod(rest) <= at_most or not rest:
            boxes.append(Box(offsets + (0,) * len(rest), (1,) * len(offsets) + rest))
            return
        row = math.prod(rest[1:])
        if row > at_most:
            for index in range(rest[0]):
                add((*offsets, index), rest[1:])
            return
        rows = at_most // row
        for start in range(0, rest[0], rows):
            part = Box((start, *(0,) * len(rest[1:])), (min(rows, rest[0] - start), *rest[1:]))
            boxes.append(Box(offsets + part.offsets, (1,) * len(offsets) + part.shape))

    assert at_most > 0
    add((), shape)
    return boxes
