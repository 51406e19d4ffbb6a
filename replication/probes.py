"""Asking the holders that this one sends to whether they are there; a shell of `replication.links`.

Each peer is asked by itself, one question at a time: one that hangs keeps nobody else waiting.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection

from ray.exceptions import ActorDiedError

from replication.links import PROBE_S, PROBE_TIMEOUT_S, Links
from replication.records import HolderId


class Probes:
    """The probes of one holder; used on its event loop alone."""

    def __init__(
        self,
        ask: Callable[[HolderId], Awaitable[object]],
        peers: Callable[[], tuple[Collection[HolderId], Collection[HolderId]]],
    ) -> None:
        """Start with nobody asked.

        Args:
            ask: Returns when a peer has answered.
            peers: Returns whom shards go to, and every holder that lives.
        """
        self._ask = ask
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
            await asyncio.wait_for(self._ask(peer), PROBE_TIMEOUT_S)
        except ActorDiedError:
            pass  # the coordinator hears of that, and it says nothing about the link
        except Exception:  # noqa: BLE001 - whatever it is, the peer did not answer
            self._links.missed(peer)
        else:
            self._links.answered(peer)
        finally:
            del self._asked[peer]
