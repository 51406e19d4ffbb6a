"""Chunks that come to a host from elsewhere: received into the object store, and verified.

    holder    another host's, over its data plane or through Ray
    store     a durable store's, which several processes of this host want

Both arrive in memory of the object store that is used again (`replication.buffers`), and are hashed
there before anybody is told of them.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from replication.buffers import Buffers
from replication.checksum import Digest
from replication.dataplane import open_transports
from replication.errors import ChunkCorruptError
from replication.fetch_once import AtStore, FetchOnce, Origin
from replication.records import ActorRef, ByteRange, Chunk, ChunkId, HolderId, Way
from replication.sink import Sink
from replication.stream import Tls
from replication.transport import Source, fetch_timeout_s
from replication.wire import Secret

RECEIVERS = 16  # threads; one that waits for a hung peer must not keep others from theirs
WAYS: tuple[Way, ...] = ("tcp", "ray")


class Arrivals:
    """Of one holder; runs on its event loop.

    Args:
        node_id: The host, for errors.
        buffers: Where chunks arrive.
        secret: Of the cluster's data plane.
        tls: As the other hosts have it.
        peer: Finds another host's holder.
    """

    def __init__(
        self,
        node_id: str,
        buffers: Buffers,
        secret: Secret,
        tls: Tls | None,
        peer: Callable[[HolderId], Awaitable[ActorRef]],
    ) -> None:
        self.transports = open_transports(secret, tls)
        self.buffers = buffers
        self._guests = FetchOnce(node_id)
        self._peer = peer
        self._receivers = ThreadPoolExecutor(RECEIVERS, thread_name_prefix="tiered-receive")

    @property
    def received_bytes(self) -> dict[str, int]:
        """From other holders so far, by the way they came."""
        return {way: self.transports[way].bytes_read for way in WAYS}

    async def fetch(self, wanted: ChunkId, expected: bytes, origin: Origin) -> Chunk:
        """Bring a chunk here.

        Args:
            wanted: Which chunk.
            expected: Its checksum.
            origin: Where from.

        Raises:
            ChunkCorruptError: What arrived does not have the checksum `expected`.
            HolderUnavailableError, ShardNotHeldError, ProtocolError: The holder could not serve it.
            Exception: Whatever the store raises.
        """
        if isinstance(origin, AtStore):
            return await asyncio.to_thread(self._download, wanted, expected, origin)
        holder = origin.holder
        source = Source(holder.node_id, await self._peer(holder), origin.endpoint)
        receive = asyncio.get_running_loop().run_in_executor
        return await receive(self._receivers, self._receive, source, wanted, expected, origin.way)

    async def fetch_once(
        self, wanted: ChunkId, expected: bytes, origin: Origin, room_bytes: int
    ) -> Chunk:
        """Bring a chunk here for several readers; see `FetchOnce.get`.

        Raises:
            HolderUnavailableError: There is no room.
            Exception: As `fetch`.
        """

        async def fetch() -> Chunk:
            return await self.fetch(wanted, expected, origin)

        return await self._guests.get(expected, wanted.size_bytes, fetch, room_bytes)

    @property
    def has_guests(self) -> bool:
        """Whether there is anything here that was brought for readers."""
        return self._guests.held_bytes > 0

    def trim(self, free_bytes: int, used_bytes: int) -> None:
        """Keep as much memory for chunks to come as the budget leaves, and no more than is used.

        What a collected step leaves so serves the next one; without any nothing is kept.

        Args:
            free_bytes: What shards, and memory lent for more, leave of the holder's budget.
            used_bytes: Of those.
        """
        self._guests.trim(free_bytes)
        guests_bytes = self._guests.held_bytes
        self.buffers.trim(max(0, min(free_bytes - guests_bytes, used_bytes + guests_bytes)))

    def _receive(self, source: Source, wanted: ChunkId, expected: bytes, way: Way) -> Chunk:
        """Read a chunk of another host, hashing it as it comes; blocks."""
        lease, checksum = self.buffers.lease(wanted.size_bytes), Digest()
        sink = Sink([ByteRange(0, wanted.size_bytes)], [lease.view], checksum.update)
        timeout_s = fetch_timeout_s(wanted.size_bytes)
        self.transports[way].read(source, wanted, sink, timeout_s)
        if checksum.digest() != expected:
            raise ChunkCorruptError(f"host {source.node_id[:8]}", str(wanted.key), wanted.index)
        return lease.pin()

    def _download(self, wanted: ChunkId, expected: bytes, origin: AtStore) -> Chunk:
        """Read a chunk of a durable store; blocks."""
        lease, checksum = self.buffers.lease(wanted.size_bytes), Digest()
        with contextlib.closing(origin.store) as store:
            store.read_into(origin.object_key, origin.start, [lease.view])
        checksum.update(lease.view)
        if checksum.digest() != expected:
            raise ChunkCorruptError("the durable store", str(wanted.key), wanted.index)
        return lease.pin()
