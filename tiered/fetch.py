"""Reading a shard back: own host's memory first, then a buddy's, then S3; every chunk verified."""

import functools
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError

from replication.cancelling import CancellableSink
from replication.checksum import Digest, digest
from replication.dataplane import STREAMS, Access, Reach, open_transports
from replication.durable import DurableStore, upload_timeout_s
from replication.errors import (
    ChunkCorruptError,
    HolderTimeoutError,
    HolderUnavailableError,
    TieredError,
)
from replication.fetch_once import AtHolder, AtStore
from replication.holder import NAMESPACE, holder_name
from replication.records import (
    ActorRef,
    ByteRange,
    Chunk,
    ChunkId,
    HolderId,
    ShardRecord,
    Way,
)
from replication.shared import SharedMemoryTransport
from replication.sink import Sink
from replication.stream import tls_like_ray
from replication.transport import (
    FallbackTransport,
    RayTransport,
    Source,
    Transport,
    fetch_timeout_s,
)
from tiered import register
from tiered.errors import DurableObjectError, StepNotFoundError
from tiered.hedging import Attempt, Pace, Reading, race
from tiered.history import ShardSources
from tiered.pieces import Piece, Run

logger = logging.getLogger(__name__)

ACCESS_TIMEOUT_S = 10.0  # for the one actor call before the first byte
AT_ONCE = STREAMS  # chunks of one shard: a connection for each

T = TypeVar("T")

# Where a shard came from. A rank's own host is the one that it ran on when it saved and still does;
# after a restart Ray may have put the rank elsewhere, on its buddy's host, say.
OWN_HOST, FORMER_HOST = "own host's RAM", "its former host's RAM"
BUDDY, DURABLE = "a buddy's RAM", "S3"


class Tier(Protocol):
    """A place that has a whole shard; may be asked from several threads."""

    label: str
    name: str

    def read(self, index: int) -> Chunk:
        """Return one chunk, unverified; blocks, with a deadline.

        Raises:
            TieredError: It could not be had from here.
        """

    def read_into(self, index: int, sink: Sink) -> None:
        """Fill `sink` with one chunk's bytes, unverified; as `read` otherwise."""

    def is_at_hand(self, index: int) -> bool:
        """Whether to read a chunk from here is to copy memory, without waiting for anybody."""

    def close(self) -> None:
        """Let go of connections; a later read opens them again."""


class _OfShard:
    """What is known of the chunks wherever they are."""

    def __init__(self, record: ShardRecord) -> None:
        self._record = record

    def chunk_id(self, index: int) -> ChunkId:
        """One chunk's name and size."""
        return ChunkId(self._record.key, index, self._record.plan.chunk_sizes[index])

    def digest(self, index: int) -> bytes:
        """One chunk's checksum."""
        return self._record.digests[index]

    def is_at_hand(self, _index: int) -> bool:
        """See Tier."""
        return False


class HolderTier(_OfShard):
    """The memory of one host."""

    def __init__(
        self,
        holder: HolderId,
        sources: ShardSources,
        node_id: str | None,
        way: Way = "auto",
        near: SharedMemoryTransport | None = None,
        reach: Reach | None = None,
    ) -> None:
        super().__init__(sources.record)
        if holder in sources.replicas:
            self.label = BUDDY
        else:
            self.label = OWN_HOST if holder.node_id == node_id else FORMER_HOST
        self.name = f"host {holder.node_id[:8]}"
        self._holder = holder
        self.is_near = holder.node_id == node_id
        self._near = near or SharedMemoryTransport()
        self._way = way
        self._reach = reach
        self._lock = threading.Lock()
        self._found: tuple[Source, Transport] | None = None
        self._problem: HolderUnavailableError | None = None

    def read(self, index: int) -> Chunk:
        """See Tier."""
        source, transport = self._find()
        chunk = self.chunk_id(index)
        return transport.fetch(source, chunk, fetch_timeout_s(chunk.size_bytes))

    def read_into(self, index: int, sink: Sink) -> None:
        """See Tier."""
        source, transport = self._find()
        chunk = self.chunk_id(index)
        transport.read(source, chunk, sink, fetch_timeout_s(chunk.size_bytes))

    def is_at_hand(self, index: int) -> bool:
        """See Tier."""
        is_shared = self.is_near and self._way != "ray" and self._found is not None
        return is_shared and self._near.is_mapped(self._holder.node_id, self.chunk_id(index))

    def close(self) -> None:
        """See Tier."""
        if not self._lock.acquire(blocking=False):
            return  # a read that was outrun is still asking; it has no connection, and opens none
        try:
            if self._found is not None:
                self._found[1].close()
            self._found = self._problem = None
        finally:
            self._lock.release()

    def origin(self, _index: int) -> AtHolder:
        """How another holder is to read from this one, which is asked once.

        Raises:
            HolderUnavailableError: It is gone, or did not answer.
        """
        source, _ = self._find()
        return AtHolder(self._holder, source.endpoint, self._way)

    def timeout_s(self, index: int) -> float:
        """How long one chunk may take."""
        return fetch_timeout_s(self._record.plan.chunk_sizes[index])

    def _find(self) -> tuple[Source, Transport]:
        """The holder, and the way to it; looked for once, unless that is known.

        Raises:
            HolderUnavailableError: It is gone, or did not answer; nobody waits for it twice.
        """
        with self._lock:
            if self._problem is not None:
                raise self._problem
            if self._found is None:
                try:
                    self._found = self._ask()
                except HolderUnavailableError as error:
                    self._problem = error
                    raise
            return self._found

    def _ask(self) -> tuple[Source, Transport]:
        node_id, reach = self._holder.node_id, self._reach
        try:
            handle: ActorRef
            if reach is None:
                handle = ray.get_actor(holder_name(node_id), NAMESPACE)
            else:
                handle = reach.actor
            if self._way == "ray":
                return Source(node_id, handle), RayTransport()
            access: Access | None = None
            if self.is_near:  # else it is asked: so its silence is noticed once, and first
                access = self._near.access_beside(node_id, self._record.key)
            elif reach is not None:
                access = reach.access
            if access is None:
                access = ray.get(handle.access.remote(), timeout=ACCESS_TIMEOUT_S)
        except ValueError as error:  # Ray's word for: no such actor
            raise HolderUnavailableError(node_id, "it is gone") from error
        except GetTimeoutError as error:
            reason = f"no answer within {ACCESS_TIMEOUT_S:g} s"
            raise HolderTimeoutError(node_id, reason) from error
        except RayError as error:
            raise HolderUnavailableError(node_id, f"{type(error).__name__}: {error}") from error
        transport = open_transports(access.secret, tls_like_ray(os.environ))[self._way]
        if self.is_near:
            transport = FallbackTransport(self._near, transport, needs_endpoint=False)
        return Source(node_id, handle, access.endpoint), transport


