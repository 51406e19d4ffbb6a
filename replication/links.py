"""The core that knows which of its buddies a holder cannot reach.

Heartbeats go to the coordinator alone, and a link between two hosts may be cut although both answer
it: every save whose copies take that way would wait until it heals. So a holder asks each holder
that it sends to whether it is there, about once a second. One that did not answer `MISSES` times in
a row is cut off, and one answer ends that: it has gone there and back, which is what a chunk needs
too, so a link that carries one direction only is as good as cut. The coordinator hears of it with
the next heartbeat (`replication.membership`), and decides.
"""

from collections.abc import Collection, Iterable

from replication.records import HolderId

PROBE_S = 1.0
PROBE_TIMEOUT_S = 2.0
MISSES = 3


class Links:
    """Which peers of one holder answer it. Not thread-safe."""

    def __init__(self) -> None:
        self._misses: dict[HolderId, int] = {}

    @property
    def cut_off(self) -> frozenset[HolderId]:
        """Peers that are believed not to be reachable from here."""
        return frozenset(peer for peer, n in self._misses.items() if n >= MISSES)

    def to_probe(self, buddies: Iterable[HolderId], live: Collection[HolderId]) -> set[HolderId]:
        """Whom to ask now: whoever shards go to, and who is cut off, as long as it lives.

        Args:
            buddies: Whoever shards go to.
            live: Holders that the coordinator says are there.
        """
        wanted = {*buddies, *(self.cut_off & frozenset(live))}
        self._misses = {peer: n for peer, n in self._misses.items() if peer in wanted}
        return wanted

    def answered(self, peer: HolderId) -> None:
        """A peer has answered."""
        self._misses.pop(peer, None)

    def missed(self, peer: HolderId) -> None:
        """A peer has not answered in time."""
        self._misses[peer] = self._misses.get(peer, 0) + 1
