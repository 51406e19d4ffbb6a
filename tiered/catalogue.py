"""What the coordinator knows about one job, and the questions that can be asked of it.

A cache: holders' inventories are the truth about memory, manifests about S3, the register about
generations. `tiered.job` fills it from events and decides.
"""

from dataclasses import dataclass

from replication.errors import FencedError
from replication.placement import Host
from replication.records import HolderId, ShardRecord, Version
from tiered import messages as m
from tiered.admission import Admissions
from tiered.config import JobSettings
from tiered.flush import FlushQueue
from tiered.history import Candidate, Choice, Resolution, ShardSources, latest_consistent_step
from tiered.retention import SavedStep


@dataclass(frozen=True, slots=True)
class Degraded:
    """A kept step with fewer copies than the policy asks for.

    Attributes:
        version: Which.
        ranks: Whose shards have too few copies.
        since_s: Since when, on the coordinator's monotonic clock.
    """

    version: Version
    ranks: tuple[int, ...]
    since_s: float


class Catalogue:
    """Generations, holders, copies, commits and durable steps of one job."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.claims: dict[int, m.Claim] = {}
        self.parents: dict[int, Version | None] = {}
        self.passed_over: dict[int, tuple[str, ...]] = {}
        self.holders: dict[HolderId, str] = {}
        self.copies: dict[Version, dict[int, dict[HolderId, ShardRecord]]] = {}
        self.commits: dict[Version, bool] = {}  # -> is_degraded
        self.durable: set[Version] = set()
        self.manifests: dict[Version, tuple[ShardRecord, ...]] = {}
        self.watermark = Version(0, 0)
        self.flushes = FlushQueue()
        self.admissions = Admissions()
        self.leaving: set[str] = set()
        self.degraded: dict[Version, Degraded] = {}

    @property
    def generation(self) -> int:
        """The newest claimed generation, 0 before the first."""
        return max(self.claims, default=0)

    @property
    def settings(self) -> JobSettings | None:
        """The settings of the newest claimed generation."""
        return self.claims[max(self.claims)].settings if self.claims else None

    @property
    def staying(self) -> dict[HolderId, str]:
        """Live holders on hosts that nobody said would go away; all, if all will."""
        if not self.leaving:
            return self.holders
        staying = {h: d for h, d in self.holders.items() if h.node_id not in self.leaving}
        return staying or self.holders

    @property
    def hosts(self) -> int:
        """Live hosts with a holder that will stay."""
        return len({h.node_id for h in self.staying})

    @property
    def placed_hosts(self) -> list[Host]:
        """Those hosts with their failure domains."""
        return [Host(h.node_id, domain) for h, domain in sorted(self.staying.items())]

    @property
    def replicas(self) -> int:
        """Copies on other hosts that the policy asks for; resolves the default."""
        settings = self.settings
        if settings is None or settings.memory.replicas is None:
            return min(1, max(0, self.hosts - 1))
        return settings.memory.replicas

    @property
    def copies_needed(self) -> int:
        """Copies that commit a shard: what the policy asks for, or as many as hosts live."""
        need = 1 + self.replicas
        if self.settings is not None and self.settings.memory.strict:
            return need
        return max(1, min(need, self.hosts))

    @property
    def too_few_hosts(self) -> str:
        """Why a strict policy cannot be met now, or nothing."""
        if self.hosts >= self.copies_needed:
            return ""
        return (
            f"replicas={self.replicas} needs {1 + self.replicas} hosts and {self.hosts} live; add "
            "hosts, or accept fewer copies for a while with Memory(strict=False)"
        )

    def intact(self, version: Version, rank: int) -> dict[HolderId, ShardRecord]:
        """The copies of a shard that count: on live holders, all with the same checksum."""
        records = self.copies.get(version, {}).get(rank, {})
        return {h: records[h] for h in sorted(records) if h in self.holders}

    def copies_of(self, version: Version, rank: int) -> set[str]:
        """Hosts whose copy of a shard counts for the policy."""
        staying, held = self.staying, self.copies.get(version, {}).get(rank, {})
        return {h.node_id for h in held if h in staying}

    def short_ranks(self, version: Version) -> tuple[int, ...]:
        """Ranks of a step with fewer copies than the policy asks for, with hosts or without."""
        need = 1 + self.replicas
        ranks = self.copies.get(version, {})
        return tuple(r for r in sorted(ranks) if len(self.copies_of(version, r)) < need)

    def is_last_keeper(self, node_id: str) -> bool:
        """Whether a host, which may not answer now, has the only copy of a shard in memory."""
        return any(
            not self.intact(version, rank) and any(h.node_id == node_id for h in held)
            for version, ranks in self.copies.items()
            for rank, held in ranks.items()
        )

    def saved_step(self, version: Version) -> SavedStep:
        """What retention may know of a step: the word of its lowest rank."""
        records = [
            r for _, held in sorted(self.copies.get(version, {}).items())[:1] for r in held.values()
        ]
        records += self.manifests.get(version, ())[:1]
        if not records:
            return SavedStep(version, saved_s=None, metrics=None)
        plan = records[0].plan
        return SavedStep(version, plan.saved_s, dict(plan.metrics))

    def stored_before(self, version: Version, rank: int) -> ShardRecord | None:
        """A rank's shard of the newest other step on S3, as far as its manifest is known."""
        known = [v for v in self.durable if v != version and v in self.manifests]
        records = self.manifests[max(known)] if known else ()
        return records[rank] if rank < len(records) else None

    def candidates(self) -> list[Candidate]:
        """Everything that any tier knows of."""
        found = []
        for version in self.copies.keys() | self.durable:
            ranks = self.copies.get(version, {})
            worlds = {r.plan.world_size for rs in ranks.values() for r in rs.values()}
            problem = ""
            if len(worlds) > 1:
                problem = f"its shards disagree on the world size ({sorted(worlds)})"
            in_memory = frozenset(rank for rank in ranks if self.intact(version, rank))
            is_durable = version in self.durable
            world_size = max(worlds, default=0)
            found.append(Candidate(version, world_size, in_memory, is_durable, problem))
        return found

    def resolve(self, step: int | None = None, before: int | None = None) -> Choice:
        """The latest consistent step as far as is known now; changes nothing."""
        return latest_consistent_step(self.candidates(), self.parents, step=step, before=before)

    def resolution(self, generation: int | None = None) -> Resolution:
        """The answer of a generation that has begun; its sources are as of now."""
        generation = self.generation if generation is None else generation
        version = self.parents[generation]
        passed_over = self.passed_over.get(generation, ())
        shards = self.sources(version) if version is not None else ()
        return Resolution(generation, version, shards, passed_over, self.copies_needed)

    def sources(self, version: Version) -> tuple[ShardSources, ...]:
        """Where each rank's shard of `version` can be read, in rank order."""
        manifest = {r.key.rank: r for r in self.manifests.get(version, ())}
        sources = []
        for rank in sorted(self.copies.get(version, {}).keys() | manifest.keys()):
            held = self.intact(version, rank)
            record = manifest.get(rank) or next(iter(held.values()), None)
            if record is not None:
                is_durable = version in self.durable
                replicas = frozenset(h for h, r in held.items() if r.is_replica)
                sources.append(ShardSources(record, tuple(held), is_durable, replicas))
        return tuple(sources)

    def level(self, version: Version) -> tuple[m.Level | None, str]:
        """How safe a step is, and why it will get no safer (empty while it still may)."""
        if version in self.durable:
            return "durable", ""
        if version.generation < self.generation:
            reached: m.Level | None = "replicated" if version in self.commits else None
            return reached, str(FencedError(self.name, version.generation, self.generation))
        if version in self.commits or version in self.flushes.given_up:
            return "replicated", self.flushes.given_up.get(version, "")
        if (newer := self.admissions.replaced.get(version.step)) is not None:
            return None, f"step {newer} took its place before it was replicated"
        if problem := self.too_few_hosts:
            return None, problem
        if version < self.watermark:
            return None, "newer steps were committed before every shard of it was replicated"
        return None, ""
