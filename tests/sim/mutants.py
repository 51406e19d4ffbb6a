"""Deliberately broken cores and shells: the proof that the simulator would notice.

The first thirteen are those of the specification's evidence; the others bring back defects that
the simulator found in this project. `within` is a number of seeds, from 0, of which at least one
must fail; it is generous, so that a change of the simulator does not move it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from replication import messages
from replication.inventory import Inventory
from replication.membership import Command as MembershipCommand
from replication.membership import Membership
from replication.records import HolderId, ShardKey, ShardPlan, ShardRecord, Version
from tests.sim.coordinator import Coordinator, Copies
from tests.sim.holder import Holder, digest
from tests.sim.limits import FLIP
from tests.sim.network import Outcome, Reply
from tests.sim.world import Cores, World, draw_setup
from tiered import messages as m
from tiered.eviction import Eviction
from tiered.flush import FlushQueue, HoldersOf
from tiered.generations import Begin, Generations
from tiered.history import Candidate, ShardSources
from tiered.job import Job
from tiered.repair import Repair

# --- of the specification -----------------------------------------------------------------------


class MaxOfLatest(Job):
    """VELOC: the newest version that any rank has."""

    def candidates(self) -> list[Candidate]:
        every = super().candidates()
        return [replace(c, in_memory=frozenset(range(c.world_size)), problem="") for c in every]


class KeyByStep(Job):
    """NVRx: a step is complete when every rank has it, whichever life saved it."""

    def candidates(self) -> list[Candidate]:
        every = super().candidates()
        return [
            replace(c, in_memory=frozenset().union(*(self._ranks(o) for o in self._alike(c))))
            for c in every
        ]

    def _alike(self, candidate: Candidate) -> list[Version]:
        return [v for v in sorted(self.copies) if v.step == candidate.version.step]

    def _ranks(self, version: Version) -> set[int]:
        return {rank for rank in self.copies[version] if self.intact(version, rank)}

    def sources(self, version: Version) -> tuple[ShardSources, ...]:
        merged = {}
        for other in sorted(v for v in self.copies if v.step == version.step and v != version):
            merged.update({s.record.key.rank: s for s in super().sources(other)})
        merged.update({s.record.key.rank: s for s in super().sources(version)})
        return tuple(merged[rank] for rank in sorted(merged))


class GcBeforeCommit(Eviction):
    """Versions that were merely seen push older ones out."""

    def collect(self) -> list[m.Command]:
        known, real = self.known, self.known.commits
        known.commits = {v: False for v in known.copies if v.generation == known.generation}
        commands = super().collect()
        known.commits = {v: d for v, d in real.items() if v >= known.watermark}
        return commands


class ParentCounts(Eviction):
    """What was inherited counts among what is kept, though it lacks copies."""

    def _inherited(self, generation: int) -> tuple[list[Version], set[Version]]:
        _, abandoned = super()._inherited(generation)
        older = {v for v in self.known.copies if v.generation < generation}
        return sorted(older - abandoned), abandoned


class GcUnfenced(Inventory):
    """Collection is not fenced."""

    def _collect(self, event: messages.WatermarkRaised) -> list[messages.Command]:
        fences, self.fences = self.fences, {}
        commands = super()._collect(event)
        self.fences = fences
        return commands


class StepOnlyKey(Holder):
    """A write carries no generation: it counts as the present one's."""

    def stage_chunk(self, key: ShardKey, plan: ShardPlan, index: int, content: int) -> None:
        generation = max(self.fence_seen, key.version.generation)
        version = Version(generation, key.version.step)
        super().stage_chunk(key._replace(version=version), plan, index, content)


class AckBeforeStore(Holder):
    """A buddy says that it has a chunk before it has it."""

    def take_chunk(self, offer: messages.OfferChunk, source: HolderId, reply: Reply) -> None:
        if self.core.has_chunk(offer.key, offer.index):
            reply(None)
            return
        super().take_chunk(offer, source, lambda _: None)
        self.feed(messages.ChunkFetched(offer.key, offer.plan, offer.index, offer.digest))
        reply(None)


class Evictable(Holder):
    """A buddy's copy is merely pulled: it goes when the host that it came from goes."""

    def _keep(self, offer: messages.OfferChunk, source: HolderId, outcome: Outcome) -> None:
        super()._keep(offer, source, outcome)
        self._pulled = getattr(self, "_pulled", {}) | {offer.key: source}

    def peer_died(self, peer: HolderId) -> None:
        for key, source in getattr(self, "_pulled", {}).items():
            if source == peer:
                self.chunks.get(key, {}).clear()

    def verify(self, keys: Any) -> list[ShardKey]:
        gone = [key for key in keys if not self.chunks.get(key)]
        return [*gone, *super().verify([key for key in keys if key not in gone])]


