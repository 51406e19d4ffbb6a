"""Boxes against the plainest model there is: sets of indices."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tiered.boxes import Box, is_run, overlap, span_of, whole, without


def cells(box: Box) -> set[tuple[int, ...]]:
    return set(
        itertools.product(*(range(o, s) for o, s in zip(box.offsets, box.stops, strict=True)))
    )


@st.composite
def boxes(draw: st.DrawFn, dims: int, least: int = 0) -> Box:
    offsets = draw(st.tuples(*[st.integers(0, 4)] * dims))
    return Box(offsets, draw(st.tuples(*[st.integers(least, 4)] * dims)))


pairs = st.integers(0, 3).flatmap(lambda dims: st.tuples(boxes(dims), boxes(dims)))


@given(pairs)
def test_overlap_and_what_is_left_are_those_of_sets(pair: tuple[Box, Box]) -> None:
    one, other = pair
    common = overlap(one, other)
    assert (cells(common) if common else set()) == cells(one) & cells(other)
    left = without(one, other)
    assert sum(box.size for box in left) == len(cells(one) - cells(other))
    assert set().union(*map(cells, left)) == cells(one) - cells(other)


@given(st.integers(0, 3).flatmap(lambda dims: boxes(dims, least=1)), st.data())
def test_the_bytes_of_a_part_are_those_of_numpy(part: Box, data: st.DataObject) -> None:
    room = data.draw(st.tuples(*[st.integers(0, 3)] * len(part.shape)))
    shape = tuple(stop + more for stop, more in zip(part.stops, room, strict=True))
    numbers = np.arange(whole(shape).size).reshape(shape)
    taken = numbers[tuple(slice(o, s) for o, s in zip(part.offsets, part.stops, strict=True))]
    assert span_of(part, shape) == (taken.min(), taken.max() + 1)
    assert is_run(part, shape) == (np.diff(taken.ravel()) == 1).all()


def test_a_part_is_counted_from_another_one() -> None:
    assert Box((5, 2), (1, 2)).within(Box((4, 2), (3, 3))) == Box((1, 0), (1, 2))
    assert whole(()) == Box((), ())
    assert overlap(whole(()), whole(())) == whole(())
    assert without(whole(()), whole(())) == []
