"""What the coordinator's core is told (events) and what it asks for (commands).

`tiered.coordinator` carries each command out and feeds its outcome back as an event; a command's
docstring names the event that answers it. Outcomes, failures included, are values.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from replication.detour import Pair
from replication.errors import TieredError
from replication.records import HolderId, Life, Owner, ShardKey, ShardRecord, Version
from tiered.admission import Admission
from tiered.config import JobSettings

Level = Literal["staged", "replicated", "durable"]


# --- events -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claim:
    """What the register remembers of a generation; `owner` is None where it is not known."""

    generation: int
    life: Life
    world_size: int
    settings: JobSettings
    owner: Owner | None = None


@dataclass(frozen=True, slots=True)
class Recalled:
    """What the register knew when the coordinator first heard of the job."""

    claims: tuple[Claim, ...]
    parents: Mapping[int, Version | None]


@dataclass(frozen=True, slots=True)
class HolderUp:
    """A holder answers, and this is what it has of the job."""

    holder: HolderId
    domain: str
    records: tuple[ShardRecord, ...]


@dataclass(frozen=True, slots=True)
class HolderDown:
    """A holder is dead or does not answer; its copies do not count."""

    holder: HolderId


@dataclass(frozen=True, slots=True)
class BeginAsked:
    """A rank of a new life asks from where to go on.

    Attributes:
        life: Which.
        rank: Who asks.
        world_size: Ranks of the life.
        settings: The same for all of them.
        step: Resume from this one.
        before: Resume from one before this.
        owner: Rank 0's process, whoever asks.
        takes_over: It is not asked whether a trainer of another run is there.
    """

    life: Life
    rank: int
    world_size: int
    settings: JobSettings
    step: int | None = None
    before: int | None = None
    owner: Owner | None = None
    takes_over: bool = False


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Somebody wants the job's trainers to end; answered as `life`, with AnswerBegin."""

    life: Life


@dataclass(frozen=True, slots=True)
class OwnerSought:
    """The host of an older life's rank 0 said whether that is there, or did not answer in time.

    Attributes:
        life: That wants the name.
        owner: Who had it.
        is_present: It lives, and has not ended its part. False in any doubt.
    """

    life: Life
    owner: Owner
    is_present: bool


@dataclass(frozen=True, slots=True)
class GenerationClaimed:
    """The register answered: the generation is ours, or somebody else's."""

    generation: int
    is_ours: bool


@dataclass(frozen=True, slots=True)
class DurableListed:
    """S3 was listed once, or could not be (`problem`).

    Attributes:
        versions: Steps with a manifest.
        parents: Parents of generations that S3 remembers and the cluster may not.
        newest_generation: The greatest generation that S3 knows of, 0 if none.
    """

    versions: tuple[Version, ...] = ()
    parents: Mapping[int, Version | None] = field(default_factory=dict)
    newest_generation: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class HoldersFenced:
    """Every holder that could be reached in time refuses older generations.

    Attributes:
        generation: Whose.
        silent: Those that could not; they may be gone.
    """

    generation: int
    silent: tuple[HolderId, ...] = ()


@dataclass(frozen=True, slots=True)
class ShardsVerified:
    """The copies of a version were read end to end; its manifest was read if it was needed.

    Attributes:
        generation: That asked.
        version: Which.
        bad: Copies that are corrupt or missing, as their holders say.
        unread: Copies whose holder did not answer in time: passed over, not forgotten.
        manifest: What the manifest says, if it was read.
        problem: Why the manifest is of no use.
        is_transient: The problem is that S3 did not answer: it says nothing about the step.
    """

    generation: int
    version: Version
    bad: tuple[tuple[HolderId, ShardKey], ...]
    manifest: tuple[ShardRecord, ...] | None = None
    problem: str = ""
    is_transient: bool = False
    unread: tuple[tuple[HolderId, ShardKey], ...] = ()


@dataclass(frozen=True, slots=True)
class ParentRecorded:
    """The register holds this generation's parent; its trainers may start.

    Attributes:
        generation: Whose.
        parent: What the register holds: another one than was asked for when another life of the
            coordinator was first.
    """

    generation: int
    parent: Version | None


@dataclass(frozen=True, slots=True)
class SaveAsked:
    """A rank is about to save; answered with AnswerSave, or not yet.

    Attributes:
        version: What it would save.
        is_forced: It must not be skipped: it waits for room.
    """

    version: Version
    is_forced: bool = False


