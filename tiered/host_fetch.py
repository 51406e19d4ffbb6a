"""Reading what several ranks of a host want from elsewhere: by way of their own host's holder.

It fetches each chunk once (`replication.fetch_once`), and the ranks read it in the memory that they
share with it. That costs one more copy, so it is done only where it spares more than that.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import ray

from replication.errors import HolderUnavailableError
from replication.holder import NAMESPACE, holder_name
from replication.records import ByteRange, Chunk
from replication.shared import SharedMemoryTransport
from replication.sink import Sink
from replication.transport import Source
from tiered.fetch import DurableTier, HolderTier, Tier
from tiered.history import ShardSources


def wanted_often(shards: Sequence[ShardSources], world_size: int) -> list[bool]:
    """Of each rank's shard, whether several ranks are likely to read its bytes.

    That is so when more ranks read than have saved, and of shards most of whose bytes another one
    has, too, as the ranks of data parallelism do.

    Args:
        shards: Of the step, by rank.
        world_size: Ranks that read it.
    """
    if world_size > len(shards):
        return [True] * len(shards)
    seen = Counter(digest for shard in shards for digest in set(shard.record.digests))

    def is_mostly_shared(shard: ShardSources) -> bool:
        record = shard.record
        sizes = zip(record.plan.chunk_sizes, record.digests, strict=True)
        shared_bytes = sum(size for size, digest in sizes if seen[digest] > 1)
        return 2 * shared_bytes > record.plan.size_bytes

    return [is_mostly_shared(shard) for shard in shards]


class HostTier:
    """Another host's memory, or S3, by way of the reader's own holder; a `tiered.fetch.Tier`.

    Whatever goes wrong on this way, the next place to read from is the one behind it.
    """

    def __init__(
        self, behind: HolderTier | DurableTier, node_id: str, near: SharedMemoryTransport
    ) -> None:
        """Ask nobody yet.

        Args:
            behind: That place; its owner's to close.
            node_id: The reader's host.
            near: How to read from the reader's host.
        """
        self.label = behind.label
        self.name = f"{behind.name}, by way of this host's holder"
        self._behind = behind
        self._node_id = node_id
        self._near = near
        self._host: Source | None = None

    def read(self, index: int) -> Chunk:
        """See Tier."""
        size_bytes = self._behind.chunk_id(index).size_bytes
        memory = np.empty(size_bytes, dtype=np.uint8)
        self.read_into(index, Sink([ByteRange(0, size_bytes)], [memory.data]))
        return [memory]

    def read_into(self, index: int, sink: Sink) -> None:
        """See Tier."""
        chunk, behind = self._behind.chunk_id(index), self._behind
        # Twice: for a chunk that is on its way for another rank, and fails, and is tried again.
        timeout_s = 2 * behind.timeout_s(index)
        self._near.read_guest(
            self._own_holder(), chunk, behind.digest(index), behind.origin(index), sink, timeout_s
        )

    def is_at_hand(self, _index: int) -> bool:
        """See Tier."""
        return False

    def close(self) -> None:
        """See Tier."""
        self._near.close()

    def _own_holder(self) -> Source:
        """Looked up once, not for each chunk."""
        if self._host is None:
            try:
                handle = ray.get_actor(holder_name(self._node_id), NAMESPACE)
            except ValueError as error:  # Ray's word for: no such actor
                raise HolderUnavailableError(self._node_id, "it is gone") from error
            self._host = Source(self._node_id, handle)
        return self._host


def by_own_holder(tiers: Sequence[Tier], node_id: str, near: SharedMemoryTransport) -> list[Tier]:
    """The same places to read from, those not on the host first by way of the reader's holder."""
    found: list[Tier] = []
    for tier in tiers:
        if isinstance(tier, DurableTier) or (isinstance(tier, HolderTier) and not tier.is_near):
            found.append(HostTier(tier, node_id, near))
        found.append(tier)
    return found
