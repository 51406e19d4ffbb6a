"""The core of the coordinator, one per job: generations, commit, resolve, retention.

Rules (the specification's names in brackets; docs/ARCHITECTURE.md tells the story):
    1. A generation is claimed in the register before it is used [F1], holders are fenced [F2], and
       its parent is recorded before any rank is answered [F3]. All ranks of one life get that one
       answer, however often and however late they ask.
    2. A step is committed when every rank's shard is whole on its own host and on as many others
       as the policy asks for, by the holders' own word, with the same checksum everywhere. With
       fewer hosts alive than that, what there is counts, and the step is marked degraded.
    3. Memory below the `keep`-th newest step is collected, counting those committed *in this
       generation* and, of those that it has inherited, whole ones that were committed, or that
       are replicated now; a mark that only rises, so order does not matter. What is being flushed,
       or kept by a retention policy, is pinned below it until it is released, once. What older
       generations left beyond the step that this one resumed from is on no branch any more: half
       steps go at once, whole ones when this generation has committed a step of its own.
    4. What is known (`tiered.catalogue`) is a cache, rebuilt after the coordinator's death from the
       register, the holders' inventories and S3's listing.
    5. A shard of a step that is still needed with fewer copies than the policy asks for is
       copied again, from whichever holder has it, newest step first, at a bounded rate.
    6. Whether a step is saved while others are on their way is answered once, for all ranks.

`handle` takes an event and returns commands; no I/O, no clock but `now_s`.
"""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import assert_never

from replication.errors import FencedError, PlacementError, TieredError
from replication.placement import Placement, place
from replication.records import HolderId, Life, ShardKey, ShardRecord, Version
from tiered import messages as m
from tiered.admission import Admission, Admissions
from tiered.catalogue import Catalogue, Degraded
from tiered.config import Memory
from tiered.errors import ConfigError, DurableStoreError, StepNotFoundError, WorldSizeError
from tiered.history import (
    Choice,
    branch_ends,
    is_on_branch,
    latest_consistent_step,
)
from tiered.retention import kept_by

REPAIR_BASE_S = 60.0
REPAIR_BYTES_PER_S = 20e6  # slower than this counts as lost
REPAIRS_AT_ONCE = 8
REMIND_S = 15.0  # what holders were told once is told again: a message may have been lost


@dataclass(slots=True)
class Begin:
    """A generation on its way from claim to answer."""

    claim: m.Claim
    step: int | None
    before: int | None
    is_claimed: bool = False
    is_fenced: bool = False
    is_listing: bool = False
    is_recorded: bool = False  # it has its parent; only where to read that is asked again
    s3_problem: str = ""
    verified: set[Version] = field(default_factory=set)
    is_reading: bool = False
    being_read: set[tuple[HolderId, ShardKey]] = field(default_factory=set)
    intact: set[tuple[HolderId, ShardKey]] = field(default_factory=set)
    unreadable: list[str] = field(default_factory=list)
    set_aside: list[tuple[HolderId, ShardRecord]] = field(default_factory=list)
    choice: Choice | None = None


