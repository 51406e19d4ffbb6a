"""Chunks on offer to other holders: what waits for the same one goes with one call.

An actor call costs both ends milliseconds of processor time, as much as several MiB of bytes do; a
shard whose chunks are hashed faster than they are sent is so offered in a few calls.
"""

import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from replication.background import Background
from replication.messages import OfferChunk
from replication.records import HolderId

CALLS_AT_ONCE = 2  # per peer, as many as it has connections; more won 1-3 %
CALL_BYTES, CALL_CHUNKS = 256 << 20, 16  # the most in a call: its deadline grows with the bytes


class Outbox:
    """What one holder offers; used on its event loop alone.

    Args:
        send: Makes one call to a peer, with chunks of one shard; raises nothing.
        background: Where the calls are made.
    """

    def __init__(
        self,
        send: Callable[[HolderId, Sequence[OfferChunk]], Awaitable[None]],
        background: Background,
    ) -> None:
        self._send = send
        self._background = background
        self._waiting: dict[HolderId, deque[OfferChunk]] = {}
        self._calls: dict[HolderId, int] = {}

    def put(self, offer: OfferChunk) -> None:
        """Offer a chunk once those before it are on their way."""
        self._waiting.setdefault(offer.to, deque()).append(offer)
        if self._calls.get(offer.to, 0) < CALLS_AT_ONCE:
            self._calls[offer.to] = self._calls.get(offer.to, 0) + 1
            self._background.start(self._empty(offer.to))

    async def _empty(self, to: HolderId) -> None:
        try:
            while offers := self._next(to):
                await self._send(to, offers)
        finally:
            self._calls[to] -= 1
            if not self._calls[to]:
                del self._calls[to]
                if not self._waiting[to]:
                    del self._waiting[to]

    def _next(self, to: HolderId) -> list[OfferChunk]:
        """This call's share of the first shard's chunks: the other calls have theirs to carry."""
        waiting, offers, size_bytes = self._waiting[to], list[OfferChunk](), 0
        share = min(CALL_CHUNKS, math.ceil(len(waiting) / CALLS_AT_ONCE))
        while waiting and len(offers) < share:
            offer = waiting[0]
            size_bytes += offer.plan.chunk_sizes[offer.index]
            if offers and (offer.key, offer.plan) != (offers[0].key, offers[0].plan):
                break
            if offers and size_bytes > CALL_BYTES:
                break
            offers.append(waiting.popleft())
        return offers
