"""What a holder's core is told (events), and what it asks its shell to do (commands).

See `replication.inventory` for the rules. Each may be repeated; a command's outcome comes back as
the event that its docstring names.
"""

from dataclasses import dataclass

from replication.records import HolderId, ShardKey, ShardPlan, ShardRecord, Version

# --- events -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChunkStaged:
    """A trainer on this host put a chunk, and the shell has pinned it."""

    key: ShardKey
    plan: ShardPlan
    index: int


@dataclass(frozen=True, slots=True)
class ChunkHashed:
    """The checksum of a chunk staged here is known."""

    key: ShardKey
    index: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class ChunkFetched:
    """A chunk that a peer offered is here, verified against `digest`, and pinned."""

    key: ShardKey
    plan: ShardPlan
    index: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class ChunkTaken:
    """A peer has verified and pinned a chunk that was offered to it."""

    peer: HolderId
    key: ShardKey
    index: int


@dataclass(frozen=True, slots=True)
class ChunkNotTaken:
    """An offer failed, or its answer did not come in time; it will be repeated."""

    peer: HolderId
    key: ShardKey
    index: int


@dataclass(frozen=True, slots=True)
class BuddiesChanged:
    """From now on shards of `job` staged here are replicated to `buddies`.

    Attributes:
        job: Whose.
        buddies: In order of preference.
        counted: Holders whose copies count: a shard that as many of them have taken as there are
            buddies is not offered to new ones, or each change would leave a copy too many.
    """

    job: str
    buddies: tuple[HolderId, ...]
    counted: frozenset[HolderId] = frozenset()


@dataclass(frozen=True, slots=True)
class ReplicationRequested:
    """The coordinator wants one more copy of a shard, whoever staged it (repair).

    Attributes:
        key: The shard.
        to: Who is to have it.
        generation: The newest one that the coordinator knows of.
        bytes_per_s: How fast this host sends all that goes at a bounded rate; None: no bound.
    """

    key: ShardKey
    to: HolderId
    generation: int
    bytes_per_s: int | None = None


@dataclass(frozen=True, slots=True)
class FenceRaised:
    """Generation `generation` of `job` has begun; older ones write no more."""

    job: str
    generation: int


@dataclass(frozen=True, slots=True)
class WatermarkRaised:
    """Generation `generation` of `job` says that nothing below `below` is needed any more.

    Attributes:
        job: The job.
        generation: Who says so.
        below: The watermark.
        pinned: Versions below it that are still needed (they are being flushed). A version is
            pinned when it is the newest one and released later, never pinned again, so that the
            order in which these messages arrive does not matter.
        branch: The last step of each older generation that this one descends from: what those
            have beyond is abandoned, and goes too. None where that is not known.
    """

    job: str
    generation: int
    below: Version
    pinned: tuple[Version, ...] = ()
    branch: tuple[Version, ...] | None = None

    def is_needed(self, version: Version) -> bool:
        """Whether a version is to be kept."""
        if version in self.pinned:
            return True
        if self.branch is None or version.generation >= self.generation:
            return version >= self.below
        last = {end.generation: end.step for end in self.branch}
        return version >= self.below and version.step <= last.get(version.generation, -1)


@dataclass(frozen=True, slots=True)
class StepDropped:
    """A step that was never committed is not wanted any more; late chunks of it neither.

    Only while its generation is the newest: a later one may have resumed from this very step.
    """

    job: str
    version: Version


@dataclass(frozen=True, slots=True)
class CopiesReleased:
    """Generation `generation` says that enough other holders have these shards: let go of them.

    Attributes:
        job: The job.
        generation: Who says so.
        keys: Copies that were made here of what other hosts have staged.
    """

    job: str
    generation: int
    keys: tuple[ShardKey, ...]


@dataclass(frozen=True, slots=True)
class TwinRead:
    """The bytes of an equal chunk of another version were read again, and are still in place.

    Attributes:
        key: The shard whose chunk, which is here, may share them.
        index: Which chunk of both.
        expected: The checksum of both.
        twin: The other version's shard.
        digest: What its bytes have now.
    """

    key: ShardKey
    index: int
    expected: bytes
    twin: ShardKey
    digest: bytes


@dataclass(frozen=True, slots=True)
class ChunkFoundCorrupt:
    """A re-read chunk does not have its checksum: every copy that it is part of stops counting."""

    key: ShardKey
    index: int


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """A chunk that was to be read again has this checksum; empty if it is not here any more."""

    key: ShardKey
    index: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class ChunkKnown:
    """A peer offers a chunk that is here: whoever asked for that copy does not know of this one."""

    key: ShardKey


@dataclass(frozen=True, slots=True)
class JobForgotten:
    """Everything of a job goes."""

    job: str


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed; offers whose pause is over are repeated, and a chunk may be due for reading."""


Event = (
    ChunkStaged
    | ChunkHashed
    | ChunkFetched
    | ChunkTaken
    | ChunkNotTaken
    | BuddiesChanged
    | ReplicationRequested
    | FenceRaised
    | WatermarkRaised
    | StepDropped
    | CopiesReleased
    | TwinRead
    | ChunkFoundCorrupt
    | ChunkRead
    | ChunkKnown
    | JobForgotten
    | Ticked
)


# --- commands -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HashChunk:
    """Compute a chunk's checksum; answer with ChunkHashed."""

    key: ShardKey
    index: int


@dataclass(frozen=True, slots=True)
class ReadTwin:
    """Read a chunk of `twin` again, which should equal one that was hashed; answer with TwinRead.

    Without an answer, because those bytes are gone, nothing is shared, and nothing lost.
    """

    key: ShardKey
    index: int
    expected: bytes
    twin: ShardKey


@dataclass(frozen=True, slots=True)
class ShareChunk:
    """From now on a chunk's bytes are those that were just read of `twin`; let go of its own."""

    key: ShardKey
    index: int
    twin: ShardKey


@dataclass(frozen=True, slots=True)
class OfferChunk:
    """Ask `to` to fetch a chunk from here; answer with ChunkTaken or ChunkNotTaken.

    `bytes_per_s` is as in `ReplicationRequested`.
    """

    to: HolderId
    key: ShardKey
    plan: ShardPlan
    index: int
    digest: bytes
    bytes_per_s: int | None = None


@dataclass(frozen=True, slots=True)
class ReportShard:
    """Tell the coordinator that this shard is held here, whole and verified."""

    record: ShardRecord


@dataclass(frozen=True, slots=True)
class ReportCorrupt:
    """Tell the coordinator that the copy here is corrupt, and must not count."""

    key: ShardKey


@dataclass(frozen=True, slots=True)
class ReadChunk:
    """Read a pinned chunk again, in the background; answer with ChunkRead."""

    key: ShardKey
    index: int


@dataclass(frozen=True, slots=True)
class DropShard:
    """Let go of a shard's bytes; those that another version shares stay."""

    key: ShardKey


Command = (
    HashChunk
    | ReadTwin
    | ShareChunk
    | OfferChunk
    | ReportShard
    | ReportCorrupt
    | ReadChunk
    | DropShard
)
