import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.durable import Run
from tiered.config import MAX_PART_BYTES, MIB, MIN_PART_BYTES
from tiered.s3_parts import (
    MAX_PARTS,
    Part,
    Requests,
    copyable,
    cut,
    requests_per_flush,
    requests_per_shard,
)

GIB = 1024 * MIB


@given(st.integers(0, 50 * 1024 * GIB), st.integers(MIN_PART_BYTES, MAX_PART_BYTES))
def test_parts_cover_the_image_and_obey_s3(size_bytes: int, part_bytes: int) -> None:
    if size_bytes // part_bytes > MAX_PARTS:  # the property's own cost
        part_bytes = max(part_bytes, size_bytes // 2000)
    parts = cut(size_bytes, part_bytes)
    assert sum(part.size_bytes for part in parts) == size_bytes
    assert [part.number for part in parts] == list(range(1, len(parts) + 1))
    assert all(a.start + a.size_bytes == b.start for a, b in itertools.pairwise(parts))
    assert len({part.size_bytes for part in parts[:-1]}) <= 1
    assert len(parts) <= MAX_PARTS


@pytest.mark.parametrize(
    ("size_bytes", "count", "part_bytes"),
    [
        (0, 0, 0),
        (1, 1, 1),
        (16 * MIB, 1, 16 * MIB),
        (16 * MIB + 1, 2, 16 * MIB),
        (10_000 * 16 * MIB, 10_000, 16 * MIB),
        (10_000 * 16 * MIB + 1, 9412, 17 * MIB),
        (5 * 1024 * GIB, 9987, 525 * MIB),
    ],
)
def test_a_part_grows_only_where_there_would_be_too_many(
    size_bytes: int, count: int, part_bytes: int
) -> None:
    parts = cut(size_bytes, 16 * MIB)
    assert len(parts) == count
    if parts:
        assert parts[0].size_bytes == part_bytes


def test_what_a_flush_costs() -> None:
    assert requests_per_shard(0, 16 * MIB) == Requests(put=1, list=0, get=1, size_bytes=0)
    assert requests_per_shard(16 * MIB, 16 * MIB).put == 1
    assert requests_per_shard(33 * MIB, 16 * MIB) == Requests(5, 1, 1, 33 * MIB)
    one = requests_per_flush([33 * MIB], 16 * MIB, generations=1)
    assert one == Requests(put=5 + 1, list=1 + 1 + 1, get=1, size_bytes=33 * MIB)
    thousand = requests_per_flush([10 * GIB] * 1000, 16 * MIB, generations=1)
    assert thousand == Requests(
        put=1000 * 642 + 1, list=1000 + 2, get=1000, size_bytes=10_000 * GIB
    )


def test_a_part_is_copied_only_if_the_earlier_object_has_all_of_it() -> None:
    parts = (Part(1, 0, 10), Part(2, 10, 10), Part(3, 20, 10), Part(4, 30, 5))
    assert copyable(parts, ()) == {}
    assert copyable(parts, (Run(0, 100, 35),)) == {1: 100, 2: 110, 3: 120, 4: 130}
    assert copyable(parts, (Run(1, 5, 29),)) == {2: 14, 3: 24}
    assert copyable(parts, (Run(0, 0, 9), Run(9, 20, 11), Run(31, 90, 4))) == {2: 21}