class KeepList(Holder):
    """Collection by a list of what to keep, which may be out of date when it comes."""

    def collect(
        self,
        generation: int,
        below: Version,
        keep: tuple[Version, ...],
        branch: tuple[Version, ...] | None,
    ) -> None:
        super().collect(generation, below, keep, branch)
        shards = self.core.shards
        for key in [k for k in shards if shards[k].is_sealed and k.version not in keep]:
            self.core._drop(key)
            self.world.oracle.dropped(self.id, key)
            self.chunks.pop(key, None)


class SendsKeepList(Coordinator):
    """The other half of `KeepList`."""

    def _tell(self, method: str, holder: HolderId, *args: Any) -> None:
        if method == "collect":
            args = (*args[:2], (*(v for v in self.job.copies if v >= args[1]), *args[2]), args[3])
        super()._tell(method, holder, *args)


class ParentNotDurable(Coordinator):
    """The parent stays in the coordinator's memory."""

    def _record_parent(self, command: m.RecordParent) -> None:
        begin = self.job.begin
        asked = None if begin is None else (begin.step, begin.before)
        self.world.oracle.started(command.generation, command.parent, asked)
        self.feed(m.ParentRecorded(command.generation, command.parent))


class DeleteOnFailedVerify(Coordinator):
    """SCR: a version that fails its check is deleted everywhere."""

    def verified(self, command: m.VerifyShards, bad: Copies, unread: Copies) -> None:
        if bad:
            for holder in self.world.holders.values():
                for key in [k for k in holder.core.shards if k.version == command.version]:
                    holder.core._drop(key)
                    holder.chunks.pop(key, None)
            bad = tuple((h, key) for h, keys in command.copies for key in keys)
        super().verified(command, bad, unread)


# --- of this project ----------------------------------------------------------------------------


class CommitsWhileRebuilding(Job):
    """The first inventory after the coordinator's death is a cluster of one host."""

    def handle(self, event: m.Event, now_s: float) -> list[m.Command]:
        commands = super().handle(event, now_s)
        if isinstance(event, m.Recalled):
            self.is_rebuilding = False
        return commands


class WaitsForLostUploads(FlushQueue):
    """An upload is waited for although its holder is gone."""

    def review(self, now_s: float, holders_of: HoldersOf) -> list[m.Command]:
        def with_lost(version: Version, rank: int) -> tuple[HolderId, ...]:
            under_way = self.current.under_way.get(rank) if self.current is not None else None
            holders = holders_of(version, rank)
            return (*holders, under_way) if under_way is not None else holders

        return super().review(now_s, with_lost)


class NeverReminds(Job):
    """What a holder is told once is not told again."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._remind_due_s = float("inf")


class RepairsFromTheFirst(Repair):
    """A repair that failed is tried again from the same source."""

    def repair(self, now_s: float) -> list[m.Command]:
        self._tries.clear()
        return super().repair(now_s)


class CollectedComesBack(Job):
    """What a holder that was away still has is believed to be wanted."""

    def add_copy(self, holder: HolderId, record: ShardRecord) -> None:
        mark, self.watermark = self.watermark, Version(0, 0)
        super().add_copy(holder, record)
        self.watermark = mark


class ForgetsOvertaken(Generations):
    """A life that was overtaken while it began comes back as a new one."""

    def asked(self, event: m.BeginAsked) -> list[m.Command]:
        commands = super().asked(event)
        self._overtaken.clear()
        return commands


class ClaimsOnce(Generations):
    """A generation claimed while S3 was silent is kept, whatever S3 then says."""

    def listed(self, event: m.DurableListed) -> list[m.Command]:
        if self.begin is not None and self.begin.is_claimed:
            event = replace(event, newest_generation=0, parents={})
        return super().listed(event)


class AnswersWithoutSources(Job):
    """A late rank is told the step, not where to read it."""

    def has_sources(self, version: Version | None) -> bool:
        return True


class BelievesUnread(Generations):
    """A version that was read once is believed on holders that came back since."""

    def _is_believed(self, begin: Begin, version: Version) -> bool:
        return version in begin.verified


class ForgetsLostPublication(Job):
    """A manifest whose publication was not answered is not looked for."""

    def _flush_event(self, event: m.FlushEvent, now_s: float) -> list[m.Command]:
        commands = super()._flush_event(event, now_s)
        self.unsure.clear()
        return commands


class CountsItsOwn(Eviction):
    """Nothing inherited counts among what is kept: two generations' steps are held at once."""

    def _inherited(self, generation: int) -> tuple[list[Version], set[Version]]:
        return [], super()._inherited(generation)[1]


