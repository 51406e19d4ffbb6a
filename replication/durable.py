"""The boundary to a store that outlives the cluster, as the holders and the coordinator see it.

`replication` knows no S3. A holder is handed an object of this shape and told to upload; the
coordinator uses the same shape for its index. `tiered.s3` implements it; so does the fake of the
tests, and both pass tests/contract/test_durable.py.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from replication.records import Chunk


class DurableStore(Protocol):
    """Objects under string keys; safe to call from several threads, picklable.

    Every call blocks for at most the store's own deadlines and retries transient faults itself.

    Raises (every call):
        DurableStoreError: The store could not be reached, refused, or answered wrongly.
    """

    def upload(self, key: str, chunks: Sequence[Chunk]) -> None:
        """Store the concatenation of `chunks` under `key`; all of it or nothing is visible.

        Idempotent: the same bytes under the same key may be uploaded again.
        """

    def create(self, key: str, data: bytes) -> bool:
        """Store `data` only if nothing is stored under `key`; linearizable.

        Returns:
            True when this call, or an earlier try of it whose answer was lost, stored `data`;
            False when other bytes are there.
        """

    def get(self, key: str) -> bytes | None:
        """Return a small object whole, or None when there is none."""

    def read(self, key: str, start: int, size_bytes: int) -> bytes:
        """Return exactly `size_bytes` bytes of the object from `start`; short reads are errors."""

    def keys(self, prefix: str) -> list[str]:
        """Return every key below `prefix`, sorted."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete `keys`; one that is not there is no error."""

    def close(self) -> None:
        """Let go of connections; a later call opens them again."""
