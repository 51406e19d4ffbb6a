"""The core of the coordinator, one per job: events in, commands out.

It takes in what happens (holders, copies, saves, commits) and hands on what is the part of another
core: how a generation begins (`tiered.generations`), what is let go of (`tiered.eviction`), what is
copied again (`tiered.repair`), what goes to S3 next (`tiered.flush`), and whether a step is saved
while others are on their way (`tiered.admission`). docs/PROTOCOL.md has the whole.

Rules:
    1. A step is committed when every rank's shard is whole on its own host and on as many others
       as the policy asks for, by the holders' own word, with the same checksum everywhere. With
       fewer hosts alive than that, or hosts that cannot reach enough others, what there is counts,
       and the step is marked degraded; also where the other copies do not come for long.
    2. What is known (`tiered.catalogue`) is a cache, rebuilt after the coordinator's death from the
       register, the holders' inventories and S3's listing.
    3. What holders were told is told again now and then, and to whoever comes: a message may have
       been lost.

`handle` takes an event and returns commands; no I/O, no clock but `now_s`.
"""

import bisect
from typing import TYPE_CHECKING, assert_never

from replication.detour import Buddies, detour, pair
from replication.placement import Host, place
from replication.records import HolderId, Version
from tiered import messages as m
from tiered.catalogue import Catalogue
from tiered.eviction import Eviction
from tiered.generations import Begin, Generations
from tiered.repair import Repair

if TYPE_CHECKING:
    from tiered.admission import Admission

REMIND_S = 15.0  # what holders were told once is told again: a message may have been lost


