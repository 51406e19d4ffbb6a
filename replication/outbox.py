"""Chunks on offer to other holders: what waits for the same one goes with one call.

An actor call costs both ends milliseconds of processor time, as much as several MiB of bytes do; a
shard whose chunks are hashed faster than they are sent is so offered in a few calls.

What makes up for lost copies goes beside that, at a bounded rate: a restore, and the saves after
it, have the same links.
"""

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Sequence

from replication.background import Background
from replication.messages import OfferChunk
from replication.records import HolderId, ShardKey

CALLS_AT_ONCE = 2  # per peer, as many as it has connections; more won 1-3 %
CALL_BYTES, CALL_CHUNKS = 256 << 20, 16  # the most in a call: its deadline grows with the bytes
# At a bounded rate as many bytes go with one call as it allows in this time, but one chunk at
# least: a restore that begins finds no more than that under way.
BOUNDED_CALL_S = 0.05

Lane = tuple[HolderId, bool]  # to whom, and whether at a bounded rate
Waiting = dict[tuple[ShardKey, int], OfferChunk]  # what is offered again keeps its place


class Outbox:
    """What one holder offers; used on its event loop alone.

    Args:
        send: Makes one call to a peer, with chunks of one shard; raises nothing.
        background: Where the calls are made.
        is_wanted: Whether a chunk that has waited for its turn, at a bounded rate, is to go yet.
        clock: Monotonic seconds.
        sleep: Lets so many seconds pass.
    """

    def __init__(
        self,
        send: Callable[[HolderId, Sequence[OfferChunk]], Awaitable[None]],
        background: Background,
        is_wanted: Callable[[OfferChunk], bool],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._send = send
        self._background = background
        self._is_wanted = is_wanted
        self._clock, self._sleep = clock, sleep
        self._waiting: dict[Lane, Waiting] = {}
        self._calls: dict[Lane, int] = {}
        self._free_s = -math.inf  # when the next chunk may go at a bounded rate, to whomever

    def put(self, offer: OfferChunk) -> None:
        """Offer a chunk once those before it are on their way."""
        is_bounded = offer.bytes_per_s is not None
        lane = offer.to, is_bounded
        self._waiting.setdefault(lane, {})[offer.key, offer.index] = offer
        if self._calls.get(lane, 0) < (1 if is_bounded else CALLS_AT_ONCE):
            self._calls[lane] = self._calls.get(lane, 0) + 1
            run = self._empty_slowly if is_bounded else self._empty
            self._background.start(run(lane))

    async def _empty(self, lane: Lane) -> None:
        try:
            while offers := self._next(lane, CALL_BYTES):
                await self._send(lane[0], offers)
        finally:
            self._ended(lane)

    async def _empty_slowly(self, lane: Lane) -> None:
        """Send at the rate that the chunks say, as far as they are wanted when it is their turn."""
        waiting = self._waiting[lane]
        try:
            while waiting:
                while (left_s := self._free_s - self._clock()) > 0:
                    await self._sleep(left_s)
                for place in [p for p, offer in waiting.items() if not self._is_wanted(offer)]:
                    del waiting[place]
                rate = next((offer.bytes_per_s for offer in waiting.values()), None)
                if rate is not None:
                    offers = self._next(lane, rate * BOUNDED_CALL_S)
                    self._free_s = self._clock() + sum(map(_size_of, offers)) / rate
                    await self._send(lane[0], offers)
        finally:
            self._ended(lane)

    def _ended(self, lane: Lane) -> None:
        self._calls[lane] -= 1
        if not self._calls[lane]:
            del self._calls[lane]
            if not self._waiting[lane]:
                del self._waiting[lane]

    def _next(self, lane: Lane, most_bytes: float) -> list[OfferChunk]:
        """This call's share of the first shard's chunks: the other calls have theirs to carry."""
        waiting, offers, size_bytes = self._waiting[lane], list[OfferChunk](), 0
        share = min(CALL_CHUNKS, math.ceil(len(waiting) / CALLS_AT_ONCE))
        for offer in itertools.islice(waiting.values(), share):
            size_bytes += _size_of(offer)
            if offers and (offer.key, offer.plan) != (offers[0].key, offers[0].plan):
                break
            if offers and size_bytes > most_bytes:
                break
            offers.append(offer)
        for offer in offers:
            del waiting[offer.key, offer.index]
        return offers


def _size_of(offer: OfferChunk) -> int:
    return offer.plan.chunk_sizes[offer.index]