class Job(Catalogue):
    """What the coordinator decides about one job. Not thread-safe."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.buddies: dict[HolderId, tuple[HolderId, ...]] = {}
        self.begin: Begin | None = None
        self.placement: Placement | None = None
        self._durable_problem: str | None = "S3 was not listed yet"
        self._rotten: set[Version] = set()  # on S3, and not what was saved
        self._oldest_claimable = 1
        self._pinned: set[Version] = set()
        self._retained: frozenset[Version] = frozenset()
        self._facts_asked: set[Version] = set()
        self._spared: set[Version] = set()  # abandoned, and whole
        self._collected_by = 0  # the generation that last ordered a collection
        self._is_rebuilding = False
        self._found: set[Version] = set()  # when the inventories were in, and not committed
        self._overtaken: dict[Life, m.Claim] = {}
        self._repairs: dict[tuple[ShardKey, HolderId], float] = {}
        self._repair_tries: dict[ShardKey, int] = {}
        self._repair_free_s: dict[str, float] = {}  # by host: when it may send for repair again
        self._remind_due_s = 0.0

    @property
    def durable_problem(self) -> str:
        """Why it is not known what S3 has; empty when it is."""
        return self._durable_problem or ""

    # -- events ------------------------------------------------------------------------------

    def handle(self, event: m.Event, now_s: float) -> list[m.Command]:
        """Take one event; return what has to be done because of it."""
        match event:
            case m.Recalled():
                self.claims.update({c.generation: c for c in event.claims})
                self.parents.update(event.parents)
                self._is_rebuilding = bool(event.claims)
                return []
            case m.HolderUp():
                return self._holder_up(event, now_s)
            case m.HolderDown():
                self.holders.pop(event.holder, None)
                return [*self._rearrange(), *self._review(now_s)]
            case m.BeginAsked():
                return self._begin_asked(event)
            case m.GenerationClaimed():
                return self._claimed(event)
            case m.DurableListed():
                return self._durable_listed(event)
            case m.HoldersFenced():
                if self.begin is None or event.generation != self.begin.claim.generation:
                    return []
                self.begin.is_fenced = True
                return self._choose()
            case m.ShardsVerified():
                return self._verified(event)
            case m.ParentRecorded():
                return self._started(event, now_s)
            case m.ShardReported():
                return self._reported(event, now_s)
            case m.DurableFoundCorrupt():  # the next life resumes from an older one
                self._rotten.add(event.version)
                self.durable.discard(event.version)
                return []
            case m.CopyFoundCorrupt():
                self._drop_copy(event.holder, event.key)
                return self._repair(now_s)
            case m.ShardUploaded() | m.UploadFailed() | m.ManifestPublished() | m.PublishFailed():
                return self._flush_event(event, now_s)
            case m.SaveAsked():
                return self._save_asked(event, now_s)
            case m.ManifestsRead():
                self.manifests.update(event.manifests)
                return self._collect_durable()
            case m.HostLeaving():
                return self._leaving(event, now_s)
            case m.Ticked():
                return self._ticked(event, now_s)
            case _:
                assert_never(event)

    def _ticked(self, event: m.Ticked, now_s: float) -> list[m.Command]:
        if self._is_rebuilding:
            self._is_rebuilding = False
            self._found = {v for v in self.copies if v.generation == self.generation}
            return [*self._rearrange(), *self._review(now_s)]
        commands = [*self._repair(now_s), *self._note_degraded(now_s)]
        commands += self.flushes.handle(event, now_s, self._holders_of)
        if now_s >= self._remind_due_s and self.claims:
            self._remind_due_s = now_s + REMIND_S
            for holder in sorted(self.holders):
                commands += self._remind(holder)
                if (mates := self.buddies.get(holder)) is not None:
                    commands.append(m.SetBuddies(holder, mates))
        return commands

    def _remind(self, holder: HolderId) -> list[m.Command]:
        """Tell a holder what it may have missed; telling it again changes nothing."""
        commands: list[m.Command] = [m.FenceNewHolder(self.generation, holder)]
        if self._collected_by == self.generation:
            commands.append(self._order_collection(holder))
        return commands

    # -- begin: claim, fence, list, choose, verify, record, answer ---------------------------

    def _begin_asked(self, event: m.BeginAsked) -> list[m.Command]:
        lives = {claim.life: claim for claim in self.claims.values()} | self._overtaken
        if self.begin is not None:
            lives[self.begin.claim.life] = self.begin.claim
        if (known := lives.get(event.life)) is not None:
            return self._asked_again(event, known)
        replicas = event.settings.memory.replicas
        if not self.claims and replicas is not None and replicas >= self.hosts:
            return [m.AnswerBegin(event.life, PlacementError(replicas, self.hosts))]
        overtaken = self.begin
        newest = self.generation if overtaken is None else overtaken.claim.generation
        generation = max(newest + 1, self.generation + 1, self._oldest_claimable)
        claim = m.Claim(generation, event.life, event.world_size, event.settings)
        self.begin = Begin(claim, event.step, event.before)
        commands: list[m.Command] = []
        if overtaken is not None:
            self._put_back(overtaken)
            old = overtaken.claim
            self._overtaken[old.life] = old
            fenced = FencedError(self.name, old.generation, claim.generation)
            commands.append(m.AnswerBegin(old.life, fenced))
        listing = self._list_durable()
        return [*commands, *(listing or [m.ClaimGeneration(claim)])]

    def _asked_again(self, event: m.BeginAsked, known: m.Claim) -> list[m.Command]:
        """A life asks that has a claim: every rank of it does, some of them late."""
        if error := self._disagreement(known, event):
            return [m.AnswerBegin(event.life, error)]
        begin, newest = self.begin, self.generation
        if begin is not None:
            if begin.claim.life == event.life:
                return []  # on its way
            newest = max(newest, begin.claim.generation)
        if known.generation < newest:
            error = FencedError(self.name, known.generation, newest)
            return [m.AnswerBegin(event.life, error)]
        is_recorded = known.generation in self.parents
        if is_recorded and self._has_sources(self.parents[known.generation]):
            return [m.AnswerBegin(event.life)]
        # A coordinator died before it could answer everybody: go on from there.
        self.begin = Begin(
            known, event.step, event.before, is_claimed=True, is_recorded=is_recorded
        )
        listing = self._list_durable()
        if not is_recorded:
            return [*listing, *self._fence()]
        self.begin.is_fenced = True
        return listing or self._choose()

    def _has_sources(self, version: Version | None) -> bool:
        """Whether it is known where to read each rank's shard of this version."""
        shards = () if version is None else self.sources(version)
        return version is None or (bool(shards) and len(shards) == shards[0].record.plan.world_size)

    def _list_durable(self) -> list[m.Command]:
        """Have S3 listed, unless it was: it may know newer steps, and newer generations."""
        assert self.begin is not None
        settings = self.begin.claim.settings
        is_known = self._durable_problem is None and not self.flushes.publishing
        if settings.s3 is None or is_known:
            return []
        self.begin.is_listing = True
        return [m.ListDurable(settings)]

    def _disagreement(self, known: m.Claim, event: m.BeginAsked) -> TieredError | None:
        if event.world_size != known.world_size:
            where = f"generation {known.generation} of job {self.name!r}"
            return WorldSizeError(event.world_size, known.world_size, where)
        if event.settings != known.settings:
            return ConfigError(
                f"rank {event.rank} has other settings than the rank that began generation "
                f"{known.generation} of job {self.name!r}: {event.settings} and {known.settings}; "
                "give every rank the same"
            )
        return None

    def _durable_listed(self, event: m.DurableListed) -> list[m.Command]:
        self._durable_problem = event.problem or None
        self.durable |= set(event.versions) - self._rotten
        self.parents = {**event.parents, **self.parents}
        newest = max([event.newest_generation, *event.parents])  # S3 may have missed a claim
        self._oldest_claimable = max(self._oldest_claimable, newest + 1)
        begin = self.begin
        if begin is None:
            return []
        was_listing, begin.is_listing = begin.is_listing, False
        generation = begin.claim.generation
        if not begin.is_recorded and newest >= generation:
            # It may have been claimed while S3 was silent, and this be another cluster's of that
            # number, with a parent of its own. A number that nobody has costs nothing.
            begin.is_claimed = begin.is_fenced = begin.is_reading = False
            generation = self._oldest_claimable
        elif not was_listing:
            return []
        elif begin.is_claimed:
            return self._choose()
        generation = max(generation, self._oldest_claimable)
        begin.claim = replace(begin.claim, generation=generation)
        return [m.ClaimGeneration(begin.claim)]

    def _claimed(self, event: m.GenerationClaimed) -> list[m.Command]:
        begin = self.begin
        if begin is None or event.generation != begin.claim.generation:
            return []
        claim = begin.claim
        if not event.is_ours:  # another coordinator's: take the next one
            self._oldest_claimable = event.generation + 1
            begin.claim = m.Claim(
                event.generation + 1, claim.life, claim.world_size, claim.settings
            )
            return [m.ClaimGeneration(begin.claim)]
        begin.is_claimed = True
        self.claims[claim.generation] = claim
        self.admissions = Admissions()
        return self._fence()

    def _fence(self) -> list[m.Command]:
        assert self.begin is not None
        generation = self.begin.claim.generation
        return [m.FenceHolders(generation, tuple(sorted(self.holders)))]

    def _choose(self) -> list[m.Command]:
        """Take the newest consistent step; have it verified before it is believed."""
        begin = self.begin
        if begin is None or not begin.is_claimed or not begin.is_fenced:
            return []
        if begin.is_listing or begin.is_reading:
            return []
        if begin.is_recorded:
            return self._find_sources(begin)
        candidates = self.candidates()
        if begin.s3_problem:  # what only S3 has cannot be had now, and is not given up either
            candidates = [replace(c, is_durable=False) for c in candidates]
        choice = latest_consistent_step(
            candidates, self.parents, step=begin.step, before=begin.before
        )
        generation, version = begin.claim.generation, choice.version
        notes = [*begin.unreadable, *choice.passed_over]
        s3, problem = begin.claim.settings.s3, begin.s3_problem or self._durable_problem
        if s3 is not None and problem is not None:
            # It may well have a newer step than what is known: starting afresh, or from an older
            # step that only S3 has, would abandon that.
            if version is None or not (begin.step is not None or self._is_in_memory(version)):
                return self._refuse(DurableStoreError(s3.uri, "reading the index", problem))
            notes.append(f"steps on S3: {problem}")
        begin.choice = Choice(version, tuple(notes))
        if version is None and (begin.step is not None or begin.before is not None):
            wanted = f"a step before {begin.before}" if begin.step is None else f"step {begin.step}"
            return self._refuse(StepNotFoundError(self.name, wanted, tuple(notes)))
        if version is None or self._is_believed(begin, version):
            return [m.RecordParent(generation, version)]
        copies: dict[HolderId, list[ShardKey]] = {}
        ranks = self.copies.get(version, {})
        for rank in sorted(ranks):
            for holder in self.intact(version, rank):
                copies.setdefault(holder, []).append(ShardKey(self.name, version, rank))
        needs_manifest = version in self.durable and not self._is_in_memory(version)
        begin.is_reading = True
        begin.being_read = {(h, key) for h, keys in copies.items() for key in keys}
        by_holder = tuple((h, tuple(keys)) for h, keys in sorted(copies.items()))
        return [m.VerifyShards(generation, version, by_holder, needs_manifest)]

    def _is_in_memory(self, version: Version) -> bool:
        candidate = next(c for c in self.candidates() if c.version == version)
        return 0 < candidate.world_size == len(candidate.in_memory)

    def _is_believed(self, begin: Begin, version: Version) -> bool:
        """Whether a copy of each rank's shard was read whole, or S3 has the step.

        A copy on a holder that came back while others were being read was not read itself.
        """
        if version not in begin.verified or (version in self.durable and not begin.s3_problem):
            return version in begin.verified
        return all(
            any((h, r.key) in begin.intact for h, r in self.intact(version, rank).items())
            for rank in self.copies[version]
        )

    def _find_sources(self, begin: Begin) -> list[m.Command]:
        """Answer a late rank whose parent is recorded; read the parent's manifest if need be."""
        generation, s3 = begin.claim.generation, begin.claim.settings.s3
        version = self.parents[generation]
        problem = begin.s3_problem or self._durable_problem
        if version is None or self._has_sources(version) or version in begin.verified:
            if s3 is not None and problem and not self._has_sources(version):
                return self._refuse(DurableStoreError(s3.uri, "reading a manifest", problem))
            self.begin = None
            return [m.AnswerBegin(begin.claim.life)]
        return [m.VerifyShards(generation, version, (), needs_manifest=True)]

    def _refuse(self, error: TieredError) -> list[m.Command]:
        assert self.begin is not None
        self._put_back(self.begin)
        life, self.begin = self.begin.claim.life, None
        return [m.AnswerBegin(life, error)]

    def _put_back(self, begin: Begin) -> None:
        """Copies that a begin could not have read in time may be as good as ever."""
        for holder, record in begin.set_aside:
            if holder in self.holders:
                self._add_copy(holder, record)

    def _verified(self, event: m.ShardsVerified) -> list[m.Command]:
        begin = self.begin
        if begin is None or event.generation != begin.claim.generation:
            return []
        for holder, key in event.bad:
            self._drop_copy(holder, key)
            begin.unreadable.append(f"{key}: the copy on host {holder.node_id[:8]} is corrupt")
        for holder, key in event.unread:
            held = self.copies.get(key.version, {}).get(key.rank, {})
            if (record := held.pop(holder, None)) is not None:
                begin.set_aside.append((holder, record))
            begin.unreadable.append(f"{key}: host {holder.node_id[:8]} did not read its copy")
        if event.manifest is not None:
            self.manifests[event.version] = event.manifest
        elif event.problem:  # S3 cannot serve the step; memory still may. Nothing is deleted.
            if event.is_transient:
                begin.s3_problem = event.problem
            else:
                self.durable.discard(event.version)
            begin.unreadable.append(f"{event.version} on S3: {event.problem}")
        begin.is_reading = False
        begin.verified.add(event.version)
        begin.intact |= begin.being_read - set(event.bad) - set(event.unread)
        return self._choose()

    def _started(self, event: m.ParentRecorded, now_s: float) -> list[m.Command]:
        begin = self.begin
        if begin is None or begin.claim.generation != event.generation or begin.choice is None:
            return []
        self._put_back(begin)
        self.begin = None
        self.parents[event.generation] = event.parent
        if event.parent != begin.choice.version:  # another life of the coordinator was first
            self.begin, begin.is_recorded = begin, True
            begin.verified.clear()
            return [*self._rearrange(), *self._choose()]
        self.passed_over[event.generation] = begin.choice.passed_over
        commands = [*self._rearrange(), *self._repair(now_s), *self._collect()]
        version, s3 = begin.choice.version, begin.claim.settings.s3
        is_on_s3 = version in self.durable or (s3 is not None and self._durable_problem is not None)
        if is_on_s3 and not self._has_sources(version):
            # A copy went since it was read. S3 has it, its manifest says where; or it may have it.
            self.begin, begin.is_recorded = begin, True
            begin.verified.clear()
            return [*commands, *self._choose()]
        return [*commands, m.AnswerBegin(begin.claim.life)]

    # -- holders and placement ---------------------------------------------------------------

    def _holder_up(self, event: m.HolderUp, now_s: float) -> list[m.Command]:
        self.holders[event.holder] = event.domain
        for ranks in self.copies.values():
            for holders in ranks.values():
                holders.pop(event.holder, None)
        for record in event.records:
            self._add_copy(event.holder, record)
        commands = self._remind(event.holder) if self.claims else []
        self.buddies.pop(event.holder, None)  # whatever it was told, tell it again
        return [*commands, *self._rearrange(), *self._review(now_s)]

    def _rearrange(self) -> list[m.Command]:
        """Choose buddies anew; tell those holders whose buddies changed."""
        if not self.claims or self._is_rebuilding:
            return []
        by_node = {h.node_id: h for h in self.holders}
        self.placement = place(self.placed_hosts, self.replicas, self.placement)
        commands: list[m.Command] = []
        buddies = {
            holder: tuple(by_node[n] for n in self._buddies_of(node_id))
            for node_id, holder in by_node.items()
        }
        for holder, mates in sorted(buddies.items()):
            if self.buddies.get(holder) != mates:
                commands.append(m.SetBuddies(holder, mates))
        self.buddies = buddies
        return commands

    def _buddies_of(self, node_id: str) -> tuple[str, ...]:
        """Where a host's shards go; all copies of a leaving host's are elsewhere."""
        assert self.placement is not None
        staying = sorted(h.node_id for h in self.staying)
        if node_id in staying:
            return self.placement.buddies(node_id)
        first = bisect.bisect(staying, node_id)
        return tuple((staying[first:] + staying[:first])[: self.copies_needed])

    def _leaving(self, event: m.HostLeaving, now_s: float) -> list[m.Command]:
        """Copy what a host has to others, and flush the newest step: more may go at once."""
        if event.node_id in self.leaving:
            return []
        self.leaving.add(event.node_id)
        commands = [*self._rearrange(), *self._review(now_s)]
        newest = max((v for v in self.commits if v.generation == self.generation), default=None)
        s3 = None if self.settings is None else self.settings.s3
        if newest is None or s3 is None or newest in {*self.durable, *self.flushes.versions}:
            return commands
        ranks = range(len(self.copies[newest]))
        return [*commands, *self.flushes.add(newest, ranks, now_s, self._holders_of)]

    # -- admit, commit, collect, flush, repair -----------------------------------------------

    def _save_asked(self, event: m.SaveAsked, now_s: float) -> list[m.Command]:
        version, settings = event.version, self.settings
        if settings is None or version.generation != self.generation:
            return []
        memory, current, step = settings.memory, self.generation, version.step
        mine = [v for v in self.copies if v.generation == current]
        is_news = not self.admissions.is_answered(step)
        answer: Admission | None
        if version in mine:  # some rank was admitted, by a coordinator that has died since
            answer = self.admissions.admit(step, now_s)
        elif problem := self.too_few_hosts:
            answer = self.admissions.refuse(step, problem, now_s)
        else:
            answer = self.admissions.ask(
                step,
                "wait" if event.is_forced else memory.backpressure,
                memory.in_flight,
                {v.step for v in self.commits if v.generation == current},
                {v.step for v in mine if self._has_replica(v)},
                {v.step for v in mine if self._is_whole(v)},
                now_s,
            )
        if answer is None:
            return []
        gone = [Version(current, s) for s in answer.instead_of] if is_news else []
        for dropped in gone:
            self.copies.pop(dropped, None)
        holders = tuple(sorted(self.holders))
        return [*(m.DropStep(v, holders) for v in gone), m.AnswerSave(version, answer)]

    def _has_replica(self, version: Version) -> bool:
        ranks = self.copies[version].values()
        return any(record.is_replica for held in ranks for record in held.values())

    def _add_copy(self, holder: HolderId, record: ShardRecord) -> None:
        key = record.key
        if key.version < self.watermark and key.version not in self._pinned:
            return  # a holder that was away still has it; it is told to let go
        is_current = key.version.generation == self.generation
        if is_current and key.version.step in self.admissions.replaced:
            return
        held = self.copies.setdefault(key.version, {}).setdefault(key.rank, {})
        other = next((r for h, r in held.items() if h in self.holders), None)
        if other is None or other.digests == record.digests:
            held[holder] = record

    def _drop_copy(self, holder: HolderId, key: ShardKey) -> None:
        """A corrupt copy counts no more, nor will it when a begin is over."""
        self.copies.get(key.version, {}).get(key.rank, {}).pop(holder, None)
        if (begin := self.begin) is not None:
            begin.set_aside = [(h, r) for h, r in begin.set_aside if (h, r.key) != (holder, key)]

    def _reported(self, event: m.ShardReported, now_s: float) -> list[m.Command]:
        if event.holder not in self.holders:
            return []  # its inventory will tell when it is back
        self._add_copy(event.holder, event.record)
        return self._review(now_s, only=event.record.key.version)

    def _review(self, now_s: float, only: Version | None = None) -> list[m.Command]:
        """Commit what has become whole, and move on what waited for it.

        Not while the inventories come in after the coordinator's death: the first of them alone
        looks like a cluster of one host, where one copy is all that can be asked for.
        """
        commands: list[m.Command] = []
        if self._is_rebuilding:
            return commands
        generation = self.generation
        versions = [only] if only is not None else sorted(self.copies)
        for version in versions:
            is_current = version.generation == generation
            if is_current and version not in self.commits and self._is_replicated(version):
                commands += self._commit(version, now_s)
        commands += self._collect()
        if only in self.degraded:
            commands += self._note_degraded(now_s)
        if only is None:
            commands += [*self._repair(now_s), *self._note_degraded(now_s)]
            commands += self.flushes.review(now_s, self._holders_of)
        return commands

    def _note_degraded(self, now_s: float) -> list[m.Command]:
        """Keep track of kept steps with too few copies; tell when one begins or ends to be so."""
        commands: list[m.Command] = []
        kept = set(self.needed_versions())
        for version in sorted(kept | self.degraded.keys()):
            ranks = self.short_ranks(version) if version in kept else ()
            known = self.degraded.get(version)
            if ranks:
                if known is None:
                    commands.append(m.PolicyMissed(version, ranks))
                since_s = now_s if known is None else known.since_s
                self.degraded[version] = Degraded(version, ranks, since_s)
            elif known is not None:
                del self.degraded[version]
                if version in kept:
                    commands.append(m.PolicyMet(version, now_s - known.since_s))
        return commands

    def _is_replicated(self, version: Version) -> bool:
        return self._is_whole(version, self.copies_needed)

    def _is_whole(self, version: Version, need: int = 1) -> bool:
        """Whether each rank's shard has as many copies, on live hosts."""
        ranks = self.copies.get(version, {})
        record = next((r for rs in ranks.values() for r in rs.values()), None)
        if record is None:
            return False
        held = (ranks.get(rank, ()) for rank in range(record.plan.world_size))
        return all(len({h.node_id for h in hs if h in self.holders}) >= need for hs in held)

    def _commit(self, version: Version, now_s: float) -> list[m.Command]:
        is_degraded = self.copies_needed < 1 + self.replicas
        self.commits[version] = is_degraded
        self.admissions.settle(version.step)
        size = sum(s.record.plan.size_bytes for s in self.sources(version))
        commands: list[m.Command] = [
            m.StepCommitted(version, size, self.copies_needed, is_degraded)
        ]
        settings = self.settings
        if version not in self.durable and settings and settings.is_due_for_s3(version.step):
            ranks = range(len(self.copies[version]))
            commands += self.flushes.add(version, ranks, now_s, self._holders_of)
        return commands

    def _collect(self) -> list[m.Command]:
        settings, generation = self.settings, self.generation
        if settings is None or generation not in self.parents or self._is_rebuilding:
            return []
        keep = settings.memory.keep
        kept = sorted(v for v in self.commits if v.generation == generation)[-keep:]
        abandoned, self._spared = set[Version](), set()
        if (missing := keep - len(kept)) > 0:
            inherited, abandoned = self._inherited(generation)
            if not kept:
                self._spared = {v for v in abandoned if v in self.commits or self._is_whole(v)}
            kept = [*inherited[-missing:], *kept]
        mark = max(self.watermark, kept[0]) if len(kept) == keep else self.watermark
        self._retained = self._kept_in_memory(settings.memory)
        below = {v for v in self._retained if v < mark}
        pinned = {*self.flushes.versions, *self._spared, *below}
        is_new = mark > self.watermark or self._collected_by != generation
        if not is_new and not self._pinned - pinned:
            return []
        self.watermark, self._pinned, self._collected_by = mark, pinned, generation
        gone = {v for v in self.copies if v < mark or v in abandoned} - pinned
        self.copies = {v: ranks for v, ranks in self.copies.items() if v not in gone}
        self.commits = {v: d for v, d in self.commits.items() if v >= mark or v in pinned}
        self._repair_tries = {k: n for k, n in self._repair_tries.items() if k.version >= mark}
        return [self._order_collection(*sorted(self.holders))]

    def _order_collection(self, *holders: HolderId) -> m.CollectBelow:
        pinned = tuple(sorted(self._pinned))
        branch = branch_ends(self.parents, self.watermark)
        return m.CollectBelow(self.generation, self.watermark, holders, pinned, branch)

    def _inherited(self, generation: int) -> tuple[list[Version], set[Version]]:
        """Older generations' steps that count among those to keep; and those on no branch."""
        older = {v for v in self.copies if v.generation < generation}
        on_branch = {v for v in older if is_on_branch(v, self.parents)}
        need = self.copies_needed
        counted = (v for v in on_branch if self._is_whole(v, 1 if v in self.commits else need))
        return sorted(counted), older - on_branch

    def _kept_in_memory(self, memory: Memory) -> frozenset[Version]:
        """Versions that retention policies keep: committed, or whole and of an older generation."""
        if not memory.also_keep:
            return frozenset()
        whole = [
            c.version
            for c in self.candidates()
            if 0 < c.world_size == len(c.in_memory)
            and (c.version in self.commits or c.version.generation < self.generation)
            and is_on_branch(c.version, self.parents)
        ]
        return kept_by(memory.also_keep, [self.saved_step(v) for v in whole])

    def _holders_of(self, version: Version, rank: int) -> tuple[HolderId, ...]:
        return tuple(self.intact(version, rank))

    def _flush_event(self, event: m.FlushEvent, now_s: float) -> list[m.Command]:
        commands: list[m.Command] = []
        if isinstance(event, m.ManifestPublished):
            self.durable.add(event.version)
            self.manifests[event.version] = event.records
            commands += self._collect_durable()
        elif isinstance(event, m.PublishFailed):  # it may be there although nobody said so
            self._durable_problem = event.reason
        commands += self.flushes.handle(event, now_s, self._holders_of)
        return [*commands, *self._collect()]

    def _collect_durable(self) -> list[m.Command]:
        """On S3, too, what is older than the `keep`-th newest step of the branch goes.

        But for what policies keep; what those must know of a step may have to be read first. Not
        while a life begins: it may be about to resume from an older step on purpose.
        """
        settings = self.settings
        if settings is None or settings.s3 is None or self.begin is not None:
            return []
        on_branch = sorted(v for v in self.durable if is_on_branch(v, self.parents))
        keep = settings.s3.keep
        if keep is None or len(on_branch) <= keep:
            return []
        mark, policies = on_branch[-keep], settings.s3.also_keep
        steps = [self.saved_step(v) for v in on_branch]
        unknown = {s.version for s in steps if s.metrics is None} - self._facts_asked
        if unknown and any(policy.needs_facts for policy in policies):
            self._facts_asked |= unknown
            return [m.ReadManifests(tuple(sorted(unknown)))]
        kept = kept_by(policies, steps)
        gone = tuple(sorted(v for v in self.durable if v < mark and v not in kept))
        if not gone:
            return []
        self.durable -= set(gone)
        for version in gone:
            self.manifests.pop(version, None)
        return [m.DeleteDurable(gone)]

    def needed_versions(self) -> Iterable[Version]:
        """Versions whose shards are worth repairing: committed ones, and the branch's newest.

        After the coordinator's death a step that was committed, and has lost a copy, looks as if
        it never had been.
        """
        generation = self.generation
        parent = self.parents.get(generation)
        kept = {v for v in self.commits if v.generation == generation}
        self._found -= kept
        kept.update([v for v in sorted(self._found) if self._is_whole(v)][-1:])
        kept |= self._retained
        return sorted(kept | ({parent} if parent is not None else set()), reverse=True)

    def _repair(self, now_s: float) -> list[m.Command]:
        """Ask for one more copy of each shard that has too few, newest step first."""
        commands: list[m.Command] = []
        need = self.copies_needed
        if self._repairs:
            self._repairs = {
                (key, to): due
                for (key, to), due in self._repairs.items()
                if due > now_s and to in self.holders
            }
        for version in self.needed_versions():
            for rank in sorted(self.copies.get(version, {})):
                if len(self.copies_of(version, rank)) < need:
                    commands += self._repair_shard(version, rank, now_s)
        return commands

    def _repair_shard(self, version: Version, rank: int, now_s: float) -> list[m.Command]:
        """Ask for the missing copies of one shard, from hosts that have sent little lately."""
        commands: list[m.Command] = []
        settings, key = self.settings, ShardKey(self.name, version, rank)
        held, counted = self.intact(version, rank), self.copies_of(version, rank)
        under_way = {to.node_id for k, to in self._repairs if k == key}
        missing = self.copies_needed - len(counted | under_way)
        if not held or missing <= 0 or settings is None:
            return []
        tries = self._repair_tries.get(key, 0)  # the first one's copy may be corrupt
        source = list(held)[tries % len(held)]
        size_bytes = held[source].plan.size_bytes
        there = {h.node_id for h in held} | under_way
        mates = [*self.buddies.get(source, ()), *sorted(self.staying)]
        for target in dict.fromkeys(mates):
            free_s = max(now_s, self._repair_free_s.get(source.node_id, 0.0))
            if missing <= 0 or len(self._repairs) >= REPAIRS_AT_ONCE or free_s > now_s:
                break
            if target.node_id in there or target.node_id in self.leaving:
                continue
            self._repairs[key, target] = now_s + REPAIR_BASE_S + size_bytes / REPAIR_BYTES_PER_S
            self._repair_tries[key] = tries + 1
            busy_s = size_bytes / settings.memory.repair_bytes_per_s
            self._repair_free_s[source.node_id] = now_s + busy_s
            commands.append(m.ReplicateShard(source, key, target))
            missing -= 1
        return commands