class KeepsAbandoned(Eviction):
    """What a crash left half saved stays until enough new steps are committed."""

    def order(self, *holders: HolderId) -> m.CollectBelow:
        return replace(super().order(*holders), branch=None)


class KeepsSurplus(Repair):
    """Copies that were made up for stay when the hosts that had them are back."""

    def release(self) -> list[m.Command]:
        return []


class ReleasesAny(Repair):
    """Which copies too many go depends on how many the decider sees."""

    def _surplus(self, version: Version, rank: int) -> list[HolderId]:
        held, need = list(self.known.intact(version, rank)), self.known.copies_needed
        start = len(held) % 2
        return [h for h in held if h not in (2 * held)[start : start + need]]


class CountsLeaving(Job):
    """A copy on a host that will go away counts like any other."""

    @property
    def staying(self) -> dict[HolderId, str]:
        return self.holders


class LinksUntold(Membership):
    """A link is known to be cut at its ends alone."""

    def _note_links(self) -> list[MembershipCommand]:
        return []


class NeverScrubs(Inventory):
    """What nobody reads is never read."""

    def _scrub(self, now_s: float) -> list[messages.Command]:
        return []


class CorruptUntold(Inventory):
    """A corrupt copy is told of to whoever asked to have it read, if to anybody."""

    def _quarantine(self, key: ShardKey, index: int) -> list[messages.Command]:
        return super()._quarantine(key, index) and []

    def _remind(self, now_s: float) -> list[messages.Command]:
        return []


class CorruptToldOnce(Inventory):
    """A corrupt copy is told of once, and a report of it as whole may come later."""

    def _remind(self, now_s: float) -> list[messages.Command]:
        return []


class RefusesOldCopies(Inventory):
    """What a generation resumed from is fenced off like a zombie's write."""

    def check_copy(self, key: ShardKey, plan: ShardPlan) -> None:
        self.check_write(key, plan)


class KeepsQuarantined(Inventory):
    """A corrupt copy is in the way of a good one."""

    def has_chunk(self, key: ShardKey, index: int) -> bool:
        shard = self.shards.get(key)
        return shard is not None and index in shard.blocks


class FreesShared(Holder):
    """The bytes of a dropped shard go, whoever shares them."""

    def let_go(self, key: ShardKey) -> None:
        gone = self.chunks.get(key, {})
        super().let_go(key)
        for index, content in gone.items():
            for held in self.chunks.values():
                if held.get(index) is content:
                    del held[index]


class SharesUnread(Holder):
    """A twin is believed to be what it was when it was hashed."""

    def _read_twin(self, twin: ShardKey, index: int, read: Callable[[bytes | None], None]) -> None:
        digests = self.core.shards[twin].digests
        super()._read_twin(twin, index, lambda value: read(value and digests[index]))


class SpoilsOne(Inventory):
    """Of the shards that share corrupt bytes only one stops counting."""

    def sharers(self, key: ShardKey, index: int) -> list[ShardKey]:
        return [key]


class UploadsUnverified(Holder):
    """What is uploaded is not read first."""

    def upload(self, key: ShardKey, reply: Reply) -> None:
        with mock.patch.object(self, "verify", return_value=[]):
            super().upload(key, reply)


class SilenceIsFinal(Coordinator):
    """A manifest that S3 did not serve in time counts as one that is broken."""

    def feed(self, event: m.Event) -> None:
        if isinstance(event, m.ShardsVerified):
            event = replace(event, is_transient=False)
        super().feed(event)


class UnreadIsBad(Coordinator):
    """A copy whose holder did not answer in time counts as corrupt, for ever."""

    def verified(self, command: m.VerifyShards, bad: Copies, unread: Copies) -> None:
        super().verified(command, (*bad, *unread), ())


class CollectsUnconfirmed(Coordinator):
    """A coordinator that was replaced goes on collecting."""

    def collect(self, command: m.CollectBelow) -> None:
        self.order(command)


@dataclass(frozen=True, slots=True)
class Mutant:
    """Something broken.

    Attributes:
        cores: What replaces the real ones.
        within: One of so many seeds, from 0, must fail; None where volume is needed.
        patch: More to break, while it runs.
    """

    cores: Cores
    within: int | None
    patch: Callable[[], AbstractContextManager[Any]] = nullcontext


