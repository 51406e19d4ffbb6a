"""Which chunk is read again next: the one not read for the longest, not too often, not too fast."""

from replication.records import ShardKey, Version
from replication.scrub import Scrub

A, B = (ShardKey("job", Version(1, step), 0) for step in (1, 2))


def read(scrub: Scrub, now_s: float, size_bytes: int = 1) -> tuple[ShardKey, int] | None:
    """Begin what is due, find it intact."""
    if (slot := scrub.due(now_s)) is not None:
        scrub.begin(slot, size_bytes, now_s)
        assert scrub.is_over(*slot)
        scrub.intact(*slot, now_s)
    return slot


def test_each_chunk_is_read_once_in_a_period_the_oldest_first() -> None:
    scrub = Scrub(period_s=10.0)
    for at_s, (key, index) in enumerate([(B, 0), (A, 0), (A, 1)]):
        scrub.intact(key, index, float(at_s))
    assert scrub.due(9.9) is None
    assert read(scrub, 10.0) == (B, 0)
    assert scrub.due(10.9) is None
    assert [read(scrub, now_s) for now_s in (15.0, 15.1, 15.2)] == [(A, 0), (A, 1), None]
    assert read(scrub, 20.0) == (B, 0)


def test_it_reads_no_faster_than_it_may() -> None:
    scrub = Scrub(period_s=1.0, bandwidth_bytes_per_s=100.0)
    for index in range(3):
        scrub.intact(A, index, 0.0)
    reads = [tenth / 10 for tenth in range(10, 100) if read(scrub, tenth / 10, size_bytes=200)]
    assert reads == [1.0, 3.0, 5.0, 7.0, 9.0]


def test_one_chunk_is_read_at_a_time() -> None:
    scrub = Scrub(period_s=1.0)
    scrub.intact(A, 0, 0.0)
    scrub.intact(A, 1, 0.0)
    scrub.begin((A, 0), 1, 5.0)
    assert scrub.due(9.0) is None


def test_what_is_forgotten_is_not_read_and_a_reading_of_it_does_not_count() -> None:
    scrub = Scrub(period_s=1.0)
    scrub.intact(A, 0, 0.0)
    scrub.begin((A, 0), 1, 5.0)
    scrub.forget(A, 1)
    assert not scrub.is_over(A, 0)
    assert scrub.due(9.0) is None
    scrub.intact(A, 0, 10.0)  # a good copy came
    assert read(scrub, 11.0) == (A, 0)
