"""The holder: the actor that keeps one host's checkpoint chunks in the host's object store.

It is a shell around `replication.inventory`, which decides. A save's way through here:

    trainer --prepare------> holder          lends memory that the trainer will write the save to (a
                                             live zero-copy view keeps it in the object store after
                                             the trainer's death), while training goes on
    trainer --stage_prepared> holder         takes what was written there, answers, then hashes in
                                             the background; `stage_chunk` without preparation
    holder  --take_chunks--> buddy           the buddy reads chunks from the holder's data plane
                                             (or through Ray, where that does not work) into memory
                                             of its object store, verifying them on the way
    holder, buddy --report_shards--> observer (the coordinator) each when its copy is whole

Everything runs on the actor's event loop, so that the core needs no lock; hashing, receiving,
sending and uploading run in threads.
"""

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, assert_never

import ray

from replication import messages
from replication.arrivals import Arrivals
from replication.background import Background
from replication.buffers import Buffers
from replication.checksum import digest
from replication.chunk_server import ChunkServer, ReadChunk
from replication.dataplane import Access
from replication.durable import DurableStore, Earlier, common_runs
from replication.errors import (
    ChunkCorruptError,
    HolderTimeoutError,
    HolderUnavailableError,
    ReplicationError,
    ShardNotHeldError,
)
from replication.fetch_once import AtHolder, Origin
from replication.inventory import Inventory, Reservation
from replication.lending import Lending
from replication.outbox import Outbox
from replication.presence import is_present
from replication.probes import Probes
from replication.records import (
    ActorRef,
    Chunk,
    ChunkId,
    Endpoint,
    HolderId,
    Owner,
    ShardKey,
    ShardPlan,
    ShardRecord,
    Version,
    Way,
)
from replication.release import RELEASE
from replication.reports import Reports
from replication.shared import Place, Places
from replication.stream import Tls, tls_like_ray
from replication.transport import fetch_timeout_s
from replication.wire import Secret

logger = logging.getLogger(__name__)

NAMESPACE = "tiered"
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
TICK_S = 0.2
ANSWER_FIRST_S = 0.002  # training waits for the answer; hashing at once made it take 4 ms longer
COLLECTED_S = 0.05  # that memory which is asked for waits for a step to be collected
LENDERS = min(8, os.cpu_count() or 1)  # threads: each rank of a host may ask for new memory at once
HASHERS = 1  # threads: one hashes faster than a network sends, and training needs the processors
VERIFIERS = min(8, os.cpu_count() or 1)  # threads; training waits for them


def holder_name(node_id: str) -> str:
    """The actor name of the holder on a host."""
    return f"holder-{node_id}"


