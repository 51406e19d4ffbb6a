"""Checksums: one value for the same bytes however they are cut, another for any others."""

from itertools import pairwise

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from replication.checksum import DIGEST_BYTES, combine, digest


def buffers(data: bytes, cuts: list[int]) -> list[np.ndarray]:  # type: ignore[type-arg]
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    whole = np.frombuffer(data, dtype=np.uint8)
    return [whole[a:b] for a, b in pairwise(edges)]


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=600), st.lists(st.integers(0, 600), max_size=6))
def test_it_is_the_xxh3_128_of_the_concatenation(data: bytes, cuts: list[int]) -> None:
    assert digest(buffers(data, cuts)) == xxhash.xxh3_128_digest(data)


def test_known_values_that_formats_depend_on() -> None:
    assert digest([]).hex() == "99aa06d3014798d86001c324468d497f"
    assert digest([np.frombuffer(b"tiered", dtype=np.uint8)]) == xxhash.xxh3_128_digest(b"tiered")
    assert len(digest([])) == DIGEST_BYTES == 16


def test_any_flipped_bit_changes_it() -> None:
    data = np.arange(257, dtype=np.int64).view(np.uint8)
    seen = {digest([data])}
    for bit in range(0, 8 * data.size, 61):
        flipped = data.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        seen.add(digest([flipped]))
    assert len(seen) == 1 + len(range(0, 8 * data.size, 61))


def test_read_only_and_empty_buffers_count_for_what_they_hold() -> None:
    data = np.frombuffer(b"abc", dtype=np.uint8)
    assert not data.flags.writeable
    assert digest([data[:0], data, data[:0]]) == digest([data.copy()])


def test_bytes_that_are_not_in_one_run_are_not_guessed_at() -> None:
    with pytest.raises((ValueError, BufferError, TypeError)):
        digest([np.arange(10, dtype=np.uint8)[::2]])


def test_combined_checksums_depend_on_order_and_number() -> None:
    one, two = digest([]), digest([np.zeros(1, dtype=np.uint8)])
    combined = [combine(c) for c in ([], [one], [two], [one, two], [two, one], [one, one])]
    assert len(set(combined)) == len(combined)
    assert all(len(c) == DIGEST_BYTES for c in combined)