class DurableTier(_OfShard):
    """S3, or any other durable store."""

    label = name = DURABLE

    def __init__(self, store: DurableStore, sources: ShardSources) -> None:
        super().__init__(sources.record)
        self._store = store

    def read(self, index: int) -> Chunk:
        """See Tier."""
        chunk = [np.empty(self._record.plan.chunk_sizes[index], dtype=np.uint8)]
        self._fill(index, chunk)
        return chunk

    def read_into(self, index: int, sink: Sink) -> None:
        """See Tier."""
        total = sink.missing_bytes
        with sink.writing(lambda: None):  # nothing ends it before it is over
            views = sink.next_views(total, limit=total)
            self._fill(index, [np.frombuffer(view, dtype=np.uint8) for view in views])
            sink.advance(total)

    def origin(self, index: int) -> AtStore:
        """How a holder is to read it."""
        key = register.shard_key(self._record.key.version, self._record.key.rank)
        return AtStore(self._store, key, sum(self._record.plan.chunk_sizes[:index]))

    def timeout_s(self, index: int) -> float:
        """How long one chunk may take; the store has deadlines of its own."""
        return upload_timeout_s(self._record.plan.chunk_sizes[index])

    def _fill(self, index: int, into: Chunk) -> None:
        """Read a chunk to where it belongs, twice if need be.

        Bytes that were damaged on the way may be whole the next time.
        """
        origin = self.origin(index)
        for _ in range(2):
            self._store.read_into(origin.object_key, origin.start, [piece.data for piece in into])
            if digest(into) == self.digest(index):
                return

    def close(self) -> None:
        """See Tier; the store is its owner's to close."""