class Job(Catalogue):
    """What the coordinator decides about one job. Not thread-safe."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.generations = Generations(self)
        self.eviction = Eviction(self)
        self.repair = Repair(self)
        self._remind_due_s = 0.0
        self._placed: tuple[list[Host], int] | None = None  # hosts, and replicas

    @property
    def begin(self) -> Begin | None:
        """The generation that is on its way from claim to answer, if any."""
        return self.generations.begin

    # -- events ------------------------------------------------------------------------------

    def handle(self, event: m.Event, now_s: float) -> list[m.Command]:
        """Take one event; return what has to be done because of it."""
        commands = self._handle(event, now_s)
        refused = {c.life for c in commands if isinstance(c, m.AnswerBegin) and c.error is not None}
        if refused and self.claims and self.claims[self.generation].life in refused:
            self.repair.nobody_reads(now_s)  # it cannot begin yet
        return commands

    def _handle(self, event: m.Event, now_s: float) -> list[m.Command]:
        match event:
            case m.Recalled():
                for claim in event.claims:
                    self.add_claim(claim)
                self.parents.update(event.parents)
                self.is_rebuilding = bool(event.claims)
                return []
            case m.HolderUp():
                return self._holder_up(event, now_s)
            case m.HolderDown():
                self.holders.pop(event.holder, None)
                commands = [*self._rearrange(), *self._review(now_s)]
                is_expected = event.holder.node_id in self.leaving
                return commands if is_expected else [*commands, *self._flush_newest(now_s)]
            case m.BeginAsked():
                return self.generations.asked(event)
            case m.StopAsked():
                return self.generations.stop(event)
            case m.OwnerSought():
                return self.generations.sought(event)
            case m.GenerationClaimed():
                return self._claimed(event, now_s)
            case m.DurableListed():
                return self.generations.listed(event)
            case m.HoldersFenced():
                return self.generations.fenced(event)
            case m.ShardsVerified():
                return self.generations.verified(event)
            case m.ParentRecorded():
                return self._started(event, now_s)
            case m.RankRestored(generation, rank):
                if generation != self.generation or not self.repair.rank_has_read(rank, now_s):
                    return []
                return [] if self.is_rebuilding else self.repair.repair(now_s)
            case m.ShardReported():
                return self._reported(event, now_s)
            case m.DurableFoundCorrupt():  # the next life resumes from an older one
                self.rotten.add(event.version)
                self.durable.discard(event.version)
                return []
            case m.CopyFoundCorrupt():
                self.generations.found_corrupt(event)
                return self.repair.repair(now_s)
            case m.ShardUploaded() | m.UploadFailed() | m.ManifestPublished() | m.PublishFailed():
                return self._flush_event(event, now_s)
            case m.DurableAnswered():
                return self.flushes.handle(event, now_s, self.holders_of)
            case m.SaveAsked():
                return self._save_asked(event, now_s)
            case m.ShardNotStaged(version):
                if version.generation == self.generation:
                    reason = "skipped: some rank could not save it"
                    self.admissions.give_up(version.step, reason, now_s)
                return []
            case m.ManifestsRead():
                self.manifests.update(event.manifests)
                return self._collect_durable()
            case m.HostLeaving():
                return self._leaving(event, now_s)
            case m.LinksCut():
                self.cut = event.pairs
                return [*self._rearrange(), *self._review(now_s)]
            case m.Ticked():
                return self._ticked(event, now_s)
            case _:
                assert_never(event)

    def _ticked(self, event: m.Ticked, now_s: float) -> list[m.Command]:
        if self.is_rebuilding:
            self.is_rebuilding = False
            self.found = {v for v in self.copies if v.generation == self.generation}
            return [*self._rearrange(), *self._review(now_s)]
        commands = self._commit_stuck(now_s)
        commands += [*self.repair.repair(now_s), *self.repair.note_degraded(now_s)]
        commands += self.flushes.handle(event, now_s, self.holders_of)
        if now_s >= self._remind_due_s and self.claims:
            self._remind_due_s = now_s + REMIND_S
            counted = frozenset(self.staying)
            for holder in sorted(self.holders):
                commands += self._remind(holder)
                if (mates := self.buddies.get(holder)) is not None:
                    commands.append(m.SetBuddies(holder, mates, counted))
            if self.begin is None:  # or it was told where to read
                commands += self.repair.release()
        return commands

    def _remind(self, holder: HolderId) -> list[m.Command]:
        """Tell a holder what it may have missed; telling it again changes nothing."""
        commands: list[m.Command] = [m.FenceNewHolder(self.generation, holder)]
        if self.eviction.is_ordered:
            commands.append(self.eviction.order(holder))
        return commands

    # -- holders and placement ---------------------------------------------------------------

    def _holder_up(self, event: m.HolderUp, now_s: float) -> list[m.Command]:
        self.holders[event.holder] = event.domain
        for ranks in self.copies.values():
            for holders in ranks.values():
                holders.pop(event.holder, None)
        for record in event.records:
            self.add_copy(event.holder, record)
        commands = self._remind(event.holder) if self.claims else []
        self.buddies.pop(event.holder, None)  # whatever it was told, tell it again
        return [*commands, *self._rearrange(), *self._review(now_s)]

    def _rearrange(self) -> list[m.Command]:
        """Choose buddies anew; tell those holders whose buddies changed."""
        if not self.claims or self.is_rebuilding:
            return []
        by_node = {h.node_id: h for h in self.holders}
        hosts = self.placed_hosts
        if (hosts, self.replicas) != self._placed:  # else they would be placed as they are
            self._placed = (hosts, self.replicas)
            self.placement = place(hosts, self.replicas, self.placement)
        assert self.placement is not None
        ways = detour(self.placement, hosts, self.cut) if self.cut else None
        staying = [host.node_id for host in hosts]
        commands: list[m.Command] = []
        buddies = {
            holder: tuple(by_node[n] for n in self._buddies_of(node_id, staying, ways))
            for node_id, holder in by_node.items()
        }
        counted = frozenset(self.staying)
        for holder, mates in sorted(buddies.items()):
            if self.buddies.get(holder) != mates:
                commands.append(m.SetBuddies(holder, mates, counted))
        self.buddies = buddies
        return commands

    def _buddies_of(
        self, node_id: str, staying: list[str], ways: Buddies | None
    ) -> tuple[str, ...]:
        """Where a host's shards go; all copies of a leaving host's are elsewhere."""
        assert self.placement is not None
        first = bisect.bisect_left(staying, node_id)
        if staying[first : first + 1] == [node_id]:
            return self.placement.buddies(node_id) if ways is None else ways[node_id]
        reached = [n for n in staying[first:] + staying[:first] if pair(node_id, n) not in self.cut]
        return tuple(reached[: self.copies_needed])

    def _leaving(self, event: m.HostLeaving, now_s: float) -> list[m.Command]:
        """Copy what a host has to others, and flush the newest step."""
        if event.node_id in self.leaving:
            return []
        self.leaving.add(event.node_id)
        commands = [*self._rearrange(), *self._review(now_s)]
        return [*commands, *self._flush_newest(now_s)]

    def _flush_newest(self, now_s: float) -> list[m.Command]:
        """Flush the newest committed step, due or not: where one host goes, more may go at once."""
        newest = max((v for v in self.commits if v.generation == self.generation), default=None)
        s3 = None if self.settings is None else self.settings.s3
        if newest is None or s3 is None or newest in {*self.durable, *self.flushes.versions}:
            return []
        if newest in self.flushes.given_up or not self.is_whole(newest):
            return []
        ranks = range(len(self.copies[newest]))
        return self.flushes.add(newest, ranks, now_s, self.holders_of)

    # -- begin, admit, commit, collect, flush ------------------------------------------------

    def _claimed(self, event: m.GenerationClaimed, now_s: float) -> list[m.Command]:
        commands = self.generations.claimed(event)
        begin = self.begin
        is_news = begin is not None and begin.claim.generation == event.generation
        if begin is not None and is_news and begin.is_claimed and not begin.is_stop:
            self.repair.ranks_read(begin.claim.world_size, now_s)
        return commands

    def _started(self, event: m.ParentRecorded, now_s: float) -> list[m.Command]:
        """A generation has its parent: care for what it has inherited, then answer its ranks."""
        begin = self.generations.recorded(event)
        if begin is None or begin.choice is None:
            return []
        commands = self._rearrange()
        if event.parent is None:
            self.repair.nobody_reads(now_s)
        if event.parent == begin.choice.version:
            commands += [*self.repair.repair(now_s), *self._collect()]
        return [*commands, *self.generations.answer(begin)]

    def _save_asked(self, event: m.SaveAsked, now_s: float) -> list[m.Command]:
        version, settings = event.version, self.settings
        if settings is None or version.generation != self.generation:
            return []
        self.repair.nobody_reads(now_s)  # or no rank would have got so far
        memory, current, step = settings.memory, self.generation, version.step
        mine = [v for v in self.copies if v.generation == current]
        for other in mine:
            if other not in self.commits and other != version:
                self.admissions.find(other.step, now_s)
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
                {v.step for v in mine if self.has_replica(v)},
                {v.step for v in mine if self.is_whole(v)},
                now_s,
            )
        if answer is None:
            return []
        gone = [Version(current, s) for s in answer.instead_of] if is_news else []
        for dropped in gone:
            self.copies.pop(dropped, None)
        holders = tuple(sorted(self.holders))
        return [*(m.DropStep(v, holders) for v in gone), m.AnswerSave(version, answer)]

    def _reported(self, event: m.ShardReported, now_s: float) -> list[m.Command]:
        if event.holder not in self.holders:
            return []  # its inventory will tell when it is back
        self.add_copy(event.holder, event.record)
        return self._review(now_s, only=event.record.key.version)

    def _review(self, now_s: float, only: Version | None = None) -> list[m.Command]:
        """Commit what has become whole, and move on what waited for it.

        Not while the inventories come in after the coordinator's death: the first of them alone
        looks like a cluster of one host, where one copy is all that can be asked for.
        """
        commands: list[m.Command] = []
        if self.is_rebuilding:
            return commands
        generation = self.generation
        versions = [only] if only is not None else sorted(self.copies)
        for version in versions:
            is_current = version.generation == generation
            if is_current and version not in self.commits and self.is_replicated(version):
                commands += self._commit(version, now_s)
        commands += self._collect()
        if only in self.degraded:
            commands += self.repair.note_degraded(now_s)
        if only is None:
            commands += [*self.repair.repair(now_s), *self.repair.note_degraded(now_s)]
            commands += self.flushes.review(now_s, self.holders_of)
        return commands

    def _commit(self, version: Version, now_s: float) -> list[m.Command]:
        copies = min(
            min(self.copies_that_commit(version, rank), len(self.intact(version, rank)))
            for rank in self.copies[version]
        )
        is_degraded = copies < 1 + self.replicas
        self.commits[version] = is_degraded
        if version not in self.found:
            self.committed_s = now_s
        self.found.discard(version)
        self.admissions.settle(version.step)
        size = sum(s.record.plan.size_bytes for s in self.sources(version))
        commands: list[m.Command] = [m.StepCommitted(version, size, copies, is_degraded)]
        settings = self.settings
        if version not in self.durable and settings and settings.is_due_for_s3(version.step):
            ranks = range(len(self.copies[version]))
            commands += self.flushes.add(version, ranks, now_s, self.holders_of)
        return commands

    def _commit_stuck(self, now_s: float) -> list[m.Command]:
        """Commit a step whose copies have not come for long: see `tiered.admission`."""
        current, settings = self.generation, self.settings
        newest = max((v for v in self.commits if v.generation == current), default=Version(0, 0))
        mine = [v for v in self.copies if v.generation == current and v > newest]
        stuck = self.admissions.stuck([v.step for v in mine if self.is_whole(v)], now_s)
        if not stuck or settings is None or settings.memory.strict:
            return []
        return [*self._commit(Version(current, max(stuck)), now_s), *self._collect()]

    def _flush_event(self, event: m.FlushEvent, now_s: float) -> list[m.Command]:
        commands: list[m.Command] = []
        if isinstance(event, m.ManifestPublished):
            self.durable.add(event.version)
            self.unsure.discard(event.version)
            self.manifests[event.version] = event.records
            commands += [*self._collect_durable(), *self.eviction.collect_orphans(now_s)]
        elif isinstance(event, m.PublishFailed):  # it may be there although nobody said so
            self.unsure.add(event.version)
        commands += self.flushes.handle(event, now_s, self.holders_of)
        return [*commands, *self._collect()]

    def _collect(self) -> list[m.Command]:
        orders = self.eviction.collect()
        if orders:
            self.repair.forget_below(self.watermark)
        return orders

    def _collect_durable(self) -> list[m.Command]:
        """Not while a life begins: it may be about to resume from an older step on purpose."""
        return [] if self.begin is not None else self.eviction.collect_durable()
