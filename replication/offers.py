"""The core of offers: which chunks of a holder go to which of its peers, and when again.

A part of `replication.inventory`, whose shards it looks at. Each hashed chunk is offered to each
buddy, and to whom the coordinator asks for (repair); what was not taken is offered again, with
pauses that grow.
"""

from collections import Counter
from dataclasses import dataclass, field

from replication.messages import (
    BuddiesChanged,
    ChunkNotTaken,
    ChunkTaken,
    Command,
    OfferChunk,
    ReplicationRequested,
)
from replication.records import HolderId, ShardKey, ShardPlan

OFFER_BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(slots=True)
class HeldShard:
    """One shard here, sealed or still arriving."""

    plan: ShardPlan
    staged_here: bool
    blocks: dict[int, int] = field(default_factory=dict)  # which bytes each chunk here is
    digests: dict[int, bytes] = field(default_factory=dict)
    quarantined: bool = False
    extra_peers: dict[HolderId, int | None] = field(default_factory=dict)  # -> bytes a second
    offered: set[tuple[HolderId, int]] = field(default_factory=set)
    taken: set[tuple[HolderId, int]] = field(default_factory=set)

    @property
    def is_sealed(self) -> bool:
        """Every chunk is here with its checksum, and none was found corrupt."""
        return not self.quarantined and len(self.digests) == len(self.plan.chunk_sizes)


class Offers:
    """What one holder sends. Not thread-safe.

    Args:
        holder: Whose.
        shards: What it holds; the inventory changes it.
    """

    def __init__(self, holder: HolderId, shards: dict[ShardKey, HeldShard]) -> None:
        self.holder = holder
        self.shards = shards
        self.buddies: dict[str, tuple[HolderId, ...]] = {}
        self.counted: dict[str, frozenset[HolderId]] = {}
        self._retries: dict[tuple[HolderId, ShardKey, int], tuple[int, float]] = {}

    def peers(self) -> tuple[set[HolderId], frozenset[HolderId]]:
        """Whoever shards of any job go to; and every holder that lives, as far as is known here."""
        buddies = {peer for peers in self.buddies.values() for peer in peers} - {self.holder}
        return buddies, frozenset().union(*self.counted.values())

    def buddies_changed(self, event: BuddiesChanged, fence: int) -> list[Command]:
        """Offer to new buddies what of the present generation has too few copies.

        Of older ones the coordinator asks for the copies that are missing. Else each change, and
        each life of a job that fails again and again, would add a copy.
        """
        self.buddies[event.job] = event.buddies
        self.counted[event.job] = event.counted
        commands: list[Command] = []
        mine = (k for k in self.shards if k.job == event.job and k.version.generation >= fence)
        for key in sorted(mine):
            shard = self.shards[key]
            is_served = self._has_copies_enough(key, shard)
            peers = sorted(shard.extra_peers) if is_served else self._peers_of(key, shard)
            commands += self._offer(key, shard, peers)
        return commands

    def requested(self, event: ReplicationRequested) -> list[Command]:
        """The coordinator wants a copy somewhere."""
        if (shard := self.shards.get(event.key)) is None or not shard.is_sealed:
            return []
        # Saves go to a buddy in any case; one that is on its way has no bound.
        is_served = shard.staged_here and event.to in self.buddies.get(event.key.job, ())
        is_current = event.key.version.generation >= event.generation
        shard.extra_peers[event.to] = None if is_served and is_current else event.bytes_per_s
        # The peer may have lost what it once took: offer every chunk again.
        for index in range(len(shard.plan.chunk_sizes)):
            shard.taken.discard((event.to, index))
            shard.offered.discard((event.to, index))
        return self.of_shard(event.key)

    def end_repairs(self, job: str) -> None:
        """Copies that were asked for are not made any more: a new generation asks for its own."""
        for key, shard in self.shards.items():
            if key.job == job:
                shard.extra_peers.clear()

    def is_wanted(self, offer: OfferChunk) -> bool:
        """Whether a chunk that has waited to be sent at a bounded rate still is to be."""
        shard = self.shards.get(offer.key)
        return shard is not None and shard.extra_peers.get(offer.to) == offer.bytes_per_s

    def of_shard(self, key: ShardKey) -> list[Command]:
        """Offer each hashed chunk of a shard to each peer that was not offered it yet."""
        shard = self.shards[key]
        return self._offer(key, shard, self._peers_of(key, shard))

    def taken(self, event: ChunkTaken) -> None:
        """A peer has a chunk."""
        self._retries.pop((event.peer, event.key, event.index), None)
        if shard := self.shards.get(event.key):
            shard.taken.add((event.peer, event.index))

    def not_taken(self, event: ChunkNotTaken, now_s: float) -> None:
        """A peer has not taken a chunk: it is offered again after a pause."""
        slot = (event.peer, event.key, event.index)
        tries = self._retries.get(slot, (0, 0.0))[0]
        pause_s = OFFER_BACKOFF_S[min(tries, len(OFFER_BACKOFF_S) - 1)]
        self._retries[slot] = (tries + 1, now_s + pause_s)

    def repeat(self, now_s: float) -> list[Command]:
        """Offer what is due again, unless it is not wanted any more."""
        commands: list[Command] = []
        for slot, (tries, due_s) in sorted(self._retries.items()):
            peer, key, index = slot
            shard = self.shards.get(key)
            is_here = shard is not None and index in shard.digests  # not if it is being replaced
            if shard is None or not is_here or peer not in set(self._peers_of(key, shard)):
                del self._retries[slot]
                if shard is not None:
                    shard.offered.discard((peer, index))
            elif due_s <= now_s:
                self._retries[slot] = (tries, float("inf"))  # under way again
                commands.append(_offer(peer, key, shard, index))
        return commands

    def forget(self, key: ShardKey) -> None:
        """Nothing of a shard is offered again: it is gone, or about to be replaced."""
        self._retries = {k: v for k, v in self._retries.items() if k[1] != key}

    def forget_job(self, job: str) -> None:
        """A job has no buddies here any more."""
        self.buddies.pop(job, None)
        self.counted.pop(job, None)

    def _peers_of(self, key: ShardKey, shard: HeldShard) -> list[HolderId]:
        peers = self.buddies.get(key.job, ()) if shard.staged_here else ()
        if shard.extra_peers:
            peers = (*peers, *sorted(shard.extra_peers))
        return [peer for peer in dict.fromkeys(peers) if peer != self.holder]

    def _offer(self, key: ShardKey, shard: HeldShard, peers: list[HolderId]) -> list[Command]:
        commands: list[Command] = []
        for peer in peers if not shard.quarantined else ():
            due = [index for index in shard.digests if (peer, index) not in shard.offered]
            for index in sorted(due):
                shard.offered.add((peer, index))
                commands.append(_offer(peer, key, shard, index))
        return commands

    def _has_copies_enough(self, key: ShardKey, shard: HeldShard) -> bool:
        """Whether as many holders that count have taken all of a shard as it has buddies."""
        taken = Counter(peer for peer, _ in shard.taken)
        counted = self.counted.get(key.job, frozenset())
        whole = [p for p, n in taken.items() if n == len(shard.plan.chunk_sizes) and p in counted]
        return len(whole) >= len(self.buddies.get(key.job, ()))


def _offer(peer: HolderId, key: ShardKey, shard: HeldShard, index: int) -> OfferChunk:
    bytes_per_s = shard.extra_peers.get(peer)
    return OfferChunk(peer, key, shard.plan, index, shard.digests[index], bytes_per_s)
