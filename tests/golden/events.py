"""Every verb of a trace: a line's words into an event of a core."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from replication import membership, messages
from replication.records import HolderId, Life, Owner, ShardKey, ShardPlan, Version
from tests.golden import notation as n
from tests.golden.notation import JOB, read_chunk, read_holder, read_shard, read_version
from tiered import messages as m
from tiered.config import S3, JobSettings, Memory
from tiered.retention import KeepEvery


@dataclass(frozen=True, slots=True)
class Settings:
    """What a `settings` line may say."""

    ranks: int = 1
    chunks: int = 1
    capacity: int = 1000
    replicas: int = 1
    keep: int = 2
    every: int = 10
    in_flight: int = 2
    backpressure: str = "skip"
    strict: bool = False
    keep_every: str = ""
    s3_every: int = 0
    s3_keep: int = 2
    s3_keep_every: str = ""

    @property
    def plan(self) -> ShardPlan:
        return ShardPlan(self.ranks, (1,) * self.chunks)

    @property
    def job(self) -> JobSettings:
        memory = Memory(
            self.every, self.keep, self.replicas, strict=self.strict, in_flight=self.in_flight,
            backpressure=self.backpressure, also_keep=_keep_every(self.keep_every),  # type: ignore[arg-type]
        )  # fmt: skip
        if not self.s3_every:
            return JobSettings(memory)
        policies = _keep_every(self.s3_keep_every)
        s3 = S3("s3://bucket", every_steps=self.s3_every, keep=self.s3_keep, also_keep=policies)
        return JobSettings(memory, s3)


def _keep_every(text: str) -> tuple[KeepEvery, ...]:
    """`100x2`: multiples of 100, the newest two of them; or nothing."""
    steps, _, at_most = text.partition("x")
    return (KeepEvery(int(steps), int(at_most) if at_most else None),) if text else ()


@dataclass(frozen=True, slots=True)
class Words:
    """A line: a verb, names, and options as name=value (quoted where they have spaces)."""

    settings: Settings
    names: list[str]
    options: dict[str, str] = field(default_factory=dict)

    def one(self, name: str, default: str = "") -> str:
        return self.options.get(name, default)

    def many(self, name: str) -> list[str]:
        return [part for part in self.one(name).split(",") if part]

    def number(self, name: str) -> int | None:
        return int(self.options[name]) if name in self.options else None

    def has(self, flag: str) -> bool:
        return flag in self.names

    def chunk(self) -> tuple[ShardKey, ShardPlan, int]:
        key, index = read_chunk(self.names[0])
        return key, self.settings.plan, index


def _generation(text: str) -> int:
    return int(text.removeprefix("g"))


def _parent(text: str) -> Version | None:
    return None if text == "none" else read_version(text)


def _parents(texts: Iterable[str]) -> dict[int, Version | None]:
    pairs = (text.split(":") for text in texts)
    return {_generation(generation): _parent(parent) for generation, parent in pairs}


def _recalled(w: Words) -> m.Recalled:
    """`recalled g1:one g2:two parents=g1:none`"""
    pairs = [text.split(":") for text in w.names]
    settings = w.settings
    claims = [
        m.Claim(_generation(g), Life(life), settings.ranks, settings.job) for g, life in pairs
    ]
    return m.Recalled(tuple(claims), _parents(w.many("parents")))


def _verified(w: Words) -> m.ShardsVerified:
    """`verified g1s10 for=g2 bad=A:r0,B:r1 unread=C:r0 problem="..." transient manifest`"""
    version = read_version(w.names[0])

    def copies(name: str) -> tuple[tuple[HolderId, ShardKey], ...]:
        pairs = (text.split(":r") for text in w.many(name))
        return tuple((read_holder(h), ShardKey(JOB, version, int(r))) for h, r in pairs)

    ranks = range(w.settings.ranks) if w.has("manifest") else ()
    manifest = tuple(n.read_record(f"{w.names[0]}/r{r}", w.settings.plan) for r in ranks)
    return m.ShardsVerified(
        _generation(w.one("for")), version, copies("bad"), manifest or None,
        w.one("problem"), w.has("transient"), copies("unread"),
    )  # fmt: skip


def _listed(w: Words) -> m.DurableListed:
    versions = tuple(map(read_version, w.names))
    parents = _parents(w.many("parents"))
    return m.DurableListed(versions, parents, w.number("newest") or 0, w.one("problem"))


def _records(w: Words, version: str) -> tuple[m.ShardRecord, ...]:
    return tuple(n.read_record(f"{version}/r{r}", w.settings.plan) for r in range(w.settings.ranks))


def _manifest(w: Words) -> m.ManifestPublished:
    return m.ManifestPublished(read_version(w.names[0]), _records(w, w.names[0]))


def _up(w: Words) -> m.HolderUp:
    records = tuple(n.read_record(text, w.settings.plan) for text in w.many("has"))
    return m.HolderUp(read_holder(w.names[0]), w.one("domain"), records)


def _begin(w: Words) -> m.BeginAsked:
    rank, ranks = w.number("rank") or 0, w.number("ranks") or w.settings.ranks
    step, before = w.number("step"), w.number("before")
    return m.BeginAsked(
        Life(w.names[0]), rank, ranks, w.settings.job, step, before, _owner(w), w.has("over")
    )


def _owner(w: Words) -> Owner | None:
    """`by=batch/7 at=A`: process 7 of the run `batch`, on host A."""
    run, _, pid = w.one("by").partition("/")
    host = w.one("at")
    return Owner(run, host, f"host-{host}", int(pid), 0.0, "mark") if run else None


def _sought(w: Words) -> m.OwnerSought:
    """`sought batch/7 at=A for=two present`"""
    run, _, pid = w.names[0].partition("/")
    host = w.one("at")
    found = Owner(run, host, f"host-{host}", int(pid), 0.0, "mark")
    return m.OwnerSought(Life(w.one("for")), found, w.has("present"))


def _report(w: Words) -> m.ShardReported:
    is_replica = w.has("replica")
    return m.ShardReported(
        read_holder(w.names[0]), n.read_record(w.names[1], w.settings.plan, is_replica=is_replica)
    )


def _uploaded(w: Words) -> m.ShardUploaded:
    record = n.read_record(w.names[0], w.settings.plan)
    return m.ShardUploaded(record.key.version, record.key.rank, record)


def _version_and_rank(w: Words) -> tuple[Version, int]:
    key = read_shard(w.names[0])
    return key.version, key.rank


def _upload_failed(w: Words) -> m.UploadFailed:
    key = read_shard(w.names[0])
    return m.UploadFailed(key.version, key.rank, read_holder(w.one("on")), w.one("why"))


OF_JOB: dict[str, Callable[[Words], m.Event]] = {
    "recalled": _recalled,
    "up": _up,
    "down": lambda w: m.HolderDown(read_holder(w.names[0])),
    "leaving": lambda w: m.HostLeaving(w.names[0]),
    "begin": _begin,
    "sought": _sought,
    "stop": lambda w: m.StopAsked(Life(w.names[0])),
    "claimed": lambda w: m.GenerationClaimed(_generation(w.names[0]), not w.has("by-another")),
    "listed": _listed,
    "fenced": lambda w: m.HoldersFenced(_generation(w.names[0])),
    "verified": _verified,
    "recorded": lambda w: m.ParentRecorded(_generation(w.names[0]), _parent(w.one("parent"))),
    "asks": lambda w: m.SaveAsked(read_version(w.names[0]), w.has("force")),
    "not-staged": lambda w: m.ShardNotStaged(read_version(w.names[0])),
    "has-read": lambda w: m.RankRestored(_generation(w.names[0]), int(w.names[1])),
    "report": _report,
    "corrupt": lambda w: m.CopyFoundCorrupt(read_holder(w.names[0]), read_shard(w.names[1])),
    "rotten": lambda w: m.DurableFoundCorrupt(*_version_and_rank(w)),
    "uploaded": _uploaded,
    "upload-failed": _upload_failed,
    "published": _manifest,
    "publish-failed": lambda w: m.PublishFailed(
        read_version(w.names[0]), w.one("why"), w.has("final")
    ),
    "s3-answered": lambda w: m.DurableAnswered(w.one("problem")),
    "manifests": lambda w: m.ManifestsRead({read_version(v): _records(w, v) for v in w.names}),
    "cut": lambda w: m.LinksCut(frozenset(tuple(text.split("-")) for text in w.names)),
    "tick": lambda w: m.Ticked(),
}  # fmt: skip

OF_HOLDER: dict[str, Callable[[Words], messages.Event]] = {
    "staged": lambda w: messages.ChunkStaged(*w.chunk()),
    "hashed": lambda w: messages.ChunkHashed(*_digested(w)),
    "fetched": lambda w: messages.ChunkFetched(*w.chunk(), _digested(w)[2]),
    "taken": lambda w: messages.ChunkTaken(read_holder(w.one("by")), *read_chunk(w.names[0])),
    "refused": lambda w: messages.ChunkNotTaken(read_holder(w.one("by")), *read_chunk(w.names[0])),
    "buddies": lambda w: messages.BuddiesChanged(JOB, tuple(map(read_holder, w.names))),
    "copy": lambda w: messages.ReplicationRequested(
        read_shard(w.names[0]), read_holder(w.one("to")), read_shard(w.names[0]).version.generation
    ),
    "fence": lambda w: messages.FenceRaised(JOB, _generation(w.names[0])),
    "collect": lambda w: messages.WatermarkRaised(
        JOB, _generation(w.one("by")), read_version(w.names[0]),
        tuple(map(read_version, w.many("not"))),
        tuple(map(read_version, w.many("beyond"))) if "beyond" in w.options else None,
    ),
    "drop": lambda w: messages.StepDropped(JOB, read_version(w.names[0])),
    "corrupt": lambda w: messages.ChunkFoundCorrupt(read_shard(w.names[0]), 0),
    "known": lambda w: messages.ChunkKnown(read_shard(w.names[0])),
    "read": lambda w: messages.ChunkRead(
        *read_chunk(w.names[0]), b"" if w.has("bad") else _digested(w)[2]
    ),
    "forget": lambda w: messages.JobForgotten(JOB),
    "tick": lambda w: messages.Ticked(),
}  # fmt: skip


def _digested(w: Words) -> tuple[ShardKey, int, bytes]:
    key, index = read_chunk(w.names[0])
    return key, index, n.chunk_digest(key, index)


def _nodes(w: Words) -> membership.NodesSeen:
    return membership.NodesSeen(tuple(membership.Node(name, "", 0) for name in w.names))


OF_MEMBERSHIP: dict[str, Callable[[Words], membership.Event]] = {
    "seen": _nodes,
    "answered": lambda w: membership.Answered(
        read_holder(w.names[0]), frozenset(map(read_holder, w.many("not")))
    ),
    "missed": lambda w: membership.Missed(w.names[0], w.has("dead")),
}
