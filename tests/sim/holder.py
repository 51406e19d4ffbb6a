"""The shell of a simulated holder: `replication.holder.Holder` without Ray and without bytes.

A chunk's bytes are one integer; its checksum is that integer, so that a flipped bit shows. The
order of checks and events is the real shell's, but that each chunk that is offered has a call of
its own, and may be lost alone.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, assert_never

from replication import messages
from replication.errors import ChunkCorruptError, HolderUnavailableError, ShardNotHeldError
from replication.links import Links
from replication.records import ChunkId, HolderId, ShardKey, ShardPlan, ShardRecord, Version
from replication.scrub import Scrub
from tests.sim.limits import (
    FETCH_TIMEOUT_S,
    FLIP,
    HOLDER_TICK_S,
    OFFER_TIMEOUT_S,
    PROBE_S,
    READ_S,
    REPORT_TIMEOUT_S,
    SCRUB_PERIOD_S,
    TICKS_AFTER_S,
)
from tests.sim.network import Host, Outcome, Process, Reply
from tiered import register
from tiered.errors import DurableStoreError

if TYPE_CHECKING:
    from tests.sim.world import World


def digest(content: int) -> bytes:
    """The checksum of a chunk."""
    return content.to_bytes(16, "big")


class Bytes(int):
    """A chunk's bytes in one holder's memory: shards that share them have the same object."""


class Holder(Process):
    """One host's chunks."""

    def __init__(self, world: "World", host: Host, incarnation: str) -> None:
        super().__init__(host)
        self.world = world
        self.id = HolderId(host.place, incarnation)
        self.core = world.cores.inventory(self.id, world.setup.capacity)
        self.chunks: dict[ShardKey, dict[int, Bytes]] = {}
        self.fence_seen = 0
        self.born_s = world.kernel.now_s
        self.core.scrub = Scrub(SCRUB_PERIOD_S)
        self._unreported: dict[ShardKey, ShardRecord] = {}
        self._corrupt: set[ShardKey] = set()
        self._is_reporting = False
        self._pause_s = 0.2
        self.links = Links()
        world.kernel.after(HOLDER_TICK_S, self._tick_forever)
        world.kernel.after(PROBE_S, self._probe_forever)

    # -- called by trainers on this host --------------------------------------------------------

    def stage_chunk(self, key: ShardKey, plan: ShardPlan, index: int, content: int) -> None:
        """Pin a chunk that a trainer on this host has put."""
        self.core.check_write(key, plan)
        self.world.oracle.staged(self.id, key, self.fence_seen)
        if not self.core.has_chunk(key, index):
            self.chunks.setdefault(key, {})[index] = Bytes(content)
        self.feed(messages.ChunkStaged(key, plan, index))
        self.world.oracle.pinned(self.id, self.chunks)

    # -- called by other holders, and by whoever restores ---------------------------------------

    def take_chunk(self, offer: messages.OfferChunk, source: HolderId, reply: Reply) -> None:
        """Fetch a chunk, verify it, keep a copy; or share an earlier version's."""
        self.check_take(offer)
        if self.core.has_chunk(offer.key, offer.index):
            self.feed(messages.ChunkKnown(offer.key))
            reply(None)
            return
        twin = self.core.twin_of(ChunkId(offer.key, offer.index, 1), offer.digest)
        if twin is None:
            self._fetch(offer, source, reply)
            return

        def read(value: bytes | None) -> None:
            try:
                if value is not None:
                    self._take_twin(offer, source, twin, value)
            except Exception as error:  # noqa: BLE001 - it goes to the caller, as Ray has it
                reply(error)
                return
            if self.core.has_chunk(offer.key, offer.index):
                self.world.oracle.counts["chunks shared"] += 1
                reply(None)
            else:
                self._fetch(offer, source, reply)

        self._read_twin(twin, offer.index, read)

    def _take_twin(
        self, offer: messages.OfferChunk, source: HolderId, twin: ShardKey, value: bytes
    ) -> None:
        index, expected = offer.index, offer.digest
        if self.is_same(value, expected) and self.core.has_chunk(twin, index):
            self._keep(offer, source, self.chunks[twin][index])
        self.feed(messages.TwinRead(offer.key, index, expected, twin, value))

    def _fetch(self, offer: messages.OfferChunk, source: HolderId, reply: Reply) -> None:

        def got(outcome: Outcome) -> None:
            try:
                self._keep(offer, source, outcome)
            except Exception as error:  # noqa: BLE001 - it goes to the caller, as Ray has it
                reply(error)
            else:
                reply(None)

        peer = self.world.holder_on(source.node_id)
        self.world.network.call(
            "read", self, peer, FETCH_TIMEOUT_S,
            lambda answer: answer(peer.read_chunk(offer.key, offer.index)), got,
        )  # fmt: skip

    def check_take(self, offer: messages.OfferChunk) -> None:
        """Refuse a chunk before it moves."""
        self.core.check_copy(offer.key, offer.plan)

    def _keep(self, offer: messages.OfferChunk, source: HolderId, outcome: Outcome) -> None:
        if isinstance(outcome, Exception):
            raise outcome
        if not self.is_same(digest(outcome), offer.digest):
            raise ChunkCorruptError(source.node_id, str(offer.key), offer.index)
        self.check_take(offer)
        if not self.core.has_chunk(offer.key, offer.index):
            self.chunks.setdefault(offer.key, {})[offer.index] = Bytes(outcome)
        self.feed(messages.ChunkFetched(offer.key, offer.plan, offer.index, offer.digest))
        self.world.oracle.pinned(self.id, self.chunks)
        if (shard := self.core.shards.get(offer.key)) is not None and shard.is_sealed:
            self.world.oracle.sealed(self.id, offer.key, self.chunks)

    def read_chunk(self, key: ShardKey, index: int) -> int:
        """Return a chunk that is pinned here."""
        try:
            return self.chunks[key][index]
        except KeyError:
            raise ShardNotHeldError(self.id.node_id, str(key)) from None

    # -- called by the coordinator --------------------------------------------------------------

    def fence(self, generation: int) -> None:
        """Refuse older generations."""
        self.fence_seen = max(self.fence_seen, generation)
        self.feed(messages.FenceRaised(self.world.job_name, generation))

    def set_buddies(self, buddies: tuple[HolderId, ...], counted: frozenset[HolderId]) -> None:
        """Replicate to these."""
        self.feed(messages.BuddiesChanged(self.world.job_name, buddies, counted))

    def replicate(self, key: ShardKey, to: HolderId, generation: int, bytes_per_s: int) -> None:
        """Make one more copy; it takes no longer for being bounded."""
        self.feed(messages.ReplicationRequested(key, to, generation, bytes_per_s))

    def collect(
        self,
        generation: int,
        below: Version,
        pinned: tuple[Version, ...],
        branch: tuple[Version, ...] | None,
    ) -> None:
        """Let go of what is older, or abandoned."""
        job = self.world.job_name
        self.feed(messages.WatermarkRaised(job, generation, below, pinned, branch))
        self.world.oracle.obeyed(self.id, "collect", generation, self.fence_seen)

    def drop_step(self, version: Version) -> None:
        """Let go of a step that was never committed."""
        self.world.oracle.is_disowned = True
        try:
            self.feed(messages.StepDropped(self.world.job_name, version))
        finally:
            self.world.oracle.is_disowned = False

    def release_copies(self, generation: int, keys: tuple[ShardKey, ...]) -> None:
        """Let go of copies that are not needed here."""
        self.world.oracle.releasing = frozenset(keys)
        try:
            self.feed(messages.CopiesReleased(self.world.job_name, generation, keys))
        finally:
            self.world.oracle.releasing = frozenset()
        self.world.oracle.obeyed(self.id, "release", generation, self.fence_seen)

    def verify(self, keys: Sequence[ShardKey]) -> list[ShardKey]:
        """Read every byte of these shards; return those that are missing or corrupt here."""
        bad = []
        for key in keys:
            try:
                record = self.core.record(key)
            except ShardNotHeldError:
                bad.append(key)
                continue
            chunks = self.chunks.get(key, {})
            for index, expected in enumerate(record.digests):
                if index not in chunks or not self.is_same(digest(chunks[index]), expected):
                    self.feed(messages.ChunkFoundCorrupt(key, index))
                    bad.append(key)
                    break
        return bad

    def upload(self, key: ShardKey, reply: Reply) -> None:
        """Store a shard durably, if it is still what was saved."""
        if self.verify([key]):
            raise ShardNotHeldError(self.id.node_id, str(key))
        record, chunks = self.core.record(key), self.chunks[key]
        image = tuple(chunks[i] for i in range(len(record.digests)))

        def store() -> ShardRecord:
            self.world.store.objects[register.shard_key(key.version, key.rank)] = image
            return record

        def stored(outcome: Outcome) -> None:
            failed = isinstance(outcome, DurableStoreError)
            reply(HolderUnavailableError(self.id.node_id, str(outcome)) if failed else outcome)

        self.world.store.request(store, stored)

    def peer_died(self, peer: HolderId) -> None:
        """Another holder has died; nothing here depends on it."""

    # -- the shell ------------------------------------------------------------------------------

    def feed(self, event: messages.Event) -> None:
        """Give the core an event; carry out what it asks for."""
        world = self.world
        for command in self.core.handle(event, world.kernel.now_s):
            match command:
                case messages.HashChunk():
                    delay_s = world.kernel.uniform(0.001, 0.02)
                    world.kernel.after(delay_s, self._hash, command.key, command.index)
                case messages.ReadTwin():
                    self._compare(command)
                case messages.ShareChunk(key, index, twin):
                    self.chunks[key][index] = self.chunks[twin][index]
                case messages.OfferChunk():
                    self._offer(command)
                case messages.ReportShard():
                    world.oracle.sealed(self.id, command.record.key, self.chunks)
                    self._corrupt.discard(command.record.key)
                    self._unreported[command.record.key] = command.record
                    self._report()
                case messages.ReportCorrupt():
                    self._unreported.pop(command.key, None)  # or it would count again
                    self._corrupt.add(command.key)
                    self._report()
                case messages.ReadChunk():
                    world.kernel.after(READ_S, self._reread, command.key, command.index)
                case messages.DropShard():
                    world.oracle.dropped(self.id, command.key)
                    self.let_go(command.key)
                    self._unreported.pop(command.key, None)
                    self._corrupt.discard(command.key)
                case _:
                    assert_never(command)

    def let_go(self, key: ShardKey) -> None:
        """Unpin a shard's bytes, but for those that another one shares."""
        self.chunks.pop(key, None)

    def flip(self, key: ShardKey, index: int) -> list[ShardKey]:
        """A bit flips; return every shard that it spoils: all that share those bytes."""
        old = self.chunks[key][index]
        sharers = [k for k, held in self.chunks.items() if held.get(index) is old]
        new = Bytes(old + FLIP)
        for sharer in sharers:
            self.chunks[sharer][index] = new
        return sharers

    def is_same(self, have: bytes, expected: bytes) -> bool:
        """Compare checksums."""
        return self.world.cores.is_same(have, expected)

    def _compare(self, ask: messages.ReadTwin) -> None:
        def read(value: bytes | None) -> None:
            if value is not None:
                self.feed(messages.TwinRead(ask.key, ask.index, ask.expected, ask.twin, value))

        self._read_twin(ask.twin, ask.index, read)

    def _read_twin(self, twin: ShardKey, index: int, read: Callable[[bytes | None], None]) -> None:
        """Hash a chunk again; its checksum, or None if it is not in place any more."""
        content = self.chunks.get(twin, {}).get(index)

        def fire() -> None:
            is_here = content is not None and self.chunks.get(twin, {}).get(index) is content
            if self.is_alive:
                read(digest(content) if is_here else None)

        self.world.kernel.after(self.world.kernel.uniform(0.001, 0.02), fire)

    def _hash(self, key: ShardKey, index: int) -> None:
        if not self.is_alive:
            return
        if (wait_s := self.host.hung_until_s - self.world.kernel.now_s) > 0:
            self.world.kernel.after(wait_s, self._hash, key, index)
            return
        content = self.chunks.get(key, {}).get(index)
        if content is not None:
            self.feed(messages.ChunkHashed(key, index, digest(content)))

    def _reread(self, key: ShardKey, index: int) -> None:
        if self.is_alive:
            content = self.chunks.get(key, {}).get(index)
            value = b"" if content is None else self.world.cores.read(content)
            self.feed(messages.ChunkRead(key, index, value))

    def _offer(self, offer: messages.OfferChunk) -> None:
        peer = self.world.holder_on(offer.to.node_id)

        def answered(outcome: Outcome) -> None:
            if isinstance(outcome, Exception):
                self.feed(messages.ChunkNotTaken(offer.to, offer.key, offer.index))
                for delay_s in TICKS_AFTER_S:
                    self.world.kernel.after(delay_s, self._tick)
            else:
                self.feed(messages.ChunkTaken(offer.to, offer.key, offer.index))

        self.world.network.call(
            "take", self, peer, OFFER_TIMEOUT_S,
            lambda reply: peer.take_chunk(offer, self.id, reply), answered,
        )  # fmt: skip

    def _tick(self) -> None:
        if self.is_alive:
            self.feed(messages.Ticked())

    def _tick_forever(self) -> None:
        if not self.is_alive:
            return
        if self.host.hung_until_s <= self.world.kernel.now_s:
            self.feed(messages.Ticked())
        self.world.kernel.after(HOLDER_TICK_S, self._tick_forever)

    def _probe_forever(self) -> None:
        """Ask whether peers are there; the two messages take no time, but may be missed."""
        if not self.is_alive:
            return
        now_s, network = self.world.kernel.now_s, self.world.network
        if self.host.hung_until_s <= now_s:
            for peer in sorted(self.links.to_probe(*self.core.offers.peers())):
                other = self.world.hosts.get(peer.node_id)
                if other is None or not other.is_alive or other.hung_until_s > now_s:
                    self.links.missed(peer)
                elif network.sends(self.host, other) and network.sends(other, self.host):
                    self.links.answered(peer)
                else:
                    self.links.missed(peer)
        self.world.kernel.after(PROBE_S, self._probe_forever)

    def _report(self) -> None:
        """Tell the coordinator of sealed and corrupt shards, in batches, until it has answered."""
        if self._is_reporting or not self.is_alive or not (self._unreported or self._corrupt):
            return
        self._is_reporting = True
        batch, corrupt = list(self._unreported.values()), sorted(self._corrupt)
        coordinator = self.world.coordinator

        def answered(outcome: Outcome) -> None:
            self._is_reporting = False
            if isinstance(outcome, Exception):
                self.world.kernel.after(self._pause_s, self._report)
                self._pause_s = min(2 * self._pause_s, 5.0)
                return
            self._pause_s = 0.2
            self._corrupt.difference_update(corrupt)
            for record in batch:
                if self._unreported.get(record.key) is record:
                    del self._unreported[record.key]
            self._report()

        self.world.network.call(
            "report", self, coordinator, REPORT_TIMEOUT_S,
            lambda reply: coordinator.report(self.id, batch, corrupt, reply), answered,
        )  # fmt: skip
