"""The judge: sets of who has which bytes, and what must follow from them. It shares no decision.

    I1 atomic    a resumed version has a copy of every rank; its shards are all of that version
    I2 valid     the checksums that a rank is told to expect are those of what that rank saved
    I3 durable   never older than the newest acknowledged step of which every rank has an intact
                 copy on a holder that could be reached since the question
    I4 single    a generation resumes from a version of the branch
    I5 fenced    once a newer generation has started, nothing of an older one commits; nor is it
                 taken by a holder that was told of the newer one
    I6 honest    a commit has as many copies as it says, and as the policy and the hosts allow
    I7 bounded   no holder has more bytes than its budget
    same         all ranks of a life get one answer

A copy is lost when its holder dies or a bit of it flips; what the cores drop is not lost, but still
owed, unless it was a copy too many, or `keep` newer steps of the branch were committed, or have all
their copies.
"""

from collections import defaultdict
from typing import TYPE_CHECKING

from replication.records import HolderId, Life, ShardKey, ShardRecord, Version
from tiered import messages as m
from tiered.admission import STUCK_S
from tiered.history import Resolution

if TYPE_CHECKING:
    from tests.property.protocol.cluster import Cluster
    from tests.property.protocol.coordinator import Coordinator
    from tests.property.protocol.holder import Holder

NEVER = 1 << 60
Copy = tuple[HolderId, ShardKey]


class Broken(AssertionError):
    """A promise was not kept."""


