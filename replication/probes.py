"""Asking the holders that this one sends to whether they are there; a shell of `replication.links`.

Each peer is asked by itself, one question at a time: one that hangs keeps nobody else waiting.
Looking a peer up in Ray's GCS has no deadline here, and says nothing about the link to it: while
the GCS is away nobody is blamed, and no more than one look-up for each peer is waiting.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection

from ray.exceptions import ActorDiedError

from replication.links import PROBE_S, PROBE_TIMEOUT_S, Links
from replication.records import ActorRef, HolderId


class Probes:
    """The probes of one holder; used on its event loop alone."""

    def __init__(
        self,
        find: Callable[[HolderId], Awaitable[ActorRef]],
        peers: Callable[[], tuple[Collection[HolderId], Collection[HolderId]]],
    ) -> None:
        """Start with nobody asked.

        Args:
            find: Returns the actor of a peer.
            peers: Returns whom shards go to, and every holder that lives.
        """
        self._find = find
        self._peers = peers
        self._links = Links()
        self._asked: dict[HolderId, asyncio.Task[None]] = {}

    @property
    def cut_off(self) -> frozenset[HolderId]:
        """See `Links.cut_off`."""
        return self._links.cut_off

    async def run(self) -> None:
        """Ask for ever."""
        while True:
            for peer in self._links.to_probe(*self._peers()) - self._asked.keys():
                self._asked[peer] = asyncio.get_running_loop().create_task(self._probe(peer))
            await asyncio.sleep(PROBE_S)

    async def _probe(self, peer: HolderId) -> None:
        try:
            actor = await self._find(peer)
            await asyncio.wait_for(actor.hello.remote(), PROBE_TIMEOUT_S)
        except (ActorDiedError, ValueError):
            pass  # it is gone: the coordinator hears of that, and it says nothing about the link
        except Exception:  # noqa: BLE001 - whatever it is, the peer did not answer
            self._links.missed(peer)
        else:
            self._links.answered(peer)
        finally:
            del self._asked[peer]