def with_part(name: str, part: Callable[[Job], Any]) -> Cores:
    """Cores whose job has another part under that name."""

    def broken(job_name: str) -> Job:
        job = Job(job_name)
        setattr(job, name, part(job))
        return job

    return Cores(job=broken)


def _as_saved(content: int) -> bytes:
    """The checksum that a chunk had before any bit of it flipped."""
    return digest(content % FLIP)


def _no_branch() -> AbstractContextManager[Any]:
    return mock.patch("tiered.history.is_on_branch", return_value=True)


MUTANTS: dict[str, Mutant] = {
    "max_of_latest": Mutant(Cores(job=MaxOfLatest), 20),
    "step_only_key": Mutant(Cores(holder=StepOnlyKey), 250),
    "ack_before_store": Mutant(Cores(holder=AckBeforeStore), 20),
    "parent_not_durable": Mutant(Cores(coordinator=ParentNotDurable), 20),
    "evictable_copies": Mutant(Cores(holder=Evictable), 100),
    "no_digest": Mutant(Cores(is_same=lambda have, expected: True, read=_as_saved), 50),
    "key_by_step": Mutant(Cores(job=KeyByStep), 2000),
    "no_branch_rule": Mutant(Cores(), 320, _no_branch),
    "gc_before_commit": Mutant(with_part("eviction", GcBeforeCommit), 100),
    "delete_on_failed_verify": Mutant(Cores(coordinator=DeleteOnFailedVerify), 1200),
    "gc_keep_list": Mutant(Cores(holder=KeepList, coordinator=SendsKeepList), 100),
    "parent_counts": Mutant(with_part("eviction", ParentCounts), 1500),
    "gc_unfenced": Mutant(Cores(inventory=GcUnfenced), 50),
    "counts_leaving": Mutant(Cores(job=CountsLeaving), 900),
    "links_untold": Mutant(Cores(membership=LinksUntold), 450),
    "keeps_surplus": Mutant(with_part("repair", KeepsSurplus), None),
    "releases_any": Mutant(with_part("repair", ReleasesAny), None),
    "commits_while_rebuilding": Mutant(Cores(job=CommitsWhileRebuilding), 50),
    "waits_for_lost_uploads": Mutant(with_part("flushes", lambda _: WaitsForLostUploads()), None),
    "never_reminds": Mutant(Cores(job=NeverReminds), None),
    "repairs_from_the_first": Mutant(with_part("repair", RepairsFromTheFirst), None),
    "collected_comes_back": Mutant(Cores(job=CollectedComesBack), None),
    "forgets_overtaken": Mutant(with_part("generations", ForgetsOvertaken), None),
    "claims_once": Mutant(with_part("generations", ClaimsOnce), None),
    "answers_without_sources": Mutant(Cores(job=AnswersWithoutSources), None),
    "believes_unread": Mutant(with_part("generations", BelievesUnread), None),
    "forgets_lost_publication": Mutant(Cores(job=ForgetsLostPublication), None),
    "counts_its_own": Mutant(with_part("eviction", CountsItsOwn), None),
    "keeps_abandoned": Mutant(with_part("eviction", KeepsAbandoned), None),
    "never_scrubs": Mutant(Cores(inventory=NeverScrubs), None),
    "corrupt_untold": Mutant(Cores(inventory=CorruptUntold), None),
    "corrupt_told_once": Mutant(Cores(inventory=CorruptToldOnce), None),
    "refuses_old_copies": Mutant(Cores(inventory=RefusesOldCopies), 150),
    "keeps_quarantined": Mutant(Cores(inventory=KeepsQuarantined), None),
    "frees_shared": Mutant(Cores(holder=FreesShared), 400),
    "shares_unread": Mutant(Cores(holder=SharesUnread), None),
    "spoils_one": Mutant(Cores(inventory=SpoilsOne), None),
    "uploads_unverified": Mutant(Cores(holder=UploadsUnverified), 260),
    "collects_unconfirmed": Mutant(Cores(coordinator=CollectsUnconfirmed), 100),
    "unread_is_bad": Mutant(Cores(coordinator=UnreadIsBad), None),
    "silence_is_final": Mutant(Cores(coordinator=SilenceIsFinal), None),
}


def violations_of(name: str, seed: int) -> list[str]:
    """What a mutant breaks in one small run; a crash of the cores counts."""
    mutant = MUTANTS[name]
    with mutant.patch():
        try:
            return World(seed, draw_setup(seed), mutant.cores, is_brief=True).run()
        except (AssertionError, KeyError, ValueError, RuntimeError) as error:
            return [f"crash: {error!r}"]