class Model:
    """Books of one run; `now` counts what happened."""

    def __init__(self, cluster: "Cluster") -> None:
        self.cluster = cluster
        self.now = 0
        self.saved: dict[ShardKey, tuple[int, ...]] = {}
        self.copies: dict[ShardKey, dict[HolderId, int]] = defaultdict(dict)  # -> since when
        self.lost: dict[Copy, int] = {}
        self.died: dict[HolderId, int] = {}
        self.known: dict[Copy, int] = {}  # since when the present coordinator knows of it
        self.troubled: dict[str, int] = {}  # host -> when last it could not be reached
        self.whole_s: dict[Version, float] = {}  # since when each rank had some copy
        self.commits: set[Version] = set()
        self.mark = Version(0, 0)
        self.asked_at: dict[int, int] = {}
        self.recorded: dict[int, Version | None] = {}  # in the register
        self.parents: dict[int, Version | None] = {}  # of those, what a coordinator knows of
        self.answers: dict[Life, tuple[int, Version | None]] = {}
        self._contents = 0

    # -- what happened --------------------------------------------------------------------------

    def save(self, key: ShardKey, chunks: int) -> tuple[int, ...]:
        """A rank is about to save; its bytes, like no other's where they ever change."""
        assert key not in self.saved, "a shard is written once"
        self._contents += 1
        is_frozen = self.cluster.setup.is_frozen
        content = tuple(
            2 * index if is_frozen and index else self._contents * 16 + 2 * index
            for index in range(chunks)
        )
        self.saved[key] = content
        return content

    def staged(self, holder: "Holder", key: ShardKey) -> None:
        if key.version.generation < holder.fence_seen:
            raise Broken(f"I5: {holder.id} takes {key}, and was told of {holder.fence_seen}")

    def sealed(self, holder: "Holder", record: ShardRecord) -> None:
        """A holder says that it has the whole of a shard."""
        key = record.key
        if holder.chunks.get(key) == dict(enumerate(self.saved[key])):
            self.copies[key].setdefault(holder.id, self.now)
            self.lost.pop((holder.id, key), None)
            if all(self.copies[k] for k in self.keys(key.version)):
                self.whole_s.setdefault(key.version, self.cluster.now_s)

    def told(self, holder: HolderId, key: ShardKey) -> None:
        self.known.setdefault((holder, key), self.now)

    def flipped(self, holder: HolderId, key: ShardKey) -> None:
        self.lost.setdefault((holder, key), self.now)

    def released(self, holder: HolderId, key: ShardKey) -> None:
        """A holder has let go of a copy that was one too many: so many others were not told to."""
        self.copies[key].pop(holder, None)
        need = 1 + (self.cluster.setup.settings.memory.replicas or 0)
        if len({h.node_id for h in self.copies[key]}) < need:
            raise Broken(f"I3: {holder} releases {key}, and only {self.copies[key]} have it")

    def holder_died(self, holder: HolderId) -> None:
        self.died[holder] = self.now
        self.trouble(holder.node_id)

    def coordinator_died(self) -> None:
        self.known.clear()
        for host in self.cluster.holders:
            self.trouble(host)

    def trouble(self, host: str) -> None:
        self.troubled[host] = self.now

    def asked(self, generation: int) -> None:
        self.asked_at.setdefault(generation, self.now)

    # -- what follows ---------------------------------------------------------------------------

    def branch(self) -> dict[int, int]:
        """By generation, up to which step the newest started one descends from it."""
        bounds: dict[int, int] = {}
        generation, last = max(self.parents, default=0), NEVER
        while generation and generation not in bounds:
            bounds[generation] = last
            parent = self.parents.get(generation)
            generation, last = (parent.generation, parent.step) if parent is not None else (0, 0)
        return bounds

    def is_on_branch(self, version: Version) -> bool:
        return version.step <= self.branch().get(version.generation, -1)

    def gone_at(self, holder: HolderId, key: ShardKey) -> int:
        return min(self.died.get(holder, NEVER), self.lost.get((holder, key), NEVER))

    def keys(self, version: Version) -> list[ShardKey]:
        ranks = range(self.cluster.setup.ranks)
        return [ShardKey(self.cluster.name, version, rank) for rank in ranks]

    def intact(self, key: ShardKey) -> set[HolderId]:
        """Holders with true bytes that are neither dead nor damaged; dropped or not."""
        return {h for h in self.copies[key] if self.gone_at(h, key) == NEVER}

    def within_reach(self, key: ShardKey, since: int) -> set[HolderId]:
        """Of those, the ones that nothing was wrong with since."""
        return {
            h
            for h in self.intact(key)
            if self.troubled.get(h.node_id, -1) < since
            and self.known.get((h, key), NEVER) < since
            and h in self.cluster.coordinator.up
            and self.cluster.is_reachable(h.node_id)
        }

    def newest_owed(self, since: int, before: int | None = None) -> Version | None:
        """The newest acknowledged version that a new life must not be sent back behind."""
        owed = {v for v in self.commits if v >= self.mark and self.is_on_branch(v)}
        for version in sorted(owed, reverse=True):
            if before is not None and version.step >= before:
                continue
            if all(self.within_reach(key, since) for key in self.keys(version)):
                return version
        return None

    # -- judgements -----------------------------------------------------------------------------

    def committed(self, coordinator: "Coordinator", event: m.StepCommitted) -> None:
        version, settings = event.version, self.cluster.setup.settings.memory
        if version.generation < max(self.parents, default=0):
            raise Broken(f"I5: {version} is committed, {max(self.parents)} has started")
        if not coordinator.is_open:
            raise Broken(f"I6: {version} is committed while the inventories come in")
        replicas = settings.replicas
        assert replicas is not None
        hosts = len({h.node_id for h in coordinator.job.holders})
        is_stuck = self.cluster.now_s - self.whole_s.get(version, NEVER) >= STUCK_S
        is_short = event.copies < min(1 + replicas, hosts)
        if (is_short and not is_stuck) or event.is_degraded != (hosts <= replicas or is_short):
            raise Broken(f"I6: {version} has {event.copies} copies, {hosts} hosts live")
        for key in self.keys(version):
            if len({h.node_id for h in self.copies[key]}) < event.copies:
                raise Broken(f"I6: {version} is committed, rank {key.rank} never had such copies")
        self.commits.add(version)
        self._raise_mark()

    def started(
        self, generation: int, parent: Version | None, wanted: tuple[int | None, int | None]
    ) -> None:
        """The register holds a generation's parent: its ranks may start."""
        since, (_, before) = self.asked_at.get(generation, self.now), wanted
        if generation == self.cluster.register.newest:  # or it was overtaken: nobody starts as it
            if parent is not None:
                if self.parents and not self.is_on_branch(parent):
                    raise Broken(f"I4: generation {generation} resumes from abandoned {parent}")
                for key in self.keys(parent):
                    if not any(self.gone_at(h, key) >= since for h in self.copies[key]):
                        raise Broken(f"I1: {parent} is chosen, nobody has rank {key.rank}")
            owed = self.newest_owed(since, before)
            if owed is not None and (parent is None or parent < owed):
                raise Broken(f"I3: {parent} is chosen, {owed} is there")
        self.recorded[generation] = parent

    def begun(self, generation: int) -> None:
        """A coordinator knows, and will tell, that a generation has started."""
        self.parents[generation] = self.recorded[generation]
        self._raise_mark()

    def _raise_mark(self) -> None:
        """The `keep`-th newest step of the branch that was committed, or has all its copies."""
        settings, hosts = self.cluster.setup.settings.memory, len(self.cluster.coordinator.up)
        need = min(1 + (settings.replicas or 0), hosts)
        versions = {key.version for key in self.copies}
        whole = {v for v in versions if all(len(self.intact(k)) >= need for k in self.keys(v))}
        counted = sorted(filter(self.is_on_branch, self.commits | whole))
        if len(counted) >= settings.keep:
            self.mark = max(self.mark, counted[-settings.keep])

    def answered(self, life: Life, resolution: Resolution) -> None:
        """A life has its answer."""
        answer = resolution.generation, resolution.version
        if self.answers.setdefault(life, answer) != answer:
            raise Broken(f"same: {life} got {self.answers[life]} and {answer}")
        if resolution.version != self.recorded[resolution.generation]:
            raise Broken(f"same: {life} got {answer}, which is not what was recorded")
        self.begun(resolution.generation)
        for shard in resolution.shards:
            key = shard.record.key
            if key.version != resolution.version:
                raise Broken(f"I1: {key} among the shards of {resolution.version}")
            if shard.record.digests != tuple(c.to_bytes(16, "big") for c in self.saved[key]):
                raise Broken(f"I2: {key} is not what was saved")

    def check(self) -> None:
        """What holds at any time."""
        for holder in self.cluster.holders.values():
            used = sum(len(chunks) for chunks in holder.chunks.values())
            if used > self.cluster.setup.capacity:
                raise Broken(f"I7: {holder.id} has {used} of {self.cluster.setup.capacity}")
