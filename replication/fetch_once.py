"""Chunks from elsewhere that several processes of this host want: each comes once.

Ranks of data parallelism have the same bytes under keys of their own, and of a world that has
grown several ranks read one shard. On a host that has no copy each of them would fetch every chunk
for itself, from another host or from S3. So they ask their own host's holder, which fetches it
once, told apart by its checksum, and they all read it in the memory that they share.

Rules:
    1. Whoever asks for a chunk that is on its way waits for it. When it cannot be had, all who wait
       hear so, and the next one who asks makes a new attempt.
    2. What came is kept for `KEEP_S` after it was last asked for: ranks of one host restore at the
       same time. When there is no room, what was asked for longest ago goes first.
    3. It has only memory that the holder's own shards leave free, and is no copy that counts.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from replication.durable import DurableStore
from replication.errors import HolderUnavailableError
from replication.records import Chunk, Endpoint, HolderId, Way

KEEP_S = 10.0


@dataclass(frozen=True, slots=True)
class AtHolder:
    """A place to fetch a chunk from: another host's memory.

    Attributes:
        holder: Who has it.
        endpoint: Where its data plane listens, if it has one.
        way: How to fetch it.
    """

    holder: HolderId
    endpoint: Endpoint | None = None
    way: Way = "auto"


@dataclass(frozen=True, slots=True)
class AtStore:
    """A place to fetch a chunk from: an object of a durable store.

    Attributes:
        store: The store; whoever fetches from it closes it.
        object_key: Under what the object is stored.
        start: Where in it the chunk begins.
    """

    store: DurableStore
    object_key: str
    start: int


Origin = AtHolder | AtStore


@dataclass(slots=True)
class _Guest:
    chunk: Chunk
    size_bytes: int
    asked_s: float


class FetchOnce:
    """Of one holder; runs on its event loop.

    Args:
        node_id: The host, for errors.
    """

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._arriving: dict[bytes, tuple[asyncio.Task[Chunk], int]] = {}
        self._here: OrderedDict[bytes, _Guest] = OrderedDict()  # asked for longest ago first

    @property
    def held_bytes(self) -> int:
        """Of what is here, or on its way."""
        here = sum(guest.size_bytes for guest in self._here.values())
        return here + sum(size_bytes for _, size_bytes in self._arriving.values())

    async def get(
        self,
        checksum: bytes,
        size_bytes: int,
        fetch: Callable[[], Awaitable[Chunk]],
        room_bytes: int,
    ) -> Chunk:
        """The chunk with this checksum, and `fetch` it if nobody has asked before.

        Args:
            checksum: xxh3-128 of the chunk, which `fetch` verifies.
            size_bytes: Its size.
            fetch: Brings it.
            room_bytes: How much may be held here in all.

        Raises:
            HolderUnavailableError: There is no room.
            Exception: Whatever `fetch` raises.
        """
        if (guest := self._here.get(checksum)) is not None:
            guest.asked_s = time.monotonic()
            self._here.move_to_end(checksum)
            return guest.chunk
        if checksum not in self._arriving:
            self.trim(room_bytes - size_bytes)
            if self.held_bytes + size_bytes > room_bytes:
                reason = f"it has no room for {size_bytes} bytes that are not its own"
                raise HolderUnavailableError(self._node_id, reason)
            task = asyncio.ensure_future(self._fetch(checksum, size_bytes, fetch))
            self._arriving[checksum] = task, size_bytes
        return await asyncio.shield(self._arriving[checksum][0])

    def trim(self, keep_bytes: int) -> None:
        """Let go of what has not been asked for lately, and of more until so much is left."""
        now_s, held_bytes = time.monotonic(), self.held_bytes
        while self._here:
            checksum, guest = next(iter(self._here.items()))
            if held_bytes <= keep_bytes and now_s - guest.asked_s < KEEP_S:
                return
            del self._here[checksum]
            held_bytes -= guest.size_bytes

    async def _fetch(
        self, checksum: bytes, size_bytes: int, fetch: Callable[[], Awaitable[Chunk]]
    ) -> Chunk:
        try:
            chunk = await fetch()
            self._here[checksum] = _Guest(chunk, size_bytes, time.monotonic())
            return chunk
        finally:
            del self._arriving[checksum]
