"""A holder's core alone, under any order of its events, against a model of a few lines."""

import math
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from replication import messages
from replication.errors import FencedError, MemoryBudgetError
from replication.inventory import Inventory
from replication.records import HolderId, ShardKey, ShardPlan, Version
from replication.scrub import SCRUB_PERIOD_S

JOB = "job"
CHUNKS = 2
PLAN = ShardPlan(2, (1,) * CHUNKS)
PEERS = tuple(HolderId(name, "1") for name in "bcd")
VERSIONS = st.builds(Version, st.integers(1, 2), st.integers(0, 2))
KEYS = st.builds(ShardKey, st.just(JOB), VERSIONS, st.just(0))
INDEX = st.integers(0, CHUNKS - 1)
PROFILE = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)


def digest(key: ShardKey, index: int) -> bytes:
    """The second chunk does not change before step 2."""
    if index == 1 and key.version.step < 2:
        return f"frozen of {key.rank}".encode().rjust(16)
    return f"{key.version.generation}.{key.version.step}.{key.rank}#{index}".encode().rjust(16)


class InventoryLife(RuleBasedStateMachine):
    """One holder's core.

    The model: per shard, which chunks were pinned and which were verified, and for each of them the
    number of the bytes that it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.core = Inventory(HolderId("a", "1"), capacity_bytes=CHUNKS * 4)
        self.now_s = 0.0
        self.pinned: dict[ShardKey, set[int]] = {}
        self.verified: dict[ShardKey, set[int]] = {}
        self.corrupt: set[ShardKey] = set()
        self.beside: set[tuple[ShardKey, int]] = set()  # staged to a copy that was corrupt by then
        self.places: dict[tuple[ShardKey, int], int] = {}
        self.comparing: list[messages.ReadTwin] = []
        self.count = 0
        self.fence = 0
        self.mark = Version(0, 0)
        self.dropped: set[Version] = set()
        self.ordered: set[tuple[HolderId, ShardKey]] = set()

    def feed(self, event: messages.Event) -> list[messages.Command]:
        """Handle an event; and again, which must change and ask for nothing more."""
        commands = self.core.handle(event, self.now_s)
        for command in commands:
            if isinstance(command, messages.DropShard):
                self.pinned.pop(command.key, None)
                self.verified.pop(command.key, None)
                self.corrupt.discard(command.key)
                self.beside = {slot for slot in self.beside if slot[0] != command.key}
                for index in range(CHUNKS):
                    self.places.pop((command.key, index), None)
        self.comparing += [c for c in commands if isinstance(c, messages.ReadTwin)]
        before = self.seen()
        again = self.core.handle(event, self.now_s)
        assert self.seen() == before
        assert [command for command in again if not _is_said_again(event, command)] == []
        return commands

    def seen(self) -> Any:
        shards = {
            key: (tuple(s.blocks.items()), tuple(sorted(s.digests.items())), s.quarantined)
            for key, s in self.core.shards.items()
        }
        return shards, dict(self.core.watermarks), dict(self.core.fences)

    def place(self, key: ShardKey, index: int) -> None:
        self.count += 1
        self.places.setdefault((key, index), self.count)

    def sharers(self, key: ShardKey, index: int) -> list[ShardKey]:
        """Who counts and has the same bytes."""
        place = self.places.get((key, index))
        keys = {k for (k, i), p in self.places.items() if (i, p) == (index, place)}
        return sorted((keys - self.corrupt) | {key})

    def is_gone(self, key: ShardKey) -> bool:
        is_dropped = key.version in self.dropped and key.version.generation >= self.fence
        return (key.version < self.mark or is_dropped) and key not in self.pinned

    @rule(key=KEYS, index=INDEX)
    def stage(self, key: ShardKey, index: int) -> None:
        try:
            self.core.check_write(key, PLAN)
        except FencedError:
            assert key.version.generation < self.fence
            return
        except MemoryBudgetError:
            assert key not in self.pinned
            return
        assert key.version.generation >= self.fence
        is_new = not self.core.has_chunk(key, index) and key not in self.corrupt
        commands = self.feed(messages.ChunkStaged(key, PLAN, index))
        if self.is_gone(key):
            assert commands == [messages.DropShard(key)]
            return
        self.fence = max(self.fence, key.version.generation)
        if key not in self.corrupt:
            self.pinned.setdefault(key, set()).add(index)
            self.place(key, index)
            assert commands == ([messages.HashChunk(key, index)] if is_new else [])
        else:
            self.beside.add((key, index))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def hash(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.pinned)))
        index = data.draw(st.sampled_from(sorted(self.pinned[key])))
        self.feed(messages.ChunkHashed(key, index, digest(key, index)))
        if key not in self.corrupt:
            self.verified.setdefault(key, set()).add(index)

    @rule(key=KEYS, index=INDEX)
    def hash_late(self, key: ShardKey, index: int) -> None:
        """A checksum whose chunk is gone, or was never here, makes nothing count."""
        if index not in self.pinned.get(key, ()):
            self.feed(messages.ChunkHashed(key, index, digest(key, index)))

    @rule(key=KEYS, index=INDEX)
    def fetch(self, key: ShardKey, index: int) -> None:
        try:
            self.core.check_copy(key, PLAN)
        except MemoryBudgetError:
            assert key not in self.pinned
            return
        commands = self.feed(messages.ChunkFetched(key, PLAN, index, digest(key, index)))
        if self.is_gone(key):
            assert commands == [messages.DropShard(key)]
            return
        self.fence = max(self.fence, key.version.generation)
        if key in self.corrupt:  # a good copy takes its place, chunk by chunk
            self.corrupt.discard(key)
            self.beside = {slot for slot in self.beside if slot[0] != key}
            self.pinned[key], self.verified[key] = set(), set()
            self.places = {slot: p for slot, p in self.places.items() if slot[0] != key}
        self.pinned.setdefault(key, set()).add(index)
        self.verified.setdefault(key, set()).add(index)
        self.place(key, index)

    @precondition(lambda self: self.comparing)
    @rule(data=st.data(), is_well=st.booleans())
    def compare(self, data: st.DataObject, is_well: bool) -> None:
        """A chunk that equals an earlier one is to share its bytes, if these are still right."""
        ask = data.draw(st.sampled_from(self.comparing))
        self.comparing.remove(ask)
        key, index, twin = ask.key, ask.index, ask.twin
        assert ask.expected == digest(key, index) == digest(twin, index)
        counts = index in self.verified.get(twin, ()) and twin not in self.corrupt
        spoilt = self.sharers(twin, index)
        value = digest(twin, index) if is_well else b"?" * 16
        commands = self.feed(messages.TwinRead(key, index, ask.expected, twin, value))
        if counts and not is_well:
            assert commands == [messages.ReportCorrupt(k) for k in spoilt]
            self.corrupt.update(spoilt)
        elif counts and index in self.verified.get(key, ()) and key not in self.corrupt:
            assert commands == [messages.ShareChunk(key, index, twin)]
            self.places[key, index] = self.places[twin, index]
        else:
            assert commands == []

    @precondition(lambda self: any(len(v) == CHUNKS for v in self.verified.values()))
    @rule(data=st.data())
    def find_corrupt(self, data: st.DataObject) -> None:
        sealed = sorted(k for k, v in self.verified.items() if len(v) == CHUNKS)
        key, index = data.draw(st.sampled_from(sealed)), data.draw(INDEX)
        spoilt = self.sharers(key, index)
        commands = self.feed(messages.ChunkFoundCorrupt(key, index))
        assert commands == [messages.ReportCorrupt(k) for k in spoilt]
        self.corrupt.update(spoilt)

    @rule(is_well=st.booleans())
    def read_again(self, is_well: bool) -> None:
        """The scrub: one chunk, that was verified, and is found as it was or not."""
        self.now_s += SCRUB_PERIOD_S
        commands = self.core.handle(messages.Ticked(), self.now_s)
        reads = [c for c in commands if isinstance(c, messages.ReadChunk)]
        assert len(reads) <= 1
        for key, index in ((c.key, c.index) for c in reads):
            assert index in self.verified[key] or (key, index) in self.beside
            value = digest(key, index) if is_well else b"?" * 16
            answers = self.core.handle(messages.ChunkRead(key, index, value), self.now_s)
            told = [c for c in answers if isinstance(c, messages.ReportCorrupt)]
            spoilt = [] if is_well else self.sharers(key, index)
            assert told == [messages.ReportCorrupt(k) for k in spoilt]
            self.corrupt.update(spoilt)

    @rule(key=KEYS)
    def be_offered_what_is_here(self, key: ShardKey) -> None:
        """Whoever offers does not know of this copy: it is reported, if it counts."""
        commands = self.core.handle(messages.ChunkKnown(key), self.now_s)
        is_sealed = key not in self.corrupt and len(self.verified.get(key, ())) == CHUNKS
        assert [type(c) for c in commands] == [messages.ReportShard] * is_sealed

    @rule(generation=st.integers(1, 2))
    def raise_fence(self, generation: int) -> None:
        self.feed(messages.FenceRaised(JOB, generation))
        self.fence = max(self.fence, generation)

    @rule(
        generation=st.integers(1, 2),
        below=VERSIONS,
        pinned=st.sets(VERSIONS, max_size=2),
        last=st.sampled_from([None, None, -1, 0, 1]),
    )
    def collect(
        self, generation: int, below: Version, pinned: set[Version], last: int | None
    ) -> None:
        """`last` is the step of generation 1 from which generation 2 continued, -1 if none."""
        branch = None if last is None else (Version(1, last),) if last >= 0 else ()
        event = messages.WatermarkRaised(JOB, generation, below, tuple(sorted(pinned)), branch)
        held = set(self.pinned)
        try:
            commands = self.feed(event)
        except FencedError:
            assert generation < self.fence
            return
        assert generation >= self.fence
        beyond = math.inf if last is None or generation == 1 else last
        gone = {
            k
            for k in held
            if k.version not in pinned
            and (k.version < below or (k.version.generation == 1 and k.version.step > beyond))
        }
        assert {c.key for c in commands if isinstance(c, messages.DropShard)} == gone
        self.mark = max(self.mark, below)

    @rule(version=VERSIONS)
    def drop_step(self, version: Version) -> None:
        commands = self.feed(messages.StepDropped(JOB, version))
        if version.generation < self.fence:  # a newer generation may have resumed from it
            assert commands == []
        else:
            self.dropped.add(version)

    @rule(
        buddies=st.lists(st.sampled_from(PEERS), unique=True, max_size=2),
        counted=st.frozensets(st.sampled_from(PEERS)),
    )
    def set_buddies(self, buddies: list[HolderId], counted: frozenset[HolderId]) -> None:
        self.check_offers(self.feed(messages.BuddiesChanged(JOB, tuple(buddies), counted)))

    @rule(key=KEYS, to=st.sampled_from(PEERS), generation=st.integers(1, 2))
    def ask_for_a_copy(self, key: ShardKey, to: HolderId, generation: int) -> None:
        commands = self.feed(messages.ReplicationRequested(key, to, generation))
        if generation < self.fence:
            assert commands == []
            return
        self.fence = generation
        is_sealed = key not in self.corrupt and len(self.verified.get(key, ())) == CHUNKS
        offers = [c for c in commands if isinstance(c, messages.OfferChunk) and c.to == to]
        assert len(offers) == (CHUNKS if is_sealed else 0)
        self.check_offers(commands)

    @rule(key=KEYS, index=INDEX, to=st.sampled_from(PEERS), is_taken=st.booleans())
    def answer(self, key: ShardKey, index: int, to: HolderId, is_taken: bool) -> None:
        kind = messages.ChunkTaken if is_taken else messages.ChunkNotTaken
        assert self.core.handle(kind(to, key, index), self.now_s) == []

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0]))
    def tick(self, seconds: float) -> None:
        self.now_s += seconds
        commands = self.core.handle(messages.Ticked(), self.now_s)
        reminders = {c.key for c in commands if isinstance(c, messages.ReportCorrupt)}
        assert reminders in (set(), self.corrupt)
        self.check_offers([c for c in commands if isinstance(c, messages.OfferChunk)])
        assert self.core.handle(messages.Ticked(), self.now_s) == []

    def check_offers(self, commands: list[messages.Command]) -> None:
        """Only what was verified is offered."""
        for offer in commands:
            assert isinstance(offer, messages.OfferChunk)
            assert offer.index in self.verified[offer.key]
            assert offer.digest == digest(offer.key, offer.index)

    @invariant()
    def budget_is_kept(self) -> None:
        assert self.core.used_bytes <= self.core.capacity_bytes
        assert set(self.core.shards) == set(self.pinned)

    @invariant()
    def shared_bytes_are_counted(self) -> None:
        assert self.core.shared_bytes == len(self.places) - len(set(self.places.values()))

    @invariant()
    def sealed_means_every_chunk_verified(self) -> None:
        whole = {k for k, v in self.verified.items() if len(v) == CHUNKS} - self.corrupt
        assert {record.key for record in self.core.records()} == whole

    @invariant()
    def marks_and_fences_never_go_back(self) -> None:
        assert self.core.watermarks.get(JOB, Version(0, 0)) == self.mark
        assert self.core.fences.get(JOB, 0) == self.fence


def _is_said_again(event: messages.Event, command: messages.Command) -> bool:
    """What came too late is let go each time; a peer may have lost what it once took."""
    match event, command:
        case messages.ChunkFoundCorrupt(), messages.ReportCorrupt():
            return True
        case messages.ChunkStaged() | messages.ChunkFetched(), messages.DropShard():
            return True
        case messages.ReplicationRequested(), messages.OfferChunk():
            return True
        case messages.TwinRead(), messages.ShareChunk():
            return True
    return False


TestInventory = InventoryLife.TestCase
TestInventory.settings = PROFILE