@dataclass(frozen=True, slots=True)
class HolderInfo:
    """What a holder says of itself."""

    holder: HolderId
    capacity_bytes: int
    used_bytes: int
    shared_bytes: int = 0  # of those, counted once more for each version that has them
    endpoint: Endpoint | None = None  # of its data plane
    release: str = ""
    sent_bytes: int = 0  # of chunks to other hosts, by its data plane
    received_bytes: int = 0  # of chunks from other hosts, whichever way
    cut_off: frozenset[HolderId] = frozenset()  # buddies that it cannot reach


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of chunks that a holder has moved so far.

    Attributes:
        received: From other holders, by the way they came ("tcp", "ray").
        sent: By its data plane; what Ray has moved is not counted.
        spared: That did not have to come: an earlier version's chunk was the same.
    """

    received: dict[str, int]
    sent: int
    spared: int = 0


class Holder:
    """One host's chunks. Every method may be called again with the same arguments."""

    def __init__(self, node_id: str, capacity_bytes: int, observer: str, secret: Secret) -> None:
        """Start empty, with the data plane listening.

        Args:
            node_id: The host.
            capacity_bytes: Budget for all shards here.
            observer: Name of the actor that wants to know of sealed shards (`report_shards`) and
                of corrupt ones (`report_corrupt`).
            secret: Of the cluster's data plane.
        """
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)  # this process is ours
        logging.getLogger("botocore").setLevel(logging.WARNING)
        self._core = Inventory(HolderId(node_id, uuid.uuid4().hex), capacity_bytes)
        self._chunks: dict[ShardKey, dict[int, Chunk]] = {}
        self._lending = Lending()
        self._secret = secret
        tls = tls_like_ray(os.environ)
        self._server = _serve(self._pinned, secret, tls)
        self._buffers = Buffers()
        self._arrivals = Arrivals(node_id, self._buffers, secret, tls, self._peer)
        self._ways: dict[str, Way] = {}
        self._places = Places()
        self._has_dropped = asyncio.Event()
        self._spared_bytes = 0
        self._lenders = ThreadPoolExecutor(LENDERS, thread_name_prefix="tiered-lend")
        self._hashers = ThreadPoolExecutor(HASHERS, thread_name_prefix="tiered-hash")
        self._rereaders = ThreadPoolExecutor(1, thread_name_prefix="tiered-reread")
        self._verifiers = ThreadPoolExecutor(VERIFIERS, thread_name_prefix="tiered-verify")
        self._reports = Reports(observer, NAMESPACE)
        self._probes = Probes(self._peer, self._core.offers.peers)
        self._peers: dict[HolderId, ActorRef] = {}
        self._background = Background(f"holder {self._core.holder}")
        self._outbox = Outbox(self._offer, self._background, self._core.offers.is_wanted)

    async def hello(self) -> HolderInfo:
        """Answer that this holder is alive; the first call starts its background work."""
        start = self._background.start
        if not self._background.tasks:
            start(self._tick_forever())
            start(self._reports.send_forever(self._core.holder))
            start(self._probes.run())
        core, traffic = self._core, await self.traffic()
        return HolderInfo(
            core.holder, core.capacity_bytes, core.used_bytes, core.shared_bytes,
            self._endpoint, RELEASE, traffic.sent, sum(traffic.received.values()),
            self._probes.cut_off,
        )  # fmt: skip

    # -- called by trainers on this host --------------------------------------------------------

    async def reserve(
        self, job: str, rank: int, reservation: Reservation, way: Way = "auto"
    ) -> None:
        """Declare a rank's need before its first byte; see `Inventory.reserve`.

        Args:
            job: The job.
            rank: Whose need.
            reservation: The need.
            way: How the job's chunks are to go to buddies from here.
        """
        self._core.reserve(job, rank, reservation)
        self._ways[job] = way

    async def release(self, job: str, rank: int) -> None:
        """Take back what a rank declared: it will save no more."""
        self._core.release(job, rank)
        self._lending.end(job, rank)
        self._trim()

    async def prepare(
        self, job: str, rank: int, generation: int, kept: Sequence[str], sizes: Sequence[int]
    ) -> list[Any]:
        """Lend memory to a trainer on this host, for its next save.

        Args:
            job: The job.
            rank: The trainer's.
            generation: The trainer's.
            kept: Of what was lent to it before, what it still has a use for; the rest is let go of.
            sizes: How many bytes it needs, chunk by chunk.

        Returns:
            References to memory of at least these sizes that nobody else knows, for the first
            chunks; for the others it is to ask again. Empty: the object store's memory cannot be
            used, or nobody waits for this answer any more.

        Raises:
            FencedError: A newer generation has taken over.
            Exception: Whatever Ray raises when the object store is full.
        """
        self._core.check_generation(job, generation)
        asked = self._lending.ask(job, rank, generation, kept)
        if not kept and any((key.job, key.rank) == (job, rank) for key in self._core.shards):
            await self._until_free(sizes)
        self._trim()
        run = asyncio.get_running_loop().run_in_executor
        loans = await run(self._lenders, self._buffers.lend, sizes)
        self._core.check_generation(job, generation)  # a fence may have come meanwhile
        is_wanted = self._lending.add(job, rank, asked, loans)
        self._trim()
        return [loan.reference for loan in loans] if is_wanted else []

    async def stage_prepared(
        self, key: ShardKey, plan: ShardPlan, names: Mapping[int, str]
    ) -> None:
        """Take chunks that a trainer has written to memory that was lent to it.

        When this returns, the trainer's death loses nothing of them.

        Args:
            key: The shard.
            plan: Its layout.
            names: Of the memory, by the index of the chunk; it may be longer than that.

        Raises:
            FencedError: A newer generation has taken over.
            MemoryBudgetError: It does not fit.
            HolderUnavailableError: This holder does not know that memory: it is a new one.
        """
        self._core.check_write(key, plan)
        wanted = {i: name for i, name in names.items() if not self._core.has_chunk(key, i)}
        loans = self._lending.take(key.job, key.rank, wanted.values())
        if loans is None:
            reason = "it does not know the memory that was prepared"
            raise HolderUnavailableError(self._core.holder.node_id, reason)
        for index, name in wanted.items():
            chunk = loans[name].pin(plan.chunk_sizes[index])
            self._chunks.setdefault(key, {})[index] = chunk
            self._feed(messages.ChunkStaged(key, plan, index))

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
        self._feed(messages.ChunkStaged(key, plan, index))

    # -- called by other holders, and by whoever restores ---------------------------------------

    async def take_chunks(
        self,
        key: ShardKey,
        plan: ShardPlan,
        digests: Mapping[int, bytes],
        source: HolderId,
        endpoint: Endpoint | None = None,
        way: Way = "auto",
    ) -> dict[int, str]:
        """Fetch chunks from `source`, verify them, and pin copies of our own, one after the other.

        Of a chunk that did not change since an earlier version that is here, no byte moves: that
        one is read again, and shared.

        When this returns, the copies count: they are verified and survive the death of their
        source.

        Args:
            key: The shard.
            plan: Its layout.
            digests: The checksums of the chunks that are offered, by index.
            source: Who has them.
            endpoint: Where the data plane of `source` listens, if it has one.
            way: How to fetch them.

        Returns:
            Of those that were not taken, why: there is no room, the source could not serve it, or
            what arrived has another checksum.
        """
        origin, refused = AtHolder(source, endpoint, way), dict[int, str]()
        for position, (index, expected) in enumerate(digests.items()):
            try:
                await self._take(messages.ChunkFetched(key, plan, index, expected), origin)
            except HolderTimeoutError as error:  # nor is it waited for again
                return refused | dict.fromkeys(list(digests)[position:], str(error))
            except ReplicationError as error:
                refused[index] = str(error)
            except Exception as error:
                logger.exception("%s chunk %d not taken from %s", key, index, source)
                refused[index] = repr(error)
        return refused

    async def read_chunk(self, key: ShardKey, index: int) -> Chunk:
        """Return a chunk that is pinned here; Ray copies it for whoever asked.

        Raises:
            ShardNotHeldError: It is not here.
        """
        return self._pinned(key, index)

    async def places(self, key: ShardKey) -> list[list[Place] | None]:
        """Where in this host's object store each chunk lies; None for one that is not in it.

        Raises:
            ShardNotHeldError: Nothing of the shard is here.
        """
        chunks = self._chunks.get(key)
        if not chunks:
            raise ShardNotHeldError(self._core.holder.node_id, str(key))
        return [
            self._places.of(chunks[index]) if index in chunks else None
            for index in range(max(chunks) + 1)
        ]

    async def newest_places(
        self, job: str, rank: int
    ) -> tuple[ShardKey, list[list[Place] | None]] | None:
        """The newest whole shard of a rank that is here, and its `places`; None: there is none."""
        keys = [r.key for r in self._core.records() if (r.key.job, r.key.rank) == (job, rank)]
        if not keys:
            return None
        key = max(keys, key=lambda k: k.version)
        return key, await self.places(key)

    async def bring(self, wanted: ChunkId, expected: bytes, origin: Origin) -> list[Place] | None:
        """Fetch a chunk for readers on this host, once for all of them; see `FetchOnce`.

        Args:
            wanted: Which chunk.
            expected: Its checksum.
            origin: Where from.

        Returns:
            Where it lies in this host's object store, for the next seconds; None if it is not in
            it.

        Raises:
            ChunkCorruptError: What arrived does not have the checksum `expected`.
            HolderUnavailableError: There is no room for it here, or its holder is gone.
            ShardNotHeldError, ProtocolError: The holder could not serve it.
            Exception: Whatever the store raises.
        """
        room_bytes = self._core.capacity_bytes - self._used_bytes
        chunk = await self._arrivals.fetch_once(wanted, expected, origin, room_bytes)
        return self._places.of(chunk)

    async def access(self) -> Access:
        """Tell how to read from here by TCP; who may call actors may know the secret."""
        return Access(self._endpoint, self._secret)

    # -- called by the coordinator --------------------------------------------------------------

    async def list_shards(self) -> list[ShardRecord]:
        """Every shard held here whole: the truth about this host's memory."""
        return self._core.records()

    async def traffic(self) -> Traffic:
        """How many bytes came and went, and how."""
        sent = 0 if self._server is None else self._server.counters.bytes_sent
        return Traffic(self._arrivals.received_bytes, sent, self._spared_bytes)

    async def fence(self, job: str, generation: int) -> None:
        """Refuse older generations of `job` from now on, and end repairs that they asked for."""
        self._feed(messages.FenceRaised(job, generation))
        self._lending.end_job(job, before=generation)
        self._trim()

    async def set_buddies(
        self, job: str, buddies: tuple[HolderId, ...], counted: frozenset[HolderId]
    ) -> None:
        """Replicate shards of `job` staged here to `buddies`, past ones included."""
        self._feed(messages.BuddiesChanged(job, buddies, counted))

    async def replicate(
        self, key: ShardKey, to: HolderId, generation: int, bytes_per_s: int
    ) -> None:
        """Make one more copy of a shard, on `to`; see `messages.ReplicationRequested`."""
        self._feed(messages.ReplicationRequested(key, to, generation, bytes_per_s))

    async def collect(
        self,
        job: str,
        generation: int,
        below: Version,
        pinned: tuple[Version, ...] = (),
        branch: tuple[Version, ...] | None = None,
    ) -> None:
        """Let go of every shard of `job` that is older than `below`, or abandoned, and not pinned.

        See `messages.WatermarkRaised`.
        """
        self._feed(messages.WatermarkRaised(job, generation, below, pinned, branch))

    async def release_copies(self, job: str, generation: int, keys: tuple[ShardKey, ...]) -> None:
        """Let go of copies that are not needed here; see `messages.CopiesReleased`."""
        self._feed(messages.CopiesReleased(job, generation, keys))

    async def has_trainer(self, owner: Owner) -> bool:
        """Whether this process of the holder's host is still a trainer's."""
        return await asyncio.to_thread(is_present, owner)

    async def drop_step(self, job: str, version: Version) -> None:
        """Let go of a step of `job` that was never committed."""
        self._feed(messages.StepDropped(job, version))

    async def forget(self, job: str) -> None:
        """Let go of everything of `job`."""
        self._lending.end_job(job)
        self._feed(messages.JobForgotten(job))
        self._ways.pop(job, None)

    async def verify(self, keys: Sequence[ShardKey]) -> list[ShardKey]:
        """Read every byte of these shards; return those that are missing or corrupt here.

        Several chunks at a time: a new life waits for it, and a host may have hundreds of GB.
        """

        async def is_intact(key: ShardKey) -> bool:
            try:
                await self._verified(key, self._verifiers)
            except (ShardNotHeldError, ChunkCorruptError):
                return False
            return True

        intact = await asyncio.gather(*map(is_intact, keys))
        return [key for key, is_whole in zip(keys, intact, strict=True) if not is_whole]

    async def upload(
        self,
        key: ShardKey,
        store: DurableStore,
        object_key: str,
        earlier: tuple[str, ShardRecord] | None = None,
    ) -> ShardRecord:
        """Store a shard's image durably, from the pinned chunks; return its record.

        Args:
            key: The shard.
            store: Where to.
            object_key: Under what.
            earlier: Where an earlier step's shard is stored, and its record: chunks that have not
                changed since need not be sent.

        Raises:
            ShardNotHeldError: It is not held here (any more).
            ChunkCorruptError: This copy is corrupt; nothing was uploaded.
            Exception: Whatever the store raises.
        """
        with contextlib.closing(store):
            await asyncio.to_thread(store.check)  # before a whole shard is read for nothing
            record = await self._verified(key, self._rereaders)
            known = None
            if earlier is not None and (runs := common_runs(record, earlier[1])):
                known = Earlier(earlier[0], runs)
            await asyncio.to_thread(store.upload, object_key, self._whole(record), known)
        return record

    # -- the shell ------------------------------------------------------------------------------

    async def _verified(self, key: ShardKey, threads: ThreadPoolExecutor) -> ShardRecord:
        """Read every byte of a shard; a corrupt copy stops counting."""
        record, run = self._core.record(key), asyncio.get_running_loop().run_in_executor
        values = await asyncio.gather(*(run(threads, digest, c) for c in self._whole(record)))
        pairs = enumerate(zip(values, record.digests, strict=True))
        bad = next((index for index, (value, expected) in pairs if value != expected), None)
        if bad is not None:
            error = ChunkCorruptError("this host's memory", str(key), bad)
            logger.error("%s; the copy no longer counts", error)
            self._feed(messages.ChunkFoundCorrupt(key, bad))
            raise error
        return record

    async def _take(self, offered: messages.ChunkFetched, origin: AtHolder) -> None:
        """Have a chunk here that is offered: it is already, or an earlier one is it, or comes."""
        key, plan, index, expected = offered.key, offered.plan, offered.index, offered.digest
        self._core.check_copy(key, plan)
        if self._core.has_chunk(key, index):
            self._feed(messages.ChunkKnown(key))
            return
        wanted = ChunkId(key, index, plan.chunk_sizes[index])
        twin = self._core.twin_of(wanted, expected)
        if twin is not None and (same := await self._read_twin(twin, index)) is not None:
            chunk, value = same
            if value == expected and self._core.has_chunk(twin, index):
                self._keep(offered, chunk)
            self._feed(messages.TwinRead(key, index, expected, twin, value))
            if self._core.has_chunk(key, index):
                self._spared_bytes += wanted.size_bytes
                return
        self._trim()
        self._keep(offered, await self._arrivals.fetch(wanted, expected, origin))

    def _keep(self, fetched: messages.ChunkFetched, chunk: Chunk) -> None:
        """Pin a verified chunk, if that is still wanted: the world may have moved on meanwhile."""
        self._core.check_copy(fetched.key, fetched.plan)
        if not self._core.has_chunk(fetched.key, fetched.index):
            self._chunks.setdefault(fetched.key, {})[fetched.index] = chunk
        self._feed(fetched)

    async def _read_twin(self, twin: ShardKey, index: int) -> tuple[Chunk, bytes] | None:
        """Read a chunk again: its bytes and checksum, or None if they are not in place any more."""
        chunk = self._chunks.get(twin, {}).get(index)
        if chunk is None:
            return None
        value = await asyncio.to_thread(digest, chunk)
        return (chunk, value) if self._chunks.get(twin, {}).get(index) is chunk else None

    def _pinned(self, key: ShardKey, index: int) -> Chunk:
        """A chunk that is here; called in any thread."""
        try:
            return self._chunks[key][index]
        except KeyError:
            raise ShardNotHeldError(self._core.holder.node_id, str(key)) from None

    @property
    def _used_bytes(self) -> int:
        """By shards, and by memory that is lent for more."""
        return self._core.used_bytes + self._lending.lent_bytes

    async def _until_free(self, sizes: Sequence[int]) -> None:
        """Give memory that is about to be collected a moment to be free.

        The coordinator tells of a commit the trainer, which then asks for memory, and the holders,
        whose oldest step it replaces: who hears first is chance. What was made anew for each such
        chance would add up.
        """
        ends_s = time.monotonic() + COLLECTED_S
        with contextlib.suppress(TimeoutError):
            while not self._buffers.has_free(sizes):
                self._has_dropped.clear()
                await asyncio.wait_for(self._has_dropped.wait(), ends_s - time.monotonic())

    def _trim(self) -> None:
        self._arrivals.trim(self._core.capacity_bytes - self._used_bytes, self._used_bytes)

    @property
    def _endpoint(self) -> Endpoint | None:
        return None if self._server is None else self._server.endpoint

    def _whole(self, record: ShardRecord) -> list[Chunk]:
        chunks = self._chunks[record.key]
        return [chunks[i] for i in range(len(record.plan.chunk_sizes))]

    def _feed(self, event: messages.Event) -> None:
        for command in self._core.handle(event, time.monotonic()):
            match command:
                case messages.HashChunk():
                    self._background.start(self._hash(command.key, command.index))
                case messages.ReadTwin():
                    self._background.start(self._compare(command))
                case messages.ShareChunk(key, index, twin):
                    self._chunks[key][index] = self._chunks[twin][index]
                case messages.OfferChunk():
                    self._outbox.put(command)
                case messages.ReportShard():
                    self._reports.whole(command.record)
                case messages.ReportCorrupt():
                    self._reports.corrupt(command.key)
                case messages.ReadChunk():
                    self._background.start(self._reread(command.key, command.index))
                case messages.DropShard():
                    self._chunks.pop(command.key, None)
                    self._has_dropped.set()
                    self._reports.gone(command.key)
                    self._trim()
                case _:
                    assert_never(command)

    async def _hash(self, key: ShardKey, index: int) -> None:
        await asyncio.sleep(ANSWER_FIRST_S)
        chunk = self._chunks.get(key, {}).get(index)
        if chunk is not None:
            loop = asyncio.get_running_loop()
            value = await loop.run_in_executor(self._hashers, digest, chunk)
            self._feed(messages.ChunkHashed(key, index, value))

    async def _compare(self, ask: messages.ReadTwin) -> None:
        if (same := await self._read_twin(ask.twin, ask.index)) is not None:
            _, value = same
            self._feed(messages.TwinRead(ask.key, ask.index, ask.expected, ask.twin, value))

    async def _reread(self, key: ShardKey, index: int) -> None:
        chunk = self._chunks.get(key, {}).get(index)
        value = b"" if chunk is None else await asyncio.to_thread(digest, chunk)
        self._feed(messages.ChunkRead(key, index, value))
        shard = self._core.shards.get(key)
        if shard is not None and shard.quarantined:
            error = ChunkCorruptError("this host's memory", str(key), index)
            logger.error("%s; the copy no longer counts", error)

    async def _offer(self, to: HolderId, offers: Sequence[messages.OfferChunk]) -> None:
        """Have a peer take chunks of one shard."""
        key, plan = offers[0].key, offers[0].plan
        # The buddy's own deadline, and then some for its verification and put.
        timeout_s = 1.5 * fetch_timeout_s(sum(plan.chunk_sizes[offer.index] for offer in offers))
        try:
            peer = await self._peer(to)
            answer = peer.take_chunks.remote(
                key, plan, {offer.index: offer.digest for offer in offers},
                self._core.holder, self._endpoint, self._ways.get(key.job, "auto"),
            )  # fmt: skip
            refused: dict[int, str] = await asyncio.wait_for(answer, timeout_s)
        except Exception as error:  # noqa: BLE001 - every failure is the same event: not taken
            self._peers.pop(to, None)
            reason = str(error) or f"no answer within {timeout_s:.0f} s"
            refused = {offer.index: reason for offer in offers}
        for reason, indexes in _by_reason(refused).items():
            logger.warning("%s %s not replicated to %s yet: %s", key, indexes, to, reason)
        for offer in offers:
            is_taken = offer.index not in refused
            outcome = messages.ChunkTaken if is_taken else messages.ChunkNotTaken
            self._feed(outcome(to, key, offer.index))

    async def _peer(self, holder: HolderId) -> ActorRef:
        if holder not in self._peers:
            self._peers[holder] = await asyncio.to_thread(
                ray.get_actor, holder_name(holder.node_id), NAMESPACE
            )
        return self._peers[holder]

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._feed(messages.Ticked())
            if self._arrivals.has_guests:
                self._trim()


def _serve(read: ReadChunk, secret: Secret, tls: Tls | None) -> ChunkServer | None:
    """Start the data plane on this host's address as Ray knows it, and on no other."""
    host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    try:
        server = ChunkServer(read, secret, host, tls=tls)
    except OSError as error:
        logger.warning("no data plane on %s: %s; chunks go through Ray's object store", host, error)
        return None
    return server


def _by_reason(refused: Mapping[int, str]) -> dict[str, str]:
    """The chunks, in words, that were refused for each reason."""
    found: dict[str, list[int]] = {}
    for index, reason in sorted(refused.items()):
        found.setdefault(reason, []).append(index)
    return {
        reason: f"chunk{'s' if len(indexes) > 1 else ''} {', '.join(map(str, indexes))}"
        for reason, indexes in found.items()
    }
