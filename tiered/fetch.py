"""Reading a shard back: own host's memory first, then a buddy's, then S3; every chunk verified."""

import logging
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import ray
from ray.exceptions import RayError

from replication.checksum import digest
from replication.durable import DurableStore
from replication.errors import ChunkCorruptError, HolderUnavailableError, TieredError
from replication.holder import NAMESPACE, holder_name
from replication.records import Chunk, HolderId
from replication.transport import RayTransport, fetch_timeout_s
from tiered import register
from tiered.errors import StepNotFoundError
from tiered.history import ShardSources

logger = logging.getLogger(__name__)

# Where a shard came from. A rank's own host is the one that it ran on when it saved and still does;
# after a restart Ray may have put the rank elsewhere, on its buddy's host, say.
OWN_HOST, FORMER_HOST = "own host's RAM", "its former host's RAM"
BUDDY, DURABLE = "a buddy's RAM", "S3"


class Tier(Protocol):
    """A place that has a whole shard."""

    label: str
    name: str

    def read(self, index: int) -> Chunk:
        """Return one chunk, unverified; blocks, with a deadline.

        Raises:
            TieredError: It could not be had from here.
        """


class HolderTier:
    """The memory of one host."""

    def __init__(self, holder: HolderId, sources: ShardSources, node_id: str | None) -> None:
        if holder in sources.replicas:
            self.label = BUDDY
        else:
            self.label = OWN_HOST if holder.node_id == node_id else FORMER_HOST
        self.name = f"host {holder.node_id[:8]}"
        self._holder = holder
        self._record = sources.record
        self._transport = RayTransport()

    def read(self, index: int) -> Chunk:
        """See Tier."""
        node_id = self._holder.node_id
        try:
            handle = ray.get_actor(holder_name(node_id), NAMESPACE)
        except ValueError as error:  # Ray's word for: no such actor
            raise HolderUnavailableError(node_id, "it is gone") from error
        timeout_s = fetch_timeout_s(self._record.plan.chunk_sizes[index])
        try:
            return self._transport.fetch(handle, node_id, self._record.key, index, timeout_s)
        except RayError as error:  # the object was lost, the store is full, a bug: ask the next
            raise HolderUnavailableError(node_id, f"{type(error).__name__}: {error}") from error


class DurableTier:
    """S3, or any other durable store."""

    label = DURABLE
    name = "S3"

    def __init__(self, store: DurableStore, sources: ShardSources) -> None:
        self._store = store
        self._record = sources.record

    def read(self, index: int) -> Chunk:
        """See Tier."""
        sizes = self._record.plan.chunk_sizes
        key = register.shard_key(self._record.key.version, self._record.key.rank)
        data = self._store.read(key, sum(sizes[:index]), sizes[index])
        return [np.frombuffer(data, dtype=np.uint8)]


def tiers_of(sources: ShardSources, node_id: str | None, store: DurableStore | None) -> list[Tier]:
    """The places to read a shard from, nearest first.

    Args:
        sources: Who has it.
        node_id: The reader's host, None outside of the cluster.
        store: The durable store, if one is configured.
    """
    near_first = sorted(sources.holders, key=lambda holder: holder.node_id != node_id)
    tiers: list[Tier] = [HolderTier(holder, sources, node_id) for holder in near_first]
    if sources.is_durable and store is not None:
        tiers.append(DurableTier(store, sources))
    return tiers


@dataclass(slots=True)
class ShardReader:
    """Reads one shard chunk by chunk; a chunk that is corrupt or late comes from the next tier.

    Attributes:
        sources: What to read.
        tiers: Where from, in order of preference.
        bytes_by_label: How many bytes came from where, filled as chunks are read.
        is_rotten: What S3 has is not what was saved.
    """

    sources: ShardSources
    tiers: list[Tier]
    bytes_by_label: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    is_rotten: bool = False

    @property
    def label(self) -> str:
        """Where most of it came from."""
        counts = self.bytes_by_label
        return max(counts, key=lambda label: counts[label], default="")

    def chunks(self) -> Generator[Chunk]:
        """Every chunk in order, verified; the next one is fetched while one is being used.

        Raises:
            StepNotFoundError: No tier had an intact copy of a chunk.
        """
        began_s = time.monotonic()
        count = len(self.sources.record.plan.chunk_sizes)
        with ThreadPoolExecutor(1, thread_name_prefix="tiered-fetch") as ahead:
            following = ahead.submit(self.chunk, 0)
            for index in range(count):
                chunk = following.result()
                if index + 1 < count:
                    following = ahead.submit(self.chunk, index + 1)
                yield chunk
        self.seconds = time.monotonic() - began_s

    def chunk(self, index: int) -> Chunk:
        """One chunk, verified, from the first tier that has it intact."""
        record = self.sources.record
        problems = []
        for tier in list(self.tiers):
            try:
                chunk = tier.read(index)
                if digest(chunk) != record.digests[index]:
                    raise ChunkCorruptError(tier.name, str(record.key), index)
            except TieredError as error:
                logger.warning("%s %s; trying the next copy", record.key, error)
                problems.append(str(error))
                is_corrupt = isinstance(error, ChunkCorruptError)
                self.is_rotten = self.is_rotten or (is_corrupt and tier.label == DURABLE)
                # Not asked again while another answers; but two copies that are damaged in
                # different chunks still make a whole shard.
                self.tiers.remove(tier)
                self.tiers.append(tier)
                continue
            size = record.plan.chunk_sizes[index]
            self.bytes_by_label[tier.label] = self.bytes_by_label.get(tier.label, 0) + size
            return chunk
        key = record.key
        wanted = f"rank {key.rank} of {key.version}"
        raise StepNotFoundError(key.job, wanted, tuple(problems))
