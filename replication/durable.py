"""The boundary to a store that outlives the cluster, as the holders and the coordinator see it.

`replication` knows no S3. A holder is handed an object of this shape and told to upload; the
coordinator uses the same shape for its index. `tiered.s3` implements it; so does the fake of the
tests, and both pass tests/contract/test_durable.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from replication.records import Chunk, ShardRecord

UPLOAD_BASE_S = 60.0
UPLOAD_BYTES_PER_S = 5e6  # slower than this counts as hung
UPLOADS_AT_ONCE = 16  # of one host, which may have to share a cap on its bandwidth


def upload_timeout_s(size_bytes: int, bandwidth_bytes_per_s: float | None = None) -> float:
    """The deadline for uploading a shard, in seconds.

    Args:
        size_bytes: Of the shard.
        bandwidth_bytes_per_s: What all uploads of its host together are held to, if anything.
    """
    rate = UPLOAD_BYTES_PER_S
    if bandwidth_bytes_per_s is not None:
        rate = min(rate, bandwidth_bytes_per_s / UPLOADS_AT_ONCE)
    return UPLOAD_BASE_S + size_bytes / rate


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes that an object to be stored has in common with one that is.

    Attributes:
        start: Where they begin in the new object.
        earlier_start: Where they begin in the earlier one.
        size_bytes: How many.
    """

    start: int
    earlier_start: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Earlier:
    """An object that is stored already, and what of it the next one has again, in order."""

    key: str
    runs: tuple[Run, ...]


def common_runs(record: ShardRecord, earlier: ShardRecord) -> tuple[Run, ...]:
    """What two shards have in common: chunks of the same number, size and checksum.

    Chunks that follow each other make one run. A first chunk that grew only moves the others.
    """
    runs: list[Run] = []
    start = earlier_start = 0
    pairs = zip(record.plan.chunk_sizes, earlier.plan.chunk_sizes, strict=False)
    checksums = zip(record.digests, earlier.digests, strict=False)
    for (size, earlier_size), (mine, theirs) in zip(pairs, checksums, strict=True):
        if size == earlier_size and mine == theirs:
            last = runs.pop() if runs and runs[-1].start + runs[-1].size_bytes == start else None
            first = Run(start, earlier_start, 0) if last is None else last
            runs.append(Run(first.start, first.earlier_start, first.size_bytes + size))
        start, earlier_start = start + size, earlier_start + earlier_size
    return tuple(runs)


class DurableStore(Protocol):
    """Objects under string keys; safe to call from several threads, picklable.

    Every call blocks for at most the store's own deadlines and retries transient faults itself.

    Raises (every call):
        DurableStoreError: The store could not be reached, refused, or answered wrongly.
    """

    def upload(self, key: str, chunks: Sequence[Chunk], earlier: Earlier | None = None) -> None:
        """Store the concatenation of `chunks` under `key`; all of it or nothing is visible.

        Idempotent: the same bytes under the same key may be uploaded again. What an upload that
        failed has sent already is not sent again, whoever repeats it.

        Args:
            key: Under what.
            chunks: The bytes.
            earlier: An object whose bytes the store may use instead of being sent them again. It
                is a hint: the object may be gone or damaged, and what is stored is right all the
                same.
        """

    def check(self) -> None:
        """Raise if the store is known not to answer now; costs next to nothing while it does.

        To be called before work that would be in vain.
        """

    def create(self, key: str, data: bytes) -> bool:
        """Store `data` only if nothing is stored under `key`; linearizable.

        Returns:
            True when this call, or an earlier try of it whose answer was lost, stored `data`;
            False when other bytes are there.
        """

    def get(self, key: str) -> bytes | None:
        """Return a small object whole, or None when there is none."""

    def read(self, key: str, start: int, size_bytes: int) -> memoryview:
        """Return exactly `size_bytes` bytes of the object from `start`; short reads are errors.

        Nothing else of the object is fetched; the caller owns the memory.
        """

    def keys(self, prefix: str) -> list[str]:
        """Return every key below `prefix`, sorted."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete `keys`; one that is not there is no error."""

    def close(self) -> None:
        """Let go of connections; a later call opens them again."""
