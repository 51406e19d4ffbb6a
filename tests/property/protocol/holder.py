"""`replication.holder.Holder` without Ray: a chunk's bytes are one integer, and so its checksum."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, assert_never

from replication import messages
from replication.errors import ChunkCorruptError, HolderUnavailableError, ShardNotHeldError
from replication.records import ChunkId, HolderId, ShardKey, ShardPlan, ShardRecord
from tests.property.protocol.network import HEAD, Message

if TYPE_CHECKING:
    from tests.property.protocol.cluster import Cluster


def digest(content: int) -> bytes:
    return content.to_bytes(16, "big")


class Bytes(int):
    """A chunk's bytes in one holder's memory: shards that share them have the same object."""


class Holder:
    """One life of a host's holder."""

    def __init__(self, cluster: "Cluster", identity: HolderId) -> None:
        self.cluster = cluster
        self.id = identity
        self.host = identity.node_id
        self.core = cluster.cores.inventory(identity, cluster.setup.capacity)
        self.chunks: dict[ShardKey, dict[int, Bytes]] = {}
        self.unreported: dict[ShardKey, ShardRecord] = {}
        self.corrupt: set[ShardKey] = set()  # and not yet reported
        self.fence_seen = 0
        self.is_alive = True

    def check_alive(self) -> None:
        if not self.is_alive:
            raise HolderUnavailableError(self.host, "it is dead")

    # -- calls ----------------------------------------------------------------------------------

    def stage(self, key: ShardKey, plan: ShardPlan, index: int, content: int) -> None:
        self.check_alive()
        self.core.check_write(key, plan)
        self.cluster.model.staged(self, key)
        if not self.core.has_chunk(key, index):
            self.chunks.setdefault(key, {})[index] = Bytes(content)
        self.feed(messages.ChunkStaged(key, plan, index))

    def take(self, offer: messages.OfferChunk, source: "Holder") -> None:
        self.check_alive()
        self.core.check_copy(offer.key, offer.plan)
        if self.core.has_chunk(offer.key, offer.index):
            self.feed(messages.ChunkKnown(offer.key))
            return
        if self.take_twin(offer):
            return
        source.check_alive()
        content = source.chunks.get(offer.key, {}).get(offer.index)
        if content is None:
            raise ShardNotHeldError(source.host, str(offer.key))
        if not self.cluster.cores.is_same(digest(content), offer.digest):
            raise ChunkCorruptError(source.host, str(offer.key), offer.index)
        self.chunks.setdefault(offer.key, {})[offer.index] = Bytes(content)
        self.feed(messages.ChunkFetched(offer.key, offer.plan, offer.index, offer.digest))

    def take_twin(self, offer: messages.OfferChunk) -> bool:
        """Share an earlier version's chunk, if there is one and its bytes are what they were."""
        key, index = offer.key, offer.index
        twin = self.core.twin_of(ChunkId(key, index, 1), offer.digest)
        if twin is None:
            return False
        value = digest(self.chunks[twin][index])
        if value == offer.digest:
            self.chunks.setdefault(key, {})[index] = self.chunks[twin][index]
            self.feed(messages.ChunkFetched(key, offer.plan, index, offer.digest))
        self.feed(messages.TwinRead(key, index, offer.digest, twin, value))
        return value == offer.digest

    def fence(self, generation: int) -> None:
        self.check_alive()
        self.fence_seen = max(self.fence_seen, generation)
        self.feed(messages.FenceRaised(self.cluster.name, generation))

    def verify(self, keys: Sequence[ShardKey]) -> list[ShardKey]:
        """Read every byte; return what is missing or corrupt."""
        self.check_alive()
        bad = []
        for key in keys:
            try:
                digests = self.core.record(key).digests
            except ShardNotHeldError:
                bad.append(key)
                continue
            chunks = self.chunks.get(key, {})
            wrong = (i for i, expected in enumerate(digests) if digest(chunks[i]) != expected)
            if (index := next(wrong, None)) is not None:
                self.feed(messages.ChunkFoundCorrupt(key, index))
                bad.append(key)
        return bad

    # -- the shell ------------------------------------------------------------------------------

    def feed(self, event: messages.Event) -> None:
        self.check_alive()
        for command in self.core.handle(event, self.cluster.now_s):
            match command:
                case messages.HashChunk(key, index):
                    self._later("hash", lambda k=key, i=index: self._hash(k, i))
                case messages.ReadTwin():
                    self._later("compare", lambda c=command: self._compare(c))
                case messages.ShareChunk(key, index, twin):
                    self.chunks[key][index] = self.chunks[twin][index]
                case messages.OfferChunk():
                    self._offer(command)
                case messages.ReadChunk(key, index):
                    self._later("read", lambda k=key, i=index: self._read(k, i))
                case messages.ReportShard(record):
                    self.cluster.model.sealed(self, record)
                    self.corrupt.discard(record.key)
                    self.unreported[record.key] = record
                    self.report(record)
                case messages.ReportCorrupt(key):
                    self.unreported.pop(key, None)  # or it would count again
                    self.corrupt.add(key)
                    self.report_corrupt(key)
                case messages.DropShard(key):
                    self.chunks.pop(key, None)
                    self.unreported.pop(key, None)
                    self.corrupt.discard(key)
                case _:
                    assert_never(command)

    def release(self, order: messages.CopiesReleased) -> None:
        before = set(self.core.shards)
        self.feed(order)
        for key in before - self.core.shards.keys():
            self.cluster.model.released(self.id, key)

    def tick(self) -> None:
        self.feed(messages.Ticked())
        for record in list(self.unreported.values()):
            self.report(record)
        for key in sorted(self.corrupt):
            self.report_corrupt(key)

    def _later(self, name: str, run) -> None:  # type: ignore[no-untyped-def]
        self.cluster.network.send(Message(f"{self.id} {name}", self.host, self.host, run))

    def _hash(self, key: ShardKey, index: int) -> None:
        content = self.chunks.get(key, {}).get(index)
        if self.is_alive and content is not None:
            self.feed(messages.ChunkHashed(key, index, digest(content)))

    def _compare(self, ask: messages.ReadTwin) -> None:
        content = self.chunks.get(ask.twin, {}).get(ask.index)
        if self.is_alive and content is not None:
            value = digest(content)
            self.feed(messages.TwinRead(ask.key, ask.index, ask.expected, ask.twin, value))

    def _read(self, key: ShardKey, index: int) -> None:
        if self.is_alive:
            content = self.chunks.get(key, {}).get(index)
            value = b"" if content is None else digest(content)
            self.feed(messages.ChunkRead(key, index, value))

    def _offer(self, offer: messages.OfferChunk) -> None:
        peer = self.cluster.holders.get(offer.to.node_id)

        def answered(event: messages.Event) -> None:
            if self.is_alive:
                self.feed(event)

        def failed() -> None:
            answered(messages.ChunkNotTaken(offer.to, offer.key, offer.index))

        def done() -> None:
            answered(messages.ChunkTaken(offer.to, offer.key, offer.index))

        def run() -> None:
            if peer is None:
                raise HolderUnavailableError(offer.to.node_id, "unknown")
            peer.take(offer, self)

        name = f"{self.id} offers {offer.key}#{offer.index} to {offer.to}"
        self.cluster.network.send(Message(name, self.host, offer.to.node_id, run, done, failed))

    def report(self, record: ShardRecord) -> None:
        def run() -> None:
            if self.is_alive and self.unreported.get(record.key) is record:
                self.cluster.coordinator.report(self.id, record)

        def done() -> None:
            if self.unreported.get(record.key) is record:
                del self.unreported[record.key]

        name = f"{self.id} reports {record.key}"
        self.cluster.network.send(Message(name, self.host, HEAD, run, done))

    def report_corrupt(self, key: ShardKey) -> None:
        def run() -> None:
            if self.is_alive and key in self.corrupt:
                self.cluster.coordinator.report_corrupt(self.id, key)

        def done() -> None:
            self.corrupt.discard(key)

        name = f"{self.id} reports that its {key} is corrupt"
        self.cluster.network.send(Message(name, self.host, HEAD, run, done))
