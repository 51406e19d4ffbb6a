"""Chunks on offer to other holders: what waits for the same one goes with one call.

An actor call costs both ends milliseconds of processor time, as much as several MiB of bytes do; a
shard whose chunks are hashed faster than they are sent is so offered in a few calls.

What makes up for lost copies goes beside that, at a bounded rate: a restore, and the saves after
it, have the same links.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from replication.background import Background
from replication.messages import OfferChunk
from replication.records import HolderId

CALLS_AT_ONCE = 2  # per peer, as many as it has connections; more won 1-3 %
CALL_BYTES, CALL_CHUNKS = 256 << 20, 16  # the most in a call: its deadline grows with the bytes
BOUNDED_CALL_S = 0.25  # as many bytes as the rate allows in it go with one call, one chunk at least

Lane = tuple[HolderId, bool]  # to whom, and whether at a bounded rate


class Outbox:
    """What one holder offers; used on its event loop alone.

    Args:
        send: Makes one call to a peer, with chunks of one shard; raises nothing.
        background: Where the calls are made.
        clock: Monotonic seconds.
        sleep: Lets so many seconds pass.
    """

    def __init__(
        self,
        send: Callable[[HolderId, Sequence[OfferChunk]], Awaitable[None]],
        background: Background,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._send = send
        self._background = background
        self._clock, self._sleep = clock, sleep
        self._waiting: dict[Lane, deque[OfferChunk]] = {}
        self._calls: dict[Lane, int] = {}
        self._free_s = -math.inf  # when the next chunk may go at a bounded rate, to whomever

    def put(self, offer: OfferChunk) -> None:
        """Offer a chunk once those before it are on their way."""
        is_bounded = offer.bytes_per_s is not None
        lane = offer.to, is_bounded
        self._waiting.setdefault(lane, deque()).append(offer)
        if self._calls.get(lane, 0) < (1 if is_bounded else CALLS_AT_ONCE):
            self._calls[lane] = self._calls.get(lane, 0) + 1
            self._background.start(self._empty(lane))

    def withdraw(self, job: str) -> None:
        """Of a job nothing that waits goes at a bounded rate any more."""
        for (_, is_bounded), waiting in self._waiting.items():
            if is_bounded:
                left = [offer for offer in waiting if offer.key.job != job]
                waiting.clear()
                waiting.extend(left)

    async def _empty(self, lane: Lane) -> None:
        try:
            while offers := self._next(lane):
                await self._turn(offers)
                await self._send(lane[0], offers)
        finally:
            self._calls[lane] -= 1
            if not self._calls[lane]:
                del self._calls[lane]
                if not self._waiting[lane]:
                    del self._waiting[lane]

    def _next(self, lane: Lane) -> list[OfferChunk]:
        """This call's share of the first shard's chunks: the other calls have theirs to carry."""
        waiting, offers, size_bytes = self._waiting[lane], list[OfferChunk](), 0
        share = min(CALL_CHUNKS, math.ceil(len(waiting) / CALLS_AT_ONCE))
        while waiting and len(offers) < share:
            offer = waiting[0]
            size_bytes += _size_of(offer)
            if offers and (offer.key, offer.plan) != (offers[0].key, offers[0].plan):
                break
            rate = offer.bytes_per_s
            if offers and size_bytes > (CALL_BYTES if rate is None else rate * BOUNDED_CALL_S):
                break
            offers.append(waiting.popleft())
        return offers

    async def _turn(self, offers: Sequence[OfferChunk]) -> None:
        """Wait until chunks at a bounded rate may go."""
        if (bytes_per_s := offers[0].bytes_per_s) is None:
            return
        now_s = self._clock()
        turn_s = max(now_s, self._free_s)
        self._free_s = turn_s + sum(map(_size_of, offers)) / bytes_per_s
        if turn_s > now_s:
            await self._sleep(turn_s - now_s)


def _size_of(offer: OfferChunk) -> int:
    return offer.plan.chunk_sizes[offer.index]
