"""The core of a holder: what it holds, what it owes its buddies, and what it refuses.

Rules:
    1. A shard is immutable and has one writer; staging or offering the same chunk again changes
       nothing (every call may be repeated).
    2. A chunk is hashed once, on the host where it was staged, and the checksum travels with it.
       Nothing counts as held before every chunk of the shard is here and hashed or verified:
       then the shard is sealed, and reported.
    3. Writes, and requests to collect, of a generation older than the fence are refused. A write of
       a newer one raises the fence.
    4. What is not sealed is invisible to everybody else. What is below the watermark goes, and the
       watermark never moves back.
    5. The budget is checked before any byte is pinned.
    6. What is pinned is read again now and then (`replication.scrub`). A copy that is found
       corrupt stops counting, the coordinator is told, and told again: a message may be late.
    7. A chunk that did not change since another version of the same rank's shard (its twin: the
       same place, size and checksum) shares that one's bytes, after these were read again. Bytes
       are let go with the last shard that they are part of; found corrupt, they spoil each of
       them. The budget counts shared bytes once for every shard: the next step may change them
       all, and the memory for that has to be there.

`handle` takes an event and returns commands (`replication.messages`); it does no I/O, knows no
clock but `now_s`, and keeps no bytes: the shell (`replication.holder`) pins those and carries the
commands out, feeding each outcome back as an event.
"""

from dataclasses import dataclass
from typing import assert_never

from replication.errors import FencedError, MemoryBudgetError, ShardNotHeldError
from replication.messages import (
    BuddiesChanged,
    ChunkFetched,
    ChunkFoundCorrupt,
    ChunkHashed,
    ChunkKnown,
    ChunkNotTaken,
    ChunkRead,
    ChunkStaged,
    ChunkTaken,
    Command,
    CopiesReleased,
    DropShard,
    Event,
    FenceRaised,
    HashChunk,
    JobForgotten,
    ReadChunk,
    ReadTwin,
    ReplicationRequested,
    ReportCorrupt,
    ReportShard,
    ShareChunk,
    StepDropped,
    Ticked,
    TwinRead,
    WatermarkRaised,
)
from replication.offers import HeldShard, Offers
from replication.records import ChunkId, HolderId, ShardKey, ShardPlan, ShardRecord, Version
from replication.scrub import Scrub

