"""The holder: the actor that keeps one host's checkpoint chunks in the host's object store.

It is a shell around `replication.inventory`, which decides. A save's way through here:

    trainer --stage_chunk--> holder          pins the trainer's bytes (a live zero-copy view keeps
                                             them in the object store after the trainer's death),
                                             answers, then hashes in the background
    holder  --take_chunk---> buddy           the buddy fetches the chunk through the transport,
                                             verifies its checksum, puts and pins a copy of its own
    holder, buddy --report_shards--> observer (the coordinator) each when its copy is whole

Everything runs on the actor's event loop, so that the core needs no lock; hashing, fetching and
uploading run in threads.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import ray

from replication import inventory
from replication.checksum import digest
from replication.durable import DurableStore
from replication.errors import ChunkCorruptError, ShardNotHeldError
from replication.inventory import Inventory, Reservation
from replication.records import ActorRef, Chunk, HolderId, ShardKey, ShardPlan, ShardRecord, Version
from replication.transport import RayTransport, fetch_timeout_s

logger = logging.getLogger(__name__)

NAMESPACE = "tiered"
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
TICK_S = 0.2
REPORT_TIMEOUT_S = 10.0
OFFERS_AT_ONCE = 2  # per peer: one on the wire while the next is being verified


def holder_name(node_id: str) -> str:
    """The actor name of the holder on a host."""
    return f"holder-{node_id}"


@dataclass(frozen=True, slots=True)
class HolderInfo:
    """What a holder says of itself."""

    holder: HolderId
    capacity_bytes: int
    used_bytes: int


def pin(chunk: Chunk) -> Chunk:
    """Copy a chunk into this host's object store; return read-only views that keep it there.

    The reference is dropped on purpose: bytes that only a view keeps are neither evicted nor
    spilled to disk, where a held reference would be under memory pressure.
    """
    pinned: Chunk = ray.get(ray.put(chunk))
    return pinned


class Holder:
    """One host's chunks. Every method may be called again with the same arguments."""

    def __init__(self, node_id: str, capacity_bytes: int, observer: str) -> None:
        """Start empty.

        Args:
            node_id: The host.
            capacity_bytes: Budget for all shards here.
            observer: Name of the actor that wants to know of sealed shards (`report_shards`) and
                of corrupt ones (`report_corrupt`).
        """
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)  # this process is ours
        logging.getLogger("botocore").setLevel(logging.WARNING)
        self._core = Inventory(HolderId(node_id, uuid.uuid4().hex), capacity_bytes)
        self._observer = observer
        self._transport = RayTransport()
        self._chunks: dict[ShardKey, dict[int, Chunk]] = {}
        self._unreported: dict[ShardKey, ShardRecord] = {}
        self._corrupt: set[ShardKey] = set()  # of which the observer was not told yet
        self._has_unreported = asyncio.Event()
        self._offer_slots: dict[HolderId, asyncio.Semaphore] = {}
        self._peers: dict[HolderId, ActorRef] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def hello(self) -> HolderInfo:
        """Answer that this holder is alive; the first call starts its background work."""
        if not self._tasks:
            self._spawn(self._tick_forever())
            self._spawn(self._report_forever())
        core = self._core
        return HolderInfo(core.holder, core.capacity_bytes, core.used_bytes)

    # -- called by trainers on this host --------------------------------------------------------

    async def reserve(self, job: str, rank: int, reservation: Reservation) -> None:
        """Declare a rank's need before its first byte; see `Inventory.reserve`."""
        self._core.reserve(job, rank, reservation)

    async def stage_chunk(self, key: ShardKey, plan: ShardPlan, index: int, chunk: Chunk) -> None:
        """Pin a chunk that a trainer on this host has put into the object store.

        When this returns, the trainer's death loses nothing of the chunk.

        Args:
            key: The shard.
            plan: Its layout; the same for every chunk of it.
            index: Which chunk.
            chunk: Zero-copy views; passed as an object reference, so Ray maps and copies nothing.

        Raises:
            FencedError: A newer generation has taken over.
            MemoryBudgetError: It does not fit.
        """
        self._core.check_write(key, plan)
        if not self._core.has_chunk(key, index):
            self._chunks.setdefault(key, {})[index] = chunk
        self._feed(inventory.ChunkStaged(key, plan, index))

    # -- called by other holders, and by whoever restores ---------------------------------------

    async def take_chunk(
        self, key: ShardKey, plan: ShardPlan, index: int, expected: bytes, source: HolderId
    ) -> None:
        """Fetch a chunk from `source`, verify it, and pin a copy of our own.

        When this returns, the copy counts: it is verified and survives the death of its source.

        Raises:
            MemoryBudgetError: It does not fit.
            ChunkCorruptError: What arrived does not have the checksum `expected`.
            HolderUnavailableError, ShardNotHeldError: The source could not serve it.
        """
        self._core.check_copy(key, plan)
        if self._core.has_chunk(key, index):
            self._feed(inventory.ChunkKnown(key))
            return
        handle = await self._peer(source)
        timeout_s = fetch_timeout_s(plan.chunk_sizes[index])

        def receive() -> Chunk:
            chunk = self._transport.fetch(handle, source.node_id, key, index, timeout_s)
            if digest(chunk) != expected:
                raise ChunkCorruptError(f"host {source.node_id[:8]}", str(key), index)
            return pin(chunk)

        chunk = await asyncio.to_thread(receive)
        self._core.check_copy(key, plan)  # the world may have moved on while bytes did
        self._chunks.setdefault(key, {})[index] = chunk
        self._feed(inventory.ChunkFetched(key, plan, index, expected))

    async def read_chunk(self, key: ShardKey, index: int) -> Chunk:
        """Return a chunk that is pinned here.

        Raises:
            ShardNotHeldError: It is not here.
        """
        try:
            return self._chunks[key][index]
        except KeyError:
            raise ShardNotHeldError(self._core.holder.node_id, str(key)) from None

    # -- called by the coordinator --------------------------------------------------------------

    async def list_shards(self) -> list[ShardRecord]:
        """Every shard held here whole: the truth about this host's memory."""
        return self._core.records()

    async def fence(self, job: str, generation: int) -> None:
        """Refuse older generations of `job` from now on."""
        self._feed(inventory.FenceRaised(job, generation))

    async def set_buddies(self, job: str, buddies: tuple[HolderId, ...]) -> None:
        """Replicate shards of `job` staged here to `buddies`, past ones included."""
        self._feed(inventory.BuddiesChanged(job, buddies))

    async def replicate(self, key: ShardKey, to: HolderId) -> None:
        """Make one more copy of a shard, on `to`."""
        self._feed(inventory.ReplicationRequested(key, to))

    async def collect(
        self,
        job: str,
        generation: int,
        below: Version,
        pinned: tuple[Version, ...] = (),
        branch: tuple[Version, ...] | None = None,
    ) -> None:
        """Let go of every shard of `job` that is older than `below`, or abandoned, and not pinned.

        See `inventory.WatermarkRaised`.
        """
        self._feed(inventory.WatermarkRaised(job, generation, below, pinned, branch))

    async def forget(self, job: str) -> None:
        """Let go of everything of `job`."""
        self._feed(inventory.JobForgotten(job))

    async def verify(self, keys: Sequence[ShardKey]) -> list[ShardKey]:
        """Read every byte of these shards; return those that are missing or corrupt here."""
        bad = []
        for key in keys:
            try:
                await self._verified(key)
            except (ShardNotHeldError, ChunkCorruptError):
                bad.append(key)
        return bad

    async def upload(self, key: ShardKey, store: DurableStore, object_key: str) -> ShardRecord:
        """Store a shard's image durably, from the pinned chunks; return its record.

        Raises:
            ShardNotHeldError: It is not held here (any more).
            ChunkCorruptError: This copy is corrupt; nothing was uploaded.
            Exception: Whatever the store raises.
        """
        record = await self._verified(key)
        with contextlib.closing(store):
            await asyncio.to_thread(store.upload, object_key, self._whole(record))
        return record

    # -- the shell ------------------------------------------------------------------------------

    async def _verified(self, key: ShardKey) -> ShardRecord:
        """Read every byte of a shard; a corrupt copy stops counting."""
        record = self._core.record(key)
        bad = await asyncio.to_thread(_first_corrupt, self._whole(record), record.digests)
        if bad is not None:
            error = ChunkCorruptError("this host's memory", str(key), bad)
            logger.error("%s; the copy no longer counts", error)
            self._feed(inventory.ChunkFoundCorrupt(key))
            raise error
        return record

    def _whole(self, record: ShardRecord) -> list[Chunk]:
        chunks = self._chunks[record.key]
        return [chunks[i] for i in range(len(record.plan.chunk_sizes))]

    def _feed(self, event: inventory.Event) -> None:
        for command in self._core.handle(event, time.monotonic()):
            match command:
                case inventory.HashChunk():
                    self._spawn(self._hash(command.key, command.index))
                case inventory.OfferChunk():
                    self._spawn(self._offer(command))
                case inventory.ReportShard():
                    self._corrupt.discard(command.record.key)
                    self._unreported[command.record.key] = command.record
                    self._has_unreported.set()
                case inventory.ReportCorrupt():
                    self._unreported.pop(command.key, None)  # or it would count again
                    self._corrupt.add(command.key)
                    self._has_unreported.set()
                case inventory.ReadChunk():
                    self._spawn(self._reread(command.key, command.index))
                case inventory.DropShard():
                    self._chunks.pop(command.key, None)
                    self._unreported.pop(command.key, None)
                    self._corrupt.discard(command.key)
                case _:
                    assert_never(command)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("holder %s: background work failed", self._core.holder, exc_info=error)

    async def _hash(self, key: ShardKey, index: int) -> None:
        chunk = self._chunks.get(key, {}).get(index)
        if chunk is not None:
            value = await asyncio.to_thread(digest, chunk)
            self._feed(inventory.ChunkHashed(key, index, value))

    async def _reread(self, key: ShardKey, index: int) -> None:
        chunk = self._chunks.get(key, {}).get(index)
        value = b"" if chunk is None else await asyncio.to_thread(digest, chunk)
        self._feed(inventory.ChunkRead(key, index, value))
        shard = self._core.shards.get(key)
        if shard is not None and shard.quarantined:
            error = ChunkCorruptError("this host's memory", str(key), index)
            logger.error("%s; the copy no longer counts", error)

    async def _offer(self, offer: inventory.OfferChunk) -> None:
        slots = self._offer_slots.setdefault(offer.to, asyncio.Semaphore(OFFERS_AT_ONCE))
        # The buddy's own deadline, and then some for its verification and put.
        timeout_s = fetch_timeout_s(offer.plan.chunk_sizes[offer.index]) * 1.5
        async with slots:
            try:
                peer = await self._peer(offer.to)
                answer = peer.take_chunk.remote(
                    offer.key, offer.plan, offer.index, offer.digest, self._core.holder
                )
                await asyncio.wait_for(answer, timeout_s)
            except Exception as error:  # noqa: BLE001 - every failure is the same event: not taken
                logger.warning(
                    "%s chunk %d not replicated to %s yet: %s",
                    offer.key, offer.index, offer.to, error,
                )  # fmt: skip
                self._peers.pop(offer.to, None)
                self._feed(inventory.ChunkNotTaken(offer.to, offer.key, offer.index))
            else:
                self._feed(inventory.ChunkTaken(offer.to, offer.key, offer.index))

    async def _peer(self, holder: HolderId) -> ActorRef:
        if holder not in self._peers:
            self._peers[holder] = await asyncio.to_thread(
                ray.get_actor, holder_name(holder.node_id), NAMESPACE
            )
        return self._peers[holder]

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._feed(inventory.Ticked())

    async def _report_forever(self) -> None:
        """Tell the observer of sealed and of corrupt shards, in batches, until it has answered."""
        pause_s = TICK_S
        while True:
            await self._has_unreported.wait()
            self._has_unreported.clear()
            batch, corrupt = list(self._unreported.values()), sorted(self._corrupt)
            if not batch and not corrupt:
                continue
            try:
                observer: ActorRef
                observer = await asyncio.to_thread(ray.get_actor, self._observer, NAMESPACE)
                holder, timeout_s = self._core.holder, REPORT_TIMEOUT_S
                if corrupt:
                    answer = observer.report_corrupt.remote(holder, corrupt)
                    await asyncio.wait_for(answer, timeout_s)
                    self._corrupt.difference_update(corrupt)
                if batch:
                    answer = observer.report_shards.remote(holder, batch)
                    await asyncio.wait_for(answer, timeout_s)
            except Exception as error:  # noqa: BLE001 - it may be restarting: ask again, for ever
                logger.warning("cannot report to %s yet: %s", self._observer, error)
                self._has_unreported.set()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 5.0)
                continue
            pause_s = TICK_S
            for record in batch:
                if self._unreported.get(record.key) is record:
                    del self._unreported[record.key]


def _first_corrupt(chunks: Sequence[Chunk], digests: Sequence[bytes]) -> int | None:
    pairs = enumerate(zip(chunks, digests, strict=True))
    return next((i for i, (chunk, expected) in pairs if digest(chunk) != expected), None)