@dataclass(frozen=True, slots=True)
class ShardNotStaged:
    """A rank could not stage its shard of a step, or has lost it with its holder."""

    version: Version


@dataclass(frozen=True, slots=True)
class ShardReported:
    """A holder has a shard whole and verified."""

    holder: HolderId
    record: ShardRecord


@dataclass(frozen=True, slots=True)
class RankRestored:
    """A rank of this generation has filled its state from what the generation resumed from."""

    generation: int
    rank: int


@dataclass(frozen=True, slots=True)
class CopyFoundCorrupt:
    """A holder has read its copy of a shard, and it is not what it was."""

    holder: HolderId
    key: ShardKey


@dataclass(frozen=True, slots=True)
class DurableFoundCorrupt:
    """A rank has read a step from S3, its last resort, and it is not what was saved."""

    version: Version
    rank: int


@dataclass(frozen=True, slots=True)
class ShardUploaded:
    """A rank's shard is on S3, whole."""

    version: Version
    rank: int
    record: ShardRecord


@dataclass(frozen=True, slots=True)
class UploadFailed:
    """A holder could not upload a shard."""

    version: Version
    rank: int
    holder: HolderId
    reason: str


@dataclass(frozen=True, slots=True)
class ManifestPublished:
    """The step's manifest is on S3: the step is durable."""

    version: Version
    records: tuple[ShardRecord, ...]


@dataclass(frozen=True, slots=True)
class PublishFailed:
    """The manifest could not be published; `is_final` when another try cannot help."""

    version: Version
    reason: str
    is_final: bool


@dataclass(frozen=True, slots=True)
class DurableAnswered:
    """S3 was asked whether it answers, and did, or did not (`problem`)."""

    problem: str = ""


@dataclass(frozen=True, slots=True)
class ManifestsRead:
    """What the manifests of older steps say; one that is of no use is left out."""

    manifests: Mapping[Version, tuple[ShardRecord, ...]]


@dataclass(frozen=True, slots=True)
class HostLeaving:
    """A host will go away: its copies count no more, but are still there to be copied."""

    node_id: str


@dataclass(frozen=True, slots=True)
class LinksCut:
    """Just these pairs of hosts cannot reach each other now, though all of them live."""

    pairs: frozenset[Pair]


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed."""


Event = (
    Recalled
    | HolderUp
    | HolderDown
    | BeginAsked
    | StopAsked
    | OwnerSought
    | GenerationClaimed
    | DurableListed
    | HoldersFenced
    | ShardsVerified
    | ParentRecorded
    | RankRestored
    | ShardReported
    | CopyFoundCorrupt
    | DurableFoundCorrupt
    | ShardUploaded
    | UploadFailed
    | ManifestPublished
    | PublishFailed
    | DurableAnswered
    | SaveAsked
    | ShardNotStaged
    | ManifestsRead
    | HostLeaving
    | LinksCut
    | Ticked
)


# --- commands -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SeekOwner:
    """Ask `holder` whether a trainer of its host is there; answer with OwnerSought."""

    life: Life
    owner: Owner
    holder: HolderId


@dataclass(frozen=True, slots=True)
class ClaimGeneration:
    """Create the generation in the register; answer with GenerationClaimed."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class ListDurable:
    """List S3 once; answer with DurableListed."""

    settings: JobSettings


@dataclass(frozen=True, slots=True)
class FenceHolders:
    """Tell these holders to refuse older generations; answer with HoldersFenced."""

    generation: int
    holders: tuple[HolderId, ...]


@dataclass(frozen=True, slots=True)
class FenceNewHolder:
    """Tell a holder that has just come to refuse generations older than this one."""

    generation: int
    holder: HolderId


@dataclass(frozen=True, slots=True)
class VerifyShards:
    """Have these copies read end to end, and the manifest too if asked; answer ShardsVerified."""

    generation: int
    version: Version
    copies: tuple[tuple[HolderId, tuple[ShardKey, ...]], ...]
    needs_manifest: bool


@dataclass(frozen=True, slots=True)
class RecordParent:
    """Record the parent in the register; answer with ParentRecorded."""

    generation: int
    parent: Version | None