REMIND_S = 15.0  # a corrupt copy that is still here is reported again


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one rank on this host declared that it will need here."""

    generation: int
    need_bytes: int
    detail: str


class Inventory:
    """What one holder holds. Not thread-safe: the shell serialises its calls."""

    def __init__(self, holder: HolderId, capacity_bytes: int, scrub: Scrub | None = None) -> None:
        self.holder = holder
        self.scrub = scrub or Scrub()
        self.capacity_bytes = capacity_bytes
        self.shards: dict[ShardKey, HeldShard] = {}
        self.fences: dict[str, int] = {}
        self.watermarks: dict[str, Version] = {}
        self.dropped: dict[str, set[Version]] = {}
        self.offers = Offers(holder, self.shards)
        self.reservations: dict[tuple[str, int], Reservation] = {}
        self._blocks = 0  # so many were ever here
        self._remind_due_s = 0.0

    # -- questions ---------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """Bytes of every shard here, arriving ones at their full size, shared ones each time."""
        return sum(shard.plan.size_bytes for shard in self.shards.values())

    @property
    def shared_bytes(self) -> int:
        """So many of them take no memory: they are those of another version, too."""
        seen: set[int] = set()
        shared_bytes = 0
        for shard in self.shards.values():
            for index, block in shard.blocks.items():
                shared_bytes += shard.plan.chunk_sizes[index] if block in seen else 0
                seen.add(block)
        return shared_bytes

    def records(self, job: str | None = None) -> list[ShardRecord]:
        """Every sealed shard, of one job or of all."""
        return [
            self.record(key)
            for key, shard in sorted(self.shards.items())
            if shard.is_sealed and job in (None, key.job)
        ]

    def record(self, key: ShardKey) -> ShardRecord:
        """The record of a sealed shard.

        Raises:
            ShardNotHeldError: It is not here, not whole, or was found corrupt.
        """
        shard = self.shards.get(key)
        if shard is None or not shard.is_sealed:
            raise ShardNotHeldError(self.holder.node_id, str(key))
        digests = tuple(shard.digests[i] for i in range(len(shard.plan.chunk_sizes)))
        return ShardRecord(key, shard.plan, digests, is_replica=not shard.staged_here)

    def has_chunk(self, key: ShardKey, index: int) -> bool:
        """Whether this chunk is already pinned here, and not known to be corrupt."""
        shard = self.shards.get(key)
        return shard is not None and not shard.quarantined and index in shard.blocks

    def twin_of(self, chunk: ChunkId, digest: bytes) -> ShardKey | None:
        """The newest other version of a shard here that has just this chunk in the same place."""
        key, index = chunk.key, chunk.index
        twins = (
            other
            for other, shard in self.shards.items()
            if (other.job, other.rank) == (key.job, key.rank)
            and other != key
            and not shard.quarantined
            and shard.digests.get(index) == digest
            and shard.plan.chunk_sizes[index] == chunk.size_bytes
        )
        return max(twins, default=None)

    def sharers(self, key: ShardKey, index: int) -> list[ShardKey]:
        """The shards here that count and that a chunk's bytes are part of."""
        block = self.shards[key].blocks.get(index)
        return [
            other
            for other, shard in self.shards.items()
            if block is not None and shard.blocks.get(index) == block and not shard.quarantined
        ]

    def is_collected(self, key: ShardKey) -> bool:
        """Whether the watermark has passed this shard, or its step was dropped: too late.

        What is pinned below the watermark is still here.
        """
        is_old = key.version < self.watermarks.get(key.job, Version(0, 0))
        is_dropped = key.version in self.dropped.get(key.job, ())
        return (is_old or is_dropped) and key not in self.shards

    def check_generation(self, job: str, generation: int) -> None:
        """Refuse what a fenced-off generation asks for.

        Raises:
            FencedError: A newer generation has taken over.
        """
        fence = self.fences.get(job, 0)
        if generation < fence:
            raise FencedError(job, generation, fence)

    def check_write(self, key: ShardKey, plan: ShardPlan) -> None:
        """Refuse a trainer's write before any byte of it is pinned.

        Raises:
            FencedError: Its generation is fenced off.
            MemoryBudgetError: It does not fit.
        """
        self.check_generation(key.job, key.version.generation)
        self._check_budget(key, plan)

    def _check_budget(self, key: ShardKey, plan: ShardPlan) -> None:
        if key in self.shards:
            return
        need = self.used_bytes + plan.size_bytes
        if need > self.capacity_bytes:
            detail = f"{self.used_bytes:,} held and {plan.size_bytes:,} for {key}"
            raise MemoryBudgetError(self.holder.node_id, need, self.capacity_bytes, detail)

    def check_copy(self, key: ShardKey, plan: ShardPlan) -> None:
        """Refuse a peer's copy before any byte of it moves.

        Older generations are welcome: what a generation resumed from was saved by an older one,
        and must be replicated again. What a fenced-off trainer has left is harmless: it is on no
        branch, and nothing new of it is staged.

        Raises:
            MemoryBudgetError: It does not fit.
        """
        self._check_budget(key, plan)

    def reserve(self, job: str, rank: int, reservation: Reservation) -> None:
        """Declare what `rank` will need on this host, before it sends a byte; idempotent.

        Raises:
            FencedError: The generation is fenced off.
            MemoryBudgetError: With what other ranks declared, and what other jobs declared or have
                here, it exceeds the budget; names them.
        """
        self.check_generation(job, reservation.generation)
        others = self._jobs() - {job}
        theirs = {j: max(self._declared(j), self._held(j)) for j in sorted(others)}
        ranks = self._declared(job) - self._declared(job, rank)
        need = sum(theirs.values()) + ranks + reservation.need_bytes
        if need > self.capacity_bytes:
            detail = reservation.detail
            if ranks:
                detail += f"; {ranks:,} are declared by other ranks of this host"
            detail += "".join(f"; {n:,} belong to job {j!r}" for j, n in theirs.items())
            raise MemoryBudgetError(self.holder.node_id, need, self.capacity_bytes, detail)
        self.reservations[job, rank] = reservation

    def release(self, job: str, rank: int) -> None:
        """Take a declaration back: from now on only what the job has here counts; idempotent."""
        self.reservations.pop((job, rank), None)

    def _jobs(self) -> set[str]:
        return {job for job, _ in self.reservations} | {key.job for key in self.shards}

    def _declared(self, job: str, rank: int | None = None) -> int:
        mine = ((j, r) for j, r in self.reservations if j == job and rank in (None, r))
        return sum(self.reservations[key].need_bytes for key in mine)

    def _held(self, job: str) -> int:
        return sum(s.plan.size_bytes for key, s in self.shards.items() if key.job == job)

    # -- events ------------------------------------------------------------------------------

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """Take one event; return what has to be done because of it."""
        match event:
            case ChunkStaged():
                return self._staged(event)
            case ChunkHashed():
                return self._hashed(event, now_s)
            case ChunkFetched():
                return self._fetched(event, now_s)
            case ChunkTaken():
                self.offers.taken(event)
                return []
            case ChunkNotTaken():
                self.offers.not_taken(event, now_s)
                return []
            case BuddiesChanged():
                return self.offers.buddies_changed(event, self.fences.get(event.job, 0))
            case ReplicationRequested():
                if event.generation < self.fences.get(event.key.job, 0):
                    return []
                self._raise_fence(event.key.job, event.generation)
                return self.offers.requested(event)
            case FenceRaised():
                self._raise_fence(event.job, event.generation)
                return []
            case WatermarkRaised():
                return self._collect(event)
            case StepDropped():
                if event.version.generation < self.fences.get(event.job, 0):
                    return []
                self.dropped.setdefault(event.job, set()).add(event.version)
                keys = [k for k in self.shards if (k.job, k.version) == (event.job, event.version)]
                return [self._drop(key) for key in keys]
            case CopiesReleased():
                self.check_generation(event.job, event.generation)
                held = [k for k in event.keys if k in self.shards]
                return [self._drop(k) for k in held if not self.shards[k].staged_here]
            case TwinRead():
                return self._share(event, now_s)
            case ChunkFoundCorrupt():
                return self._quarantine(event.key, event.index)
            case ChunkRead():
                return self._read(event, now_s)
            case ChunkKnown():
                shard = self.shards.get(event.key)
                return [] if shard is None else self._seal(event.key, shard)
            case JobForgotten():
                return self._forget(event.job)
            case Ticked():
                return [*self.offers.repeat(now_s), *self._remind(now_s), *self._scrub(now_s)]
            case _:
                assert_never(event)

    def _staged(self, event: ChunkStaged) -> list[Command]:
        if self.is_collected(event.key):
            return [DropShard(event.key)]
        self._raise_fence(event.key.job, event.key.version.generation)
        shard = self.shards.setdefault(event.key, HeldShard(event.plan, staged_here=True))
        if event.index in shard.blocks:
            return []
        shard.blocks[event.index] = self._new_block()
        return [HashChunk(event.key, event.index)]

    def _hashed(self, event: ChunkHashed, now_s: float) -> list[Command]:
        shard = self.shards.get(event.key)
        if shard is None or event.index not in shard.blocks or event.index in shard.digests:
            return []  # or it is of a copy that was let go meanwhile
        shard.digests[event.index] = event.digest
        self.scrub.intact(event.key, event.index, now_s)
        commands = [*self._seal(event.key, shard), *self.offers.of_shard(event.key)]
        chunk = ChunkId(event.key, event.index, shard.plan.chunk_sizes[event.index])
        twin = self.twin_of(chunk, event.digest)
        if twin is not None:
            commands.append(ReadTwin(event.key, event.index, event.digest, twin))
        return commands

    def _fetched(self, event: ChunkFetched, now_s: float) -> list[Command]:
        if self.is_collected(event.key):
            return [DropShard(event.key)]
        self._raise_fence(event.key.job, event.key.version.generation)
        shard = self.shards.setdefault(event.key, HeldShard(event.plan, staged_here=False))
        if shard.quarantined:  # replaced, chunk by chunk, by a copy that is verified
            shard = self.shards[event.key] = HeldShard(event.plan, shard.staged_here)
            self.offers.forget(event.key)
        if event.index in shard.digests:
            return []
        shard.blocks[event.index] = self._new_block()
        shard.digests[event.index] = event.digest
        self.scrub.intact(event.key, event.index, now_s)
        return self._seal(event.key, shard)

    def _new_block(self) -> int:
        self._blocks += 1
        return self._blocks

    def _share(self, event: TwinRead, now_s: float) -> list[Command]:
        key, index, twin = event.key, event.index, self.shards.get(event.twin)
        if twin is None or twin.quarantined or twin.digests.get(index) != event.expected:
            return []
        if event.digest != event.expected:
            return self._quarantine(event.twin, index)
        for sharer in self.sharers(event.twin, index):
            self.scrub.intact(sharer, index, now_s)
        shard = self.shards.get(key)
        if shard is None or shard.quarantined or shard.digests.get(index) != event.expected:
            return []
        shard.blocks[index] = twin.blocks[index]
        return [ShareChunk(key, index, event.twin)]

    def _seal(self, key: ShardKey, shard: HeldShard) -> list[Command]:
        return [ReportShard(self.record(key))] if shard.is_sealed else []

    def _raise_fence(self, job: str, generation: int) -> None:
        if generation > self.fences.get(job, 0):
            self.fences[job] = generation
            self.offers.end_repairs(job)
            # What was dropped elsewhere too late may be what the new generation resumes from.
            dropped = self.dropped.get(job, set())
            self.dropped[job] = {v for v in dropped if v.generation >= generation}
            self.reservations = {
                k: r
                for k, r in self.reservations.items()
                if k[0] != job or r.generation >= generation
            }

    def _collect(self, event: WatermarkRaised) -> list[Command]:
        self.check_generation(event.job, event.generation)
        below = max(event.below, self.watermarks.get(event.job, event.below))
        self.watermarks[event.job] = below
        dropped = self.dropped.get(event.job, set())
        self.dropped[event.job] = {v for v in dropped if v >= below}
        gone = [k for k in self.shards if k.job == event.job and not event.is_needed(k.version)]
        return [self._drop(key) for key in gone]

    def _forget(self, job: str) -> list[Command]:
        self.reservations = {k: r for k, r in self.reservations.items() if k[0] != job}
        self.offers.forget_job(job)
        self.watermarks.pop(job, None)
        self.dropped.pop(job, None)
        return [self._drop(key) for key in [k for k in self.shards if k.job == job]]

    def _drop(self, key: ShardKey) -> Command:
        self.scrub.forget(key, len(self.shards.pop(key).plan.chunk_sizes))
        self.offers.forget(key)
        return DropShard(key)

    # -- corrupt copies ----------------------------------------------------------------------

    def _quarantine(self, key: ShardKey, index: int) -> list[Command]:
        if key not in self.shards:
            return []
        spoilt = sorted({key, *self.sharers(key, index)})
        for sharer in spoilt:
            self.shards[sharer].quarantined = True
            self.scrub.forget(sharer, len(self.shards[sharer].plan.chunk_sizes))
        return [ReportCorrupt(sharer) for sharer in spoilt]

    def _read(self, event: ChunkRead, now_s: float) -> list[Command]:
        commands: list[Command] = []
        key, index = event.key, event.index
        if self.scrub.is_over(key, index):
            if event.digest == self.shards[key].digests[index]:
                for sharer in self.sharers(key, index):
                    self.scrub.intact(sharer, index, now_s)
            else:
                commands = self._quarantine(key, index)
        return [*commands, *self._scrub(now_s)]

    def _scrub(self, now_s: float) -> list[Command]:
        if (slot := self.scrub.due(now_s)) is None:
            return []
        key, index = slot
        self.scrub.begin(slot, self.shards[key].plan.chunk_sizes[index], now_s)
        return [ReadChunk(key, index)]

    def _remind(self, now_s: float) -> list[Command]:
        """Tell of every corrupt copy again: an older report may have come after the first."""
        if now_s < self._remind_due_s:
            return []
        self._remind_due_s = now_s + REMIND_S
        return [ReportCorrupt(key) for key, s in sorted(self.shards.items()) if s.quarantined]
