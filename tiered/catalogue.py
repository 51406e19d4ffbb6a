"""What the coordinator knows about one job, and the questions that can be asked of it.

A cache: holders' inventories are the truth about memory, manifests about S3, the register about
generations. `tiered.job` fills it from events; the cores around it (`tiered.generations`,
`tiered.eviction`, `tiered.repair`) share it, and decide.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from replication.detour import Pair, pair
from replication.errors import FencedError
from replication.placement import Host, Placement
from replication.records import HolderId, ShardKey, ShardRecord, Version
from tiered import messages as m
from tiered.admission import Admissions
from tiered.config import JobSettings
from tiered.flush import FlushQueue
from tiered.history import Candidate, Choice, Resolution, ShardSources, latest_consistent_step
from tiered.retention import SavedStep

STOP = "stop-"  # so begins the name of a life that never starts: it ends the ones before


@dataclass(frozen=True, slots=True)
class Degraded:
    """A kept step with fewer copies than the policy asks for.

    Attributes:
        version: Which.
        ranks: Whose shards have too few copies.
        since_s: Since when, on the coordinator's monotonic clock.
        why: What keeps it from being whole, for a person; empty if nothing is known to.
    """

    version: Version
    ranks: tuple[int, ...]
    since_s: float
    why: str = ""


class Catalogue:
    """Generations, holders, copies, commits and durable steps of one job."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.claims: dict[int, m.Claim] = {}
        self.generation = 0  # the newest claimed; 0 before the first
        self.parents: dict[int, Version | None] = {}
        self.passed_over: dict[int, tuple[str, ...]] = {}
        self.holders: dict[HolderId, str] = {}
        self.silent: frozenset[HolderId] = frozenset()  # at the newest fence: gone, perhaps
        self.copies: dict[Version, dict[int, dict[HolderId, ShardRecord]]] = {}
        self.commits: dict[Version, bool] = {}  # -> is_degraded
        self.committed_s: float | None = None  # when something was, but for what was found
        self.durable: set[Version] = set()
        self.manifests: dict[Version, tuple[ShardRecord, ...]] = {}
        self.rotten: set[Version] = set()  # on S3, and not what was saved
        self.durable_problem: str | None = "S3 was not listed yet"
        self.unsure: set[Version] = set()  # published perhaps: S3 did not answer
        self.watermark = Version(0, 0)
        self.pinned: set[Version] = set()  # below it, and not let go of
        self.retained: frozenset[Version] = frozenset()  # kept by policies
        self.flushes = FlushQueue()
        self.admissions = Admissions()
        self.placement: Placement | None = None
        self.buddies: dict[HolderId, tuple[HolderId, ...]] = {}
        self.leaving: set[str] = set()
        self.cut: frozenset[Pair] = frozenset()  # hosts that cannot reach each other
        self.degraded: dict[Version, Degraded] = {}
        self.is_rebuilding = False  # the inventories are coming in
        self.found: set[Version] = set()  # when they were in, and not committed since
        self._set_aside: list[tuple[HolderId, ShardRecord]] = []

    @property
    def is_stopped(self) -> bool:
        """Whether somebody has stopped the job, and nobody has begun since."""
        return bool(self.claims) and self.claims[self.generation].life.startswith(STOP)

    @property
    def settings(self) -> JobSettings | None:
        """The settings of the newest claimed generation."""
        newest = self.claims.get(self.generation)
        return None if newest is None else newest.settings

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

    def copies_that_commit(self, version: Version, rank: int) -> int:
        """Copies that commit a shard: fewer where links are cut, and its writer has few buddies."""
        need, settings = self.copies_needed, self.settings
        if not self.cut or settings is None or settings.memory.strict:
            return need
        held = self.intact(version, rank)
        writers = (h for h, record in held.items() if not record.is_replica)
        return min([need, *(1 + len(self.buddies[h]) for h in writers if h in self.buddies)])

    def can_reach(self, one: HolderId, other: HolderId) -> bool:
        """Whether no cut link is known between two hosts."""
        return pair(one.node_id, other.node_id) not in self.cut

    @property
    def why_short(self) -> str:
        """Why some shards have fewer copies than the policy asks for, as far as is known."""
        if self.hosts < 1 + self.replicas:
            return f"replicas={self.replicas} needs {1 + self.replicas} hosts, {self.hosts} live"
        return "; ".join(
            f"hosts {one[:8]} and {other[:8]} cannot reach each other"
            for one, other in sorted(self.cut)[:3]
        )

    @property
    def too_few_hosts(self) -> str:
        """Why a strict policy cannot be met now, or nothing."""
        if self.hosts >= self.copies_needed:
            strict = self.settings is not None and self.settings.memory.strict
            is_short = any(len(self.buddies.get(h, ())) < self.replicas for h in self.staying)
            if not (strict and self.cut and is_short):
                return ""
            return (
                f"{self.why_short}; mend that, or accept fewer copies for a while with "
                "Memory(strict=False)"
            )
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

    def is_whole(self, version: Version, need: int = 1) -> bool:
        """Whether each rank's shard has as many copies, on live hosts."""
        ranks = self.copies.get(version, {})
        record = next((r for rs in ranks.values() for r in rs.values()), None)
        if record is None:
            return False
        held = (ranks.get(rank, ()) for rank in range(record.plan.world_size))
        return all(len({h.node_id for h in hs if h in self.holders}) >= need for hs in held)

    def is_replicated(self, version: Version) -> bool:
        """Whether each rank's shard has as many copies as commit it."""
        if not self.cut:
            return self.is_whole(version, self.copies_needed)
        ranks = self.copies.get(version, {})
        return self.is_whole(version) and all(
            len({h.node_id for h in self.intact(version, rank)})
            >= self.copies_that_commit(version, rank)
            for rank in ranks
        )

    def has_replica(self, version: Version) -> bool:
        """Whether a shard of the step has arrived on a buddy."""
        ranks = self.copies[version].values()
        return any(record.is_replica for held in ranks for record in held.values())

    def needs_listing(self) -> bool:
        """Whether S3 may have a step that neither memory has, nor anybody here knows of."""
        unanswered = self.flushes.publishing | self.unsure
        return self.durable_problem is not None or not all(map(self.is_whole, unanswered))

    def has_sources(self, version: Version | None) -> bool:
        """Whether it is known where to read each rank's shard of this version."""
        shards = () if version is None else self.sources(version)
        return version is None or (bool(shards) and len(shards) == shards[0].record.plan.world_size)

    def holders_of(self, version: Version, rank: int) -> tuple[HolderId, ...]:
        """Who has a copy of a shard that counts."""
        return tuple(self.intact(version, rank))

    def needed_versions(self) -> Iterable[Version]:
        """Versions whose shards are worth repairing: committed ones, and the branch's newest.

        Of the newest generation that has started: one that is claimed, and was refused, may wait
        for its next try for long. After the coordinator's death a step that was committed, and has
        lost a copy, looks as if it never had been.
        """
        started = max(self.parents, default=0)
        parent = self.parents.get(started)
        kept = {v for v in self.commits if v.generation == started}
        kept.update([v for v in sorted(self.found) if self.is_whole(v)][-1:])
        kept |= self.retained
        return sorted(kept | ({parent} if parent is not None else set()), reverse=True)

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
        gone = self.rotten - self.copies.keys() - self.durable
        return [*found, *(Candidate(v, 0, problem="S3 has not what was saved") for v in gone)]

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
        """Where each rank's shard of `version` can be read, in rank order.

        Holders that did not answer the newest fence come last: they may be gone with their hosts.
        """
        manifest = {r.key.rank: r for r in self.manifests.get(version, ())}
        sources = []
        for rank in sorted(self.copies.get(version, {}).keys() | manifest.keys()):
            held = self.intact(version, rank)
            record = manifest.get(rank) or next(iter(held.values()), None)
            if record is not None:
                is_durable = version in self.durable
                replicas = frozenset(h for h, r in held.items() if r.is_replica)
                holders = tuple(sorted(held, key=lambda h: (h in self.silent, h)))
                sources.append(ShardSources(record, holders, is_durable, replicas))
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

    # -- claims, and copies, come and go ---------------------------------------------------------

    def add_claim(self, claim: m.Claim) -> None:
        """A generation has an owner."""
        self.claims[claim.generation] = claim
        self.generation = max(self.generation, claim.generation)

    def add_copy(self, holder: HolderId, record: ShardRecord) -> None:
        """A holder has a shard; one that is not wanted any more, or differs, counts as nothing."""
        key = record.key
        if key.version < self.watermark and key.version not in self.pinned:
            return  # a holder that was away still has it; it is told to let go
        is_current = key.version.generation == self.generation
        if is_current and key.version.step in self.admissions.replaced:
            return
        held = self.copies.setdefault(key.version, {}).setdefault(key.rank, {})
        other = next((r for h, r in held.items() if h in self.holders), None)
        if other is None or other.digests == record.digests:
            held[holder] = record

    def drop_copy(self, holder: HolderId, key: ShardKey) -> None:
        """A corrupt copy counts no more, nor when those that were set aside are put back."""
        self.copies.get(key.version, {}).get(key.rank, {}).pop(holder, None)
        self._set_aside = [(h, r) for h, r in self._set_aside if (h, r.key) != (holder, key)]

    def set_aside(self, holder: HolderId, key: ShardKey) -> None:
        """A copy could not be read in time: until `put_back` it does not count."""
        held = self.copies.get(key.version, {}).get(key.rank, {})
        if (record := held.pop(holder, None)) is not None:
            self._set_aside.append((holder, record))

    def put_back(self) -> None:
        """What could not be read in time may be as good as ever."""
        copies, self._set_aside = self._set_aside, []
        for holder, record in copies:
            if holder in self.holders:
                self.add_copy(holder, record)
