"""The core of a begin: how one life of the job gets its generation, and the step it resumes from.

Rules (the specification's names in brackets):
    1. A generation is claimed in the register before it is used [F1], holders are fenced [F2], and
       its parent is recorded before any rank is answered [F3].
    2. All ranks of one life get that one answer, however often and however late they ask, from
       whichever life of the coordinator. A life that another one has overtaken is refused.
    3. A life of another run does not take the name from a trainer that is there: it is refused. A
       trainer that does not answer, for whatever reason, is fenced off: recovery waits for nobody.
    4. A job is stopped by a generation that never starts: whoever trains is fenced off by it.
    5. A step is chosen from what holders and S3 are known to have, and believed only after a copy
       of each shard was read end to end. The others are read when that one is not intact: who
       restores checks what it reads, and a new life would wait for hosts that read everything.

The order is: seek the owner, list S3, claim, fence, choose, verify, record, answer. `tiered.job`
hands each event to the method of its name; one of a begin that is over changes nothing.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

from replication.errors import FencedError, PlacementError, TieredError
from replication.records import HolderId, Life, Owner, ShardKey, Version
from tiered import messages as m
from tiered.admission import Admissions
from tiered.catalogue import Catalogue
from tiered.errors import (
    ConfigError,
    DurableStoreError,
    NameInUseError,
    StepNotFoundError,
    WorldSizeError,
)
from tiered.history import Choice, latest_consistent_step


@dataclass(slots=True)
class Begin:
    """A generation on its way from claim to answer."""

    claim: m.Claim
    step: int | None
    before: int | None
    is_claimed: bool = False
    is_fenced: bool = False
    is_listing: bool = False
    has_listed: bool = False
    is_stop: bool = False  # nobody is to train in it: over once older generations are fenced off
    is_recorded: bool = False  # it has its parent; only where to read that is asked again
    s3_problem: str = ""
    verified: set[Version] = field(default_factory=set)
    is_reading: bool = False
    being_read: set[tuple[HolderId, ShardKey]] = field(default_factory=set)
    intact: set[tuple[HolderId, ShardKey]] = field(default_factory=set)
    unreadable: list[str] = field(default_factory=list)
    choice: Choice | None = None


class Generations:
    """Begins the generations of one job, one at a time."""

    def __init__(self, known: Catalogue) -> None:
        self.known = known
        self.begin: Begin | None = None
        self._overtaken: dict[Life, m.Claim] = {}
        self._oldest_claimable = 1
        self._seeking: dict[Life, m.BeginAsked] = {}
        self._gone: set[Owner] = set()
        self._refused: dict[Life, NameInUseError] = {}

    def asked(self, event: m.BeginAsked) -> list[m.Command]:
        """A rank of a life asks; the first one sets everything off, the others wait."""
        known = self.known
        lives = {claim.life: claim for claim in known.claims.values()} | self._overtaken
        if self.begin is not None:
            lives[self.begin.claim.life] = self.begin.claim
        if (claim := lives.get(event.life)) is not None:
            return self._asked_again(event, claim)
        replicas = event.settings.memory.replicas
        if not known.claims and replicas is not None and replicas >= known.hosts:
            return [m.AnswerBegin(event.life, PlacementError(replicas, known.hosts))]
        if (error := self._refused.get(event.life)) is not None:
            return [m.AnswerBegin(event.life, error)]
        if event.life in self._seeking:
            return []
        if (seek := self._seek(event)) is not None:
            self._seeking[event.life] = event
            return [seek]
        return self._claim_next(event)

    def _seek(self, event: m.BeginAsked) -> m.SeekOwner | None:
        """Have it looked for whoever has the name, unless this life succeeds it anyway."""
        known, claim = self.known, None
        if self.begin is not None:
            claim = self.begin.claim
        elif known.claims:
            claim = known.claims[known.generation]
        if claim is None or claim.owner is None or event.owner is None or event.takes_over:
            return None
        owner = claim.owner
        if event.owner.succeeds(owner) or owner in self._gone:
            return None
        holder = next((h for h in known.holders if h.node_id == owner.node_id), None)
        return None if holder is None else m.SeekOwner(event.life, owner, holder)

    def sought(self, event: m.OwnerSought) -> list[m.Command]:
        """Whoever has the name was looked for."""
        asked = self._seeking.pop(event.life, None)
        if asked is None:
            return []
        if not event.is_present:
            self._gone.add(event.owner)
            return self.asked(asked)
        owner = event.owner
        error = NameInUseError(self.known.name, owner.run, owner.host, owner.pid, owner.since_s)
        self._refused[event.life] = error
        return [m.AnswerBegin(event.life, error)]

    def _claim_next(self, event: m.BeginAsked) -> list[m.Command]:
        """A life that nobody stands in the way of: list S3 or claim the next generation."""
        generation, commands = self._overtake()
        claim = m.Claim(generation, event.life, event.world_size, event.settings, event.owner)
        self.begin = Begin(claim, event.step, event.before)
        listing = self._list_durable()
        return [*commands, *(listing or [m.ClaimGeneration(claim)])]

    def stop(self, event: m.StopAsked) -> list[m.Command]:
        """Fence off everything that trains; what is asked again is on its way, or done again."""
        if self.begin is not None and self.begin.claim.life == event.life:
            return []
        if not self.known.claims:
            return [m.AnswerBegin(event.life)]
        newest = self.known.claims[self.known.generation]
        generation, commands = self._overtake()
        claim = m.Claim(generation, event.life, newest.world_size, newest.settings)
        self.begin = Begin(claim, None, None, is_stop=True)
        return [*commands, m.ClaimGeneration(claim)]

    def _overtake(self) -> tuple[int, list[m.Command]]:
        """The next generation to claim; the life that is about to have one is refused."""
        known = self.known
        overtaken = self.begin
        newest = known.generation if overtaken is None else overtaken.claim.generation
        generation = max(newest + 1, known.generation + 1, self._oldest_claimable)
        if overtaken is None:
            return generation, []
        known.put_back()
        old = overtaken.claim
        self._overtaken[old.life] = old
        fenced = FencedError(known.name, old.generation, generation)
        return generation, [m.AnswerBegin(old.life, fenced)]

    def _asked_again(self, event: m.BeginAsked, claim: m.Claim) -> list[m.Command]:
        """A life asks that has a claim: every rank of it does, some of them late."""
        known = self.known
        if error := self._disagreement(claim, event):
            return [m.AnswerBegin(event.life, error)]
        begin, newest = self.begin, known.generation
        if begin is not None:
            if begin.claim.life == event.life:
                return []  # on its way
            newest = max(newest, begin.claim.generation)
        if claim.generation < newest:
            error = FencedError(known.name, claim.generation, newest)
            return [m.AnswerBegin(event.life, error)]
        is_recorded = claim.generation in known.parents
        if is_recorded and known.has_sources(known.parents[claim.generation]):
            return [m.AnswerBegin(event.life)]
        # A coordinator died before it could answer everybody: go on from there.
        self.begin = Begin(
            claim, event.step, event.before, is_claimed=True, is_recorded=is_recorded
        )
        listing = self._list_durable()
        if not is_recorded:
            return [*listing, *self._fence()]
        self.begin.is_fenced = True
        return listing or self._choose()

    def _list_durable(self) -> list[m.Command]:
        """Have S3 listed, unless it was: it may know newer steps, and newer generations."""
        begin = self.begin
        assert begin is not None
        settings = begin.claim.settings
        if settings.s3 is None or not self.known.needs_listing():
            return []
        begin.is_listing = begin.has_listed = True
        return [m.ListDurable(settings)]

    def _disagreement(self, claim: m.Claim, event: m.BeginAsked) -> TieredError | None:
        if event.world_size != claim.world_size:
            where = f"generation {claim.generation} of job {self.known.name!r}"
            return WorldSizeError(event.world_size, claim.world_size, where)
        if event.settings != claim.settings:
            return ConfigError(
                f"rank {event.rank} has other settings than the rank that began generation "
                f"{claim.generation} of job {self.known.name!r}: {event.settings} and "
                f"{claim.settings}; give every rank the same"
            )
        return None

    def listed(self, event: m.DurableListed) -> list[m.Command]:
        """S3 was listed: it may know newer generations than the cluster does."""
        known = self.known
        known.durable_problem = event.problem or None
        if not event.problem:
            known.unsure.clear()
        known.durable |= set(event.versions) - known.rotten
        known.parents = {**event.parents, **known.parents}
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
        elif not was_listing:
            return []
        elif begin.is_claimed:
            return self._choose()
        generation = max(generation, self._oldest_claimable)
        begin.claim = replace(begin.claim, generation=generation)
        return [m.ClaimGeneration(begin.claim)]

    def claimed(self, event: m.GenerationClaimed) -> list[m.Command]:
        """The register has this generation as ours, or as another coordinator's."""
        begin = self.begin
        if begin is None or event.generation != begin.claim.generation:
            return []
        claim = begin.claim
        if not event.is_ours:  # another coordinator's: take the next one
            self._oldest_claimable = event.generation + 1
            begin.claim = replace(claim, generation=event.generation + 1)
            return [m.ClaimGeneration(begin.claim)]
        begin.is_claimed = True
        self.known.add_claim(claim)
        self.known.admissions = Admissions()
        return self._fence()

    def fenced(self, event: m.HoldersFenced) -> list[m.Command]:
        """Holders refuse older generations; those that did not answer are no danger."""
        if self.begin is None or event.generation != self.begin.claim.generation:
            return []
        self.begin.is_fenced, self.known.silent = True, frozenset(event.silent)
        if self.begin.is_stop:
            life, self.begin = self.begin.claim.life, None
            return [m.AnswerBegin(life)]
        return self._choose()

    def _fence(self) -> list[m.Command]:
        assert self.begin is not None
        generation = self.begin.claim.generation
        return [m.FenceHolders(generation, tuple(sorted(self.known.holders)))]

    def _choose(self) -> list[m.Command]:
        """Take the newest consistent step; have it verified before it is believed."""
        known = self.known
        begin = self.begin
        if begin is None or not begin.is_claimed or not begin.is_fenced:
            return []
        if begin.is_listing or begin.is_reading:
            return []
        if begin.is_recorded:
            return self._find_sources(begin)
        candidates = known.candidates()
        if begin.s3_problem:  # what only S3 has cannot be had now, and is not given up either
            candidates = [replace(c, is_durable=False) for c in candidates]
        choice = latest_consistent_step(
            candidates, known.parents, step=begin.step, before=begin.before
        )
        generation, version = begin.claim.generation, choice.version
        notes = [*begin.unreadable, *choice.passed_over]
        s3, problem = begin.claim.settings.s3, begin.s3_problem or known.durable_problem
        if s3 is not None and problem is not None:
            # It may well have a newer step than what is known: starting afresh, or from an older
            # step that only S3 has, would abandon that.
            if version is None or not (begin.step is not None or known.is_whole(version)):
                return self._refuse(DurableStoreError(s3.uri, "reading the index", problem))
            notes.append(f"steps on S3: {problem}")
        begin.choice = Choice(version, tuple(notes))
        if version is None and (begin.step is not None or begin.before is not None):
            wanted = f"a step before {begin.before}" if begin.step is None else f"step {begin.step}"
            return self._refuse(StepNotFoundError(known.name, wanted, tuple(notes)))
        if version is None or self._is_believed(begin, version):
            return [m.RecordParent(generation, version)]
        needs_manifest = version in known.durable and not known.is_whole(version)
        copies = self._copies_to_read(begin, version)
        begin.is_reading = True
        begin.being_read = {(h, key) for h, keys in copies.items() for key in keys}
        by_holder = tuple((h, tuple(keys)) for h, keys in sorted(copies.items()))
        return [m.VerifyShards(generation, version, by_holder, needs_manifest)]

    def _copies_to_read(self, begin: Begin, version: Version) -> dict[HolderId, list[ShardKey]]:
        """One copy of each shard of which none was read yet, spread over the holders."""
        known = self.known
        copies: dict[HolderId, list[ShardKey]] = {}
        load_bytes = Counter[HolderId]()
        for rank in sorted(known.copies.get(version, {})):
            key, held = ShardKey(known.name, version, rank), known.intact(version, rank)
            if not held or any((holder, key) in begin.intact for holder in held):
                continue
            reader = min(
                held,
                key=lambda h: (h in known.silent, load_bytes[h], held[h].is_replica, h),
            )
            copies.setdefault(reader, []).append(key)
            load_bytes[reader] += held[reader].plan.size_bytes
        return copies

    def _is_believed(self, begin: Begin, version: Version) -> bool:
        """Whether a copy of each rank's shard was read whole, or S3 has the step.

        A copy on a holder that came back while others were being read was not read itself.
        """
        known = self.known
        if version not in begin.verified or (version in known.durable and not begin.s3_problem):
            return version in begin.verified
        return all(
            any((h, r.key) in begin.intact for h, r in known.intact(version, rank).items())
            for rank in known.copies[version]
        )

    def _find_sources(self, begin: Begin) -> list[m.Command]:
        """Answer a late rank whose parent is recorded; read the parent's manifest if need be."""
        known = self.known
        generation, s3 = begin.claim.generation, begin.claim.settings.s3
        version = known.parents[generation]
        problem = begin.s3_problem or known.durable_problem
        if version is None or known.has_sources(version):
            self.begin = None
            return [m.AnswerBegin(begin.claim.life)]
        if version in begin.verified:
            if s3 is not None and problem:
                return self._refuse(DurableStoreError(s3.uri, "reading a manifest", problem))
            return self._refuse(self._lost(begin, version))
        return [m.VerifyShards(generation, version, (), needs_manifest=True)]

    def _lost(self, begin: Begin, version: Version) -> TieredError:
        """What a generation resumed from went before every rank was told where it is."""
        where = {s.record.key.rank for s in self.known.sources(version)}
        ranks = [str(rank) for rank in range(begin.claim.world_size) if rank not in where]
        wanted = f"{version}, from which generation {begin.claim.generation} resumes,"
        left = f"no copy of rank {', '.join(ranks)} is left that can be read; start the job again: "
        note = left + "its next generation resumes from what is whole then"
        return StepNotFoundError(self.known.name, wanted, (note, *begin.unreadable))

    def _refuse(self, error: TieredError) -> list[m.Command]:
        assert self.begin is not None
        self.known.put_back()
        life, self.begin = self.begin.claim.life, None
        return [m.AnswerBegin(life, error)]

    def found_corrupt(self, event: m.CopyFoundCorrupt) -> None:
        """A copy counts no more. What its host reports later is another one, which nobody read."""
        self.known.drop_copy(event.holder, event.key)
        if self.begin is not None:
            self.begin.being_read.discard((event.holder, event.key))

    def verified(self, event: m.ShardsVerified) -> list[m.Command]:
        """Copies were read end to end; what was not intact does not count any more."""
        known = self.known
        begin = self.begin
        if begin is None or event.generation != begin.claim.generation:
            return []
        for holder, key in event.bad:
            if (holder, key) in begin.being_read:  # else it was told of, and may have been replaced
                known.drop_copy(holder, key)
            begin.unreadable.append(f"{key}: the copy on host {holder.node_id[:8]} is corrupt")
        for holder, key in event.unread:
            known.set_aside(holder, key)
            begin.unreadable.append(f"{key}: host {holder.node_id[:8]} did not read its copy")
        if event.manifest is not None:
            known.manifests[event.version] = event.manifest
        elif event.problem:  # S3 cannot serve the step; memory still may. Nothing is deleted.
            if event.is_transient:
                begin.s3_problem = event.problem
            else:
                known.durable.discard(event.version)
            begin.unreadable.append(f"{event.version} on S3: {event.problem}")
        begin.is_reading = False
        begin.verified.add(event.version)
        begin.intact |= begin.being_read - set(event.bad) - set(event.unread)
        if not begin.has_listed and (listing := self._list_durable()):
            begin.verified.discard(event.version)  # S3 may have it, after all, and memory has not
            return listing
        return self._choose()

    def recorded(self, event: m.ParentRecorded) -> Begin | None:
        """The register has this generation's parent: it is started; `answer` comes next.

        Returns:
            The begin that this was about, unless it is over, or another one's event.
        """
        known = self.known
        begin = self.begin
        if begin is None or begin.claim.generation != event.generation or begin.choice is None:
            return None
        known.put_back()
        self.begin = None
        known.parents[event.generation] = event.parent
        if event.parent == begin.choice.version:
            known.passed_over[event.generation] = begin.choice.passed_over
        return begin

    def answer(self, begin: Begin) -> list[m.Command]:
        """Answer a life whose generation has started, once it is known where its parent is."""
        known, s3 = self.known, begin.claim.settings.s3
        version = known.parents[begin.claim.generation]
        assert begin.choice is not None
        is_ours = version == begin.choice.version  # else another life of the coordinator was first
        is_on_s3 = version in known.durable or (
            s3 is not None and known.durable_problem is not None
        )
        if is_ours and known.has_sources(version):
            return [m.AnswerBegin(begin.claim.life)]
        if is_ours and version is not None and not is_on_s3:
            return [m.AnswerBegin(begin.claim.life, self._lost(begin, version))]
        # Or a copy went since it was read. S3 has it, its manifest says where; or it may have it.
        self.begin, begin.is_recorded = begin, True
        begin.verified.clear()
        return self._choose()
