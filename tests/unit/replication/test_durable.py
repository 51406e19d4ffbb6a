import itertools

from hypothesis import given
from hypothesis import strategies as st

from replication.checksum import digest
from replication.durable import Run, common_runs
from replication.records import ShardKey, ShardPlan, ShardRecord, Version


def shard(step: int, chunks: list[bytes]) -> ShardRecord:
    plan = ShardPlan(1, tuple(len(chunk) for chunk in chunks))
    key = ShardKey("job", Version(1, step), 0)
    return ShardRecord(key, plan, tuple(digest([chunk]) for chunk in chunks))  # type: ignore[list-item]


CHUNKS = st.lists(st.binary(min_size=1, max_size=3), min_size=1, max_size=8)


@given(CHUNKS, CHUNKS)
def test_runs_are_the_same_bytes_in_both(new: list[bytes], old: list[bytes]) -> None:
    runs = common_runs(shard(2, new), shard(1, old))
    image, earlier = b"".join(new), b"".join(old)
    for run in runs:
        stop = run.earlier_start + run.size_bytes
        piece = earlier[run.earlier_start : stop]
        assert image[run.start : run.start + run.size_bytes] == piece
        assert len(piece) == run.size_bytes > 0
    same = sum(len(a) for a, b in zip(new, old, strict=False) if a == b)
    assert sum(run.size_bytes for run in runs) == same
    assert all(a.start + a.size_bytes < b.start for a, b in itertools.pairwise(runs))


def test_a_first_chunk_that_grew_moves_the_others() -> None:
    new, old = [b"tree", b"one", b"two", b"x"], [b"it", b"one", b"two", b"y"]
    assert common_runs(shard(2, new), shard(1, old)) == (Run(4, 2, 6),)