@dataclass(frozen=True, slots=True)
class AnswerBegin:
    """The life has its answer: `Job.resolution`, or `error`."""

    life: Life
    error: TieredError | None = None


@dataclass(frozen=True, slots=True)
class SetBuddies:
    """Tell a holder where to replicate.

    Attributes:
        holder: Whom to tell.
        buddies: Where its shards go.
        counted: Holders whose copies count for the policy.
    """

    holder: HolderId
    buddies: tuple[HolderId, ...]
    counted: frozenset[HolderId]


@dataclass(frozen=True, slots=True)
class CollectBelow:
    """Tell these holders to let go of what is older than `below`, but for what is pinned.

    Attributes:
        generation: Who says so.
        below: The watermark.
        holders: Whom to tell.
        pinned: What stays although it is older, or abandoned.
        branch: The last step of each older generation that this one descends from: what those
            have beyond is abandoned, and goes too. None where that is not known.
    """

    generation: int
    below: Version
    holders: tuple[HolderId, ...]
    pinned: tuple[Version, ...] = ()
    branch: tuple[Version, ...] | None = None


@dataclass(frozen=True, slots=True)
class ReleaseCopies:
    """Tell a holder to let go of these copies: as many as the policy asks for are elsewhere."""

    generation: int
    holder: HolderId
    keys: tuple[ShardKey, ...]


@dataclass(frozen=True, slots=True)
class ReplicateShard:
    """Tell `source` to make one more copy on `to`, at so many bytes a second.

    `generation` is the newest one: who knows of a newer one refuses.
    """

    source: HolderId
    key: ShardKey
    to: HolderId
    generation: int
    bytes_per_s: int


@dataclass(frozen=True, slots=True)
class StepCommitted:
    """A step is committed: log it, wake whoever waits."""

    version: Version
    size_bytes: int
    copies: int
    is_degraded: bool


@dataclass(frozen=True, slots=True)
class UploadShard:
    """Tell `holder` to upload a shard; answer with ShardUploaded or UploadFailed."""

    holder: HolderId
    version: Version
    rank: int


@dataclass(frozen=True, slots=True)
class PublishManifest:
    """Publish the step; answer with ManifestPublished or PublishFailed."""

    version: Version
    records: tuple[ShardRecord, ...]


@dataclass(frozen=True, slots=True)
class AskDurable:
    """Ask S3 whether it answers at all: an upload hangs. Answer with DurableAnswered."""


@dataclass(frozen=True, slots=True)
class FlushGivenUp:
    """A step will not become durable; log why."""

    version: Version
    reason: str


@dataclass(frozen=True, slots=True)
class DeleteDurable:
    """Delete these steps from S3, manifests first."""

    versions: tuple[Version, ...]


@dataclass(frozen=True, slots=True)
class CollectOrphans:
    """Have what nobody will finish on S3 deleted: shards without a manifest, unfinished uploads."""


@dataclass(frozen=True, slots=True)
class ReadManifests:
    """Read these steps' manifests, for retention; answer with ManifestsRead."""

    versions: tuple[Version, ...]


@dataclass(frozen=True, slots=True)
class AnswerSave:
    """Whether the step is saved: the same answer for every rank."""

    version: Version
    admission: Admission


@dataclass(frozen=True, slots=True)
class DropStep:
    """Tell these holders to let go of a step that a newer one has taken the place of."""

    version: Version
    holders: tuple[HolderId, ...]


@dataclass(frozen=True, slots=True)
class PolicyMissed:
    """A step that is kept has fewer copies than the policy asks for: log it, once."""

    version: Version
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PolicyMet:
    """A step that had too few copies has enough again: log it."""

    version: Version
    after_s: float


FlushEvent = ShardUploaded | UploadFailed | ManifestPublished | PublishFailed | DurableAnswered
Command = (
    SeekOwner
    | ClaimGeneration
    | ListDurable
    | FenceHolders
    | VerifyShards
    | RecordParent
    | AnswerBegin
    | SetBuddies
    | CollectBelow
    | ReleaseCopies
    | ReplicateShard
    | StepCommitted
    | FenceNewHolder
    | UploadShard
    | PublishManifest
    | AskDurable
    | FlushGivenUp
    | DeleteDurable
    | CollectOrphans
    | ReadManifests
    | AnswerSave
    | DropStep
    | PolicyMissed
    | PolicyMet
)