def tiers_of(
    sources: ShardSources,
    node_id: str | None,
    store: DurableStore | None,
    way: Way = "auto",
    near: SharedMemoryTransport | None = None,
    reach: Mapping[HolderId, Reach] | None = None,
) -> list[Tier]:
    """The places to read a shard from, nearest first.

    Args:
        sources: Who has it.
        node_id: The reader's host, None outside of the cluster.
        store: The durable store, if one is configured.
        way: How to read from holders.
        near: How to read from the reader's own host, if that is shared by several shards.
        reach: How to get at holders, as far as that is known; others are looked for and asked.
    """
    known = reach or {}
    near_first = sorted(sources.holders, key=lambda holder: holder.node_id != node_id)
    tiers: list[Tier] = [
        HolderTier(holder, sources, node_id, way, near, known.get(holder)) for holder in near_first
    ]
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
    _pace: Pace = field(default_factory=Pace, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

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

        def of(tier: Tier, _: bool) -> Reading[Chunk]:
            def read() -> Chunk:
                chunk = tier.read(index)
                self._check(tier, index, digest(chunk))
                return chunk

            return Reading(read, cancel=lambda: True, finish=lambda chunk: chunk)

        return self._first_intact(index, of)

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Read ranges of the tensor data straight to where they belong, verified.

        A checksum is of a whole chunk: chunks of which nothing is wanted are not read, of others
        what nobody wants is read into memory that is used again. `AT_ONCE` chunks at a time.

        Args:
            pieces: What is wanted, in order, without overlaps.

        Raises:
            StepNotFoundError: No tier had an intact copy of a chunk. What the memory holds then is
                undefined, unlike what `chunks` hands out.
        """
        began_s = time.monotonic()
        run, scratch = Run(pieces), threading.local()
        sizes = self.sources.record.plan.chunk_sizes
        edges = list(itertools.accumulate(sizes[1:], initial=0))
        wanted = [i for i in range(1, len(sizes)) if run.wants(edges[i - 1], edges[i])]

        def one(index: int) -> None:
            into = run.places(edges[index - 1], edges[index], scratch)
            self._first_intact(index, functools.partial(self._into, index, into))

        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="tiered-fill") as pool:
            jobs = [pool.submit(one, index) for index in wanted]
            try:
                for job in jobs:
                    job.result()
            finally:  # nobody writes there any more when this is over
                pool.shutdown(cancel_futures=True)
        self.seconds = time.monotonic() - began_s

    def close(self) -> None:
        """Let go of connections; a later read opens them again."""
        for tier in self.tiers:
            tier.close()

    def _into(
        self, index: int, into: list[memoryview], tier: Tier, is_second: bool
    ) -> Reading[None]:
        """Read a chunk into the caller's memory; beside another read first into its own."""
        size_bytes, checksum = sum(view.nbytes for view in into), Digest()
        memory = [np.empty(size_bytes, dtype=np.uint8).data] if is_second else into
        sink = CancellableSink([ByteRange(0, size_bytes)], memory, checksum.update)

        def read() -> None:
            tier.read_into(index, sink)
            self._check(tier, index, checksum.digest())

        def finish(_: None) -> None:
            if is_second:
                Sink([ByteRange(0, size_bytes)], into).fill(memory)

        return Reading(read, sink.cancel, finish)

    def _check(self, tier: Tier, index: int, checksum: bytes) -> None:
        record = self.sources.record
        if checksum != record.digests[index]:
            raise ChunkCorruptError(tier.name, str(record.key), index)

    def _first_intact(self, index: int, of: Callable[[Tier, bool], Reading[T]]) -> T:
        """What is read from the first tier that has a chunk intact; slow ones are hedged."""
        record, problems = self.sources.record, list[str]()
        size_bytes = record.plan.chunk_sizes[index]
        waiting = list(self.tiers)
        while waiting:
            tier, *waiting = waiting
            is_hedged = waiting and not tier.is_at_hand(index)  # at the cost of a thread
            patience_s = self._pace.patience_s(size_bytes) if is_hedged else None
            began_s = time.monotonic()

            def hedge(spare: Sequence[Tier] = tuple(waiting[:1])) -> Attempt[Tier, T]:
                return Attempt(spare[0], of(spare[0], True))

            outcome = race(Attempt(tier, of(tier, False)), hedge, patience_s)
            if outcome.is_hedged:
                waiting.pop(0)
            elif not outcome.failed:
                self._pace.took(size_bytes, time.monotonic() - began_s)
            for attempt in outcome.failed:
                problems.append(self._passed_over(attempt.source, attempt.error))
            if outcome.outrun is not None:
                self._outrun(outcome.outrun.source, is_first=outcome.outrun.source is tier)
            if outcome.winner is not None:
                label = outcome.winner.source.label
                with self._lock:
                    counts = self.bytes_by_label
                    counts[label] = counts.get(label, 0) + size_bytes
                return outcome.winner.result()
        key = record.key
        wanted = f"rank {key.rank} of {key.version}"
        raise StepNotFoundError(key.job, wanted, tuple(problems))

    def _passed_over(self, tier: Tier, error: BaseException | None) -> str:
        """Note why a tier has not served a chunk.

        Raises:
            BaseException: What is no failure of a copy.
        """
        if not isinstance(error, TieredError):
            assert error is not None
            raise error
        logger.warning("%s %s; trying the next copy", self.sources.record.key, error)
        is_corrupt = isinstance(error, ChunkCorruptError | DurableObjectError)
        # By way of a holder the bytes may be damaged after they came from there.
        self.is_rotten = self.is_rotten or (is_corrupt and tier.name == DURABLE)
        self._ask_last(tier)
        return str(error)

    def _outrun(self, tier: Tier, *, is_first: bool) -> None:
        """Note that another copy was faster."""
        if not is_first:
            self._pace.wasted()
            return
        logger.warning(
            "%s %s is slow: going on with the next copy", self.sources.record.key, tier.name
        )
        self._ask_last(tier)

    def _ask_last(self, tier: Tier) -> None:
        """Ask a tier when no other answers: copies damaged in different chunks make a whole one."""
        with self._lock:
            self.tiers.remove(tier)
            self.tiers.append(tier)
