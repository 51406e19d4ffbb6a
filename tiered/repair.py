"""The core of repair: which copies are made again, from where to where, and when.

A shard of a step that is still needed with fewer copies than the policy asks for is copied again,
newest step first. Each try takes the next of its holders as the source: the first one's copy may be
corrupt. Some are under way at a time, and a host sends for repair at a bounded rate, which its
holder keeps to within a shard (`replication.outbox`). Ranks that read their state go first, for a
while: training waits for them, and they read from the same hosts.
"""

import math
from collections import Counter
from zlib import crc32

from replication.records import HolderId, ShardKey, Version
from tiered import messages as m
from tiered.catalogue import Catalogue, Degraded

REPAIR_BASE_S = 60.0
REPAIR_BYTES_PER_S = 20e6  # slower than this counts as lost
REPAIRS_AT_ONCE = 8
RESTORES_FIRST_S = 30.0  # at most; each second without that earns back one


class Repair:
    """Brings the copies of one job's steps back to what its policy asks for."""

    def __init__(self, known: Catalogue) -> None:
        self.known = known
        self._under_way: dict[tuple[ShardKey, HolderId], float] = {}  # -> when it counts as lost
        self._tries: dict[ShardKey, int] = {}
        self._free_s: dict[str, float] = {}  # by host: when it may send again
        self._reading: set[int] = set()  # ranks that do not have their state yet
        self._reading_since_s = -math.inf
        self._first_until_s = -math.inf  # they go first, or went
        self._budget_s = RESTORES_FIRST_S  # for that

    def forget_below(self, mark: Version) -> None:
        """Steps below the watermark begin with their first source again."""
        self._tries = {k: n for k, n in self._tries.items() if k.version >= mark}

    def ranks_read(self, ranks: int, now_s: float) -> None:
        """So many ranks are about to read their state, once it is verified, and go first.

        What is under way ends with the new generation's fence, and is asked for again. Lives of a
        job that fails again and again do not put its repair off for ever: that is bounded by a
        budget of `RESTORES_FIRST_S`, so that in the long run it goes on half of the time.
        """
        for key, _ in self._under_way:  # its source was not at fault
            self._tries[key] = max(0, self._tries.get(key, 0) - 1)
        self._under_way.clear()
        self._free_s.clear()
        self.nobody_reads(now_s)  # of an older life
        earned_s = now_s - self._first_until_s
        self._budget_s = min(RESTORES_FIRST_S, self._budget_s + earned_s)
        self._reading = set(range(ranks))
        self._reading_since_s = now_s
        self._first_until_s = now_s + self._budget_s

    def nobody_reads(self, now_s: float) -> None:
        """There is nothing to read, or nothing any more."""
        if self._reading:
            self._reading.clear()
            self._first_until_s = min(now_s, self._first_until_s)
            self._budget_s -= self._first_until_s - self._reading_since_s

    def rank_has_read(self, rank: int, now_s: float) -> bool:
        """A rank has its state; whether it was the last one."""
        if self._reading != {rank}:
            self._reading.discard(rank)
            return False
        self.nobody_reads(now_s)
        return True

    def _waits(self, now_s: float) -> bool:
        """Whether ranks that read go first; a host that is to go away has no time for that."""
        if not self._reading or now_s >= self._first_until_s:
            return False
        return not any(holder.node_id in self.known.leaving for holder in self.known.holders)

    def repair(self, now_s: float) -> list[m.Command]:
        """Ask for one more copy of each shard that has too few, newest step first."""
        known = self.known
        commands: list[m.Command] = []
        if self._waits(now_s):
            return commands
        need = known.copies_needed
        self._under_way = {
            (key, to): due
            for (key, to), due in self._under_way.items()
            if due > now_s and to in known.holders and to not in known.intact(key.version, key.rank)
        }
        short = [
            (version, rank)
            for version in known.needed_versions()
            for rank in sorted(known.copies.get(version, {}))
            if len(known.copies_of(version, rank)) < need
        ]
        if not short:
            return commands
        every = (held for ranks in known.copies.values() for held in ranks.values())
        load = Counter(holder for held in every for holder in held)
        least_first = sorted(known.staying, key=lambda h: (load[h], h))
        for version, rank in short:
            commands += self._repair_shard(version, rank, least_first, now_s)
        return commands

    def _repair_shard(
        self, version: Version, rank: int, hosts: list[HolderId], now_s: float
    ) -> list[m.Command]:
        """Ask for the missing copies of one shard, from hosts that have sent little lately.

        They go to the source's buddies, else to who has least; who did not take it comes last.
        """
        known = self.known
        commands: list[m.Command] = []
        settings, key = known.settings, ShardKey(known.name, version, rank)
        held, counted = known.intact(version, rank), known.copies_of(version, rank)
        under_way = {to.node_id for k, to in self._under_way if k == key}
        missing = known.copies_needed - len(counted | under_way)
        if not held or missing <= 0 or settings is None:
            return []
        tries = self._tries.get(key, 0)  # the first one's copy may be corrupt
        there = {h.node_id for h in held} | under_way
        ways = [(h, self._targets(h, there, hosts)) for h in held]
        if not (ways := [(source, targets) for source, targets in ways if targets]):
            return []
        source, targets = ways[tries % len(ways)]
        size_bytes = held[source].plan.size_bytes
        skipped = tries // len(ways) % len(targets)
        for target in targets[skipped:] + targets[:skipped]:
            free_s = max(now_s, self._free_s.get(source.node_id, 0.0))
            if missing <= 0 or len(self._under_way) >= REPAIRS_AT_ONCE or free_s > now_s:
                break
            pace = settings.memory.repair_bytes_per_s
            busy_s = size_bytes / pace
            slow_s = max(size_bytes / REPAIR_BYTES_PER_S, 2 * busy_s)
            self._under_way[key, target] = now_s + REPAIR_BASE_S + slow_s
            self._tries[key] = tries + 1
            self._free_s[source.node_id] = now_s + busy_s
            commands.append(m.ReplicateShard(source, key, target, known.generation, pace))
            missing -= 1
        return commands

    def _targets(self, source: HolderId, there: set[str], hosts: list[HolderId]) -> list[HolderId]:
        """Where a host can send a copy that are not `there`: its buddies first, then the others."""
        known = self.known
        every = dict.fromkeys([*known.buddies.get(source, ()), *hosts])
        return [h for h in every if h.node_id not in there and known.can_reach(source, h)]

    def release(self) -> list[m.Command]:
        """Have copies beyond what the policy asks for let go of, or they would fill the memory.

        They come of hosts that were away and are back, after their shards were copied to others.
        Which stay is the same for whoever decides, with whatever view of the cluster: the first
        ones in an order that is fixed for each shard. So of two coordinators, each knowing copies
        that the other does not, none takes what the other leaves. A step on its way is left alone:
        its writer counts on what it has sent.
        """
        known = self.known
        newest = max((v for v in known.commits if v.generation == known.generation), default=None)
        surplus: dict[HolderId, list[ShardKey]] = {}
        for version, ranks in sorted(known.copies.items()):
            if version.generation == known.generation and (newest is None or version > newest):
                continue
            for rank in ranks:
                for holder in self._surplus(version, rank):
                    surplus.setdefault(holder, []).append(ShardKey(known.name, version, rank))
        for holder, keys in surplus.items():
            for key in keys:
                known.drop_copy(holder, key)
        return [
            m.ReleaseCopies(known.generation, holder, tuple(keys))
            for holder, keys in sorted(surplus.items())
        ]

    def _surplus(self, version: Version, rank: int) -> list[HolderId]:
        """Who has a copy of a shard that nothing would be lost with."""
        known, need = self.known, self.known.copies_needed
        held, staying = known.intact(version, rank), known.staying
        first = sorted(
            (h for h in held if h in staying),
            key=lambda h: (held[h].is_replica, crc32(f"{rank} {h.node_id}".encode()), h),
        )
        kept = first[:need]
        domains = {staying[h] or h.node_id for h in kept}
        is_spread = len(domains) >= need
        return [
            h
            for h in first[need:]
            if held[h].is_replica and (is_spread or (staying[h] or h.node_id) in domains)
        ]

    def note_degraded(self, now_s: float) -> list[m.Command]:
        """Keep track of kept steps with too few copies; tell when one begins or ends to be so."""
        known = self.known
        commands: list[m.Command] = []
        kept = set(known.needed_versions())
        for version in sorted(kept | known.degraded.keys()):
            ranks = known.short_ranks(version) if version in kept else ()
            before = known.degraded.get(version)
            if ranks:
                if before is None:
                    commands.append(m.PolicyMissed(version, ranks))
                since_s = now_s if before is None else before.since_s
                known.degraded[version] = Degraded(version, ranks, since_s, known.why_short)
            elif before is not None:
                del known.degraded[version]
                if version in kept:
                    commands.append(m.PolicyMet(version, now_s - before.since_s))
        return commands
