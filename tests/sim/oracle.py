"""The judge: what was saved, sealed, lost and told, kept apart from the cores' own books.

It is told by the simulated shells what really happened (bytes, deaths, answers) and judges each
promise of docs/PROTOCOL.md at the moment when the system makes it:

    I1 atomic     every rank of a chosen version has an intact copy or is on S3
    I2 valid      what a rank restores is what that rank saved
    I3 durable    never older than the newest acknowledged step whose every rank has a copy left on
                  a host that could be reached, nor than the newest durable one while S3 answers;
                  and nothing is collected that this may need
    I4 single     generations start in order, each once, from a version on the branch
    I5 fenced     nothing older commits, is staged, or is let go of at an older one's word, once a
                  newer generation fenced it off; no coordinator orders what the register would
                  have told it not to
    I6 honest     a commit has as many copies as it says, and as the policy and the hosts allow
    I7 bounded    a holder holds no more bytes than its budget
    same          all ranks of a life get the same answer

A copy is one holder's, sealed with the bytes that were saved. It is lost when its holder dies or a
bit of it flips. What the system itself drops does not count as lost. A host counts as reachable if
nothing was wrong between it and the head for `GRACE_S` before the generation was asked for, nor
since.
"""

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING

from replication.records import HolderId, Life, ShardKey, Version
from tests.sim.limits import FLIP, HOLDER_TICK_S, SCRUB_PERIOD_S, STUCK_S
from tiered import messages as m
from tiered import register
from tiered.history import Resolution

if TYPE_CHECKING:
    from tests.sim.coordinator import Coordinator
    from tests.sim.world import World

GRACE_S = 12.0
STALLED_S = 40.0  # a save, three probes and heartbeats, offers that time out meanwhile
TOLD_S = 2.0  # a copy sealed later than that may not have been reported yet
ANSWER_S = 0.05  # what the register said may be older than now
FOUND_S = GRACE_S + SCRUB_PERIOD_S + 2 * HOLDER_TICK_S  # by then a flipped bit is known
NEVER_S = float("inf")

Asked = tuple[int | None, int | None]  # step, before


class Oracle:
    """Books and judgements of one run."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.violations: list[str] = []
        self.saved: dict[ShardKey, tuple[int, ...]] = {}
        self.worlds: dict[Version, int] = {}  # ranks that saved it
        self._latest: dict[int, tuple[int, ...]] = {}  # of each rank
        self.copies: dict[Version, dict[int, dict[HolderId, float]]] = {}
        self.whole_s: dict[Version, float] = {}  # since when each rank had some copy
        self.lost_s: dict[tuple[HolderId, ShardKey], float] = {}
        self.died_s: dict[HolderId, float] = {}
        self.acked: dict[Version, float] = {}
        self.commits: dict[int, set[Version]] = defaultdict(set)
        self.protected: set[Version] = set()  # of those, what may not be collected
        self.recorded: dict[int, Version | None] = {}
        self.parents: dict[int, Version | None] = {}  # of those that have begun
        self.answers: dict[Life, tuple[int, Version | None]] = {}
        self.asked_s: dict[int, float] = {}
        self.claimed_s: dict[int, float] = {}
        self.durable: dict[Version, float] = {}
        self.ever_durable: set[Version] = set()
        self.rotten: set[Version] = set()  # on S3, and not what was stored
        self.counts: dict[str, int] = defaultdict(int)
        self.releasing: frozenset[ShardKey] = frozenset()  # as copies too many, right now
        self._bounds: dict[int, int | None] = {}
        self._committed_s = 0.0
        self.is_disowned = False  # a rank lets go of what it was told is not saved
        self.mark = Version(0, 0)  # what is older may be collected
        self.generation = 0  # the newest that has started
        self._tokens = 0

    def violated(self, name: str, text: str) -> None:
        """Note a broken promise."""
        self.violations.append(f"{name} at {self.world.kernel.now_s:.1f} s: {text}")
        self.world.kernel.log("VIOLATION %s: %s", name, text)
        if self.world.is_brief:
            self.world.kernel.stop()

    # -- what happened ------------------------------------------------------------------------

    def ranks_of(self, version: Version) -> range:
        """The ranks that saved it, or were about to."""
        return range(self.worlds.get(version, self.world.setup.ranks))

    def save(self, key: ShardKey, chunks: int, world_size: int) -> tuple[int, ...]:
        """A rank is about to save; these are its bytes, like no other's.

        But for what has not changed since its last save: never the first chunk.
        """
        self.worlds[key.version] = world_size
        self._tokens += 1
        content = tuple((self._tokens << 16) + (index << 8) for index in range(chunks))
        before, unchanged = self._latest.get(key.rank, content), self.world.setup.unchanged
        if unchanged:
            roll = self.world.kernel.random.random
            content = (content[0], *(b if roll() < unchanged else c for b, c in zip(
                before[1:], content[1:], strict=True
            )))  # fmt: skip
        self.saved[key] = self._latest[key.rank] = content
        return content

    def sealed(self, holder: HolderId, key: ShardKey, held: dict[ShardKey, dict[int, int]]) -> None:
        """A holder says that it has a whole copy.

        A chunk that it shares with an earlier copy may have rotted since it was verified: then it
        did have a copy, and has lost it.
        """
        saved, have = dict(enumerate(self.saved.get(key, ()))), held.get(key)
        is_intact = have == saved
        was_intact = have is not None and {i: c % FLIP for i, c in have.items()} == saved
        if is_intact or (was_intact and (holder, key) in self.lost_s):
            copies = self.copies.setdefault(key.version, {}).setdefault(key.rank, {})
            copies.setdefault(holder, self.world.kernel.now_s)
            if len(self.copies[key.version]) == len(self.ranks_of(key.version)):
                self.whole_s.setdefault(key.version, self.world.kernel.now_s)
        if is_intact and self.lost_s.pop((holder, key), None) is not None:
            copies[holder] = self.world.kernel.now_s  # another one: it was not there meanwhile

    def pinned(self, holder: HolderId, held: dict[ShardKey, dict[int, int]]) -> None:
        """A holder has pinned one more chunk."""
        capacity = self.world.setup.capacity
        if sum(map(len, held.values())) > capacity:
            self.violated("I7", f"{holder} holds more than its budget of {capacity}")

    def flipped(self, holder: HolderId, key: ShardKey) -> None:
        """A bit of a copy flipped."""
        self.lost_s[holder, key] = self.world.kernel.now_s

    def died(self, holder: HolderId) -> None:
        """A holder and its bytes are gone."""
        self.died_s.setdefault(holder, self.world.kernel.now_s)

    def published(self, version: Version, by: "Coordinator") -> None:
        """A manifest is on S3."""
        if not by.is_current and self.durable and max(self.durable) > version:
            return  # by one that was replaced, so late that its shards may be deleted already
        self.world.kernel.log("%s is durable", version)
        self.counts["durable"] += 1
        self.durable.setdefault(version, self.world.kernel.now_s)
        self.ever_durable.add(version)
        for rank in self.ranks_of(version):
            key = ShardKey(self.world.job_name, version, rank)
            if version not in self.rotten and self.world.stored(key) != self.saved.get(key):
                self.violated("I6", f"{version} was published without a true shard of rank {rank}")

    def durable_deleted(self, versions: tuple[Version, ...]) -> None:
        """Manifests go."""
        newest = max((v for v in self.durable if self.is_on_branch(v)), default=None)
        if newest in versions:
            self.violated("I3", f"the newest durable {newest} is deleted from S3")
        for version in versions:
            self.durable.pop(version, None)

    def cluster_lost(self, parents: dict[int, Version | None]) -> None:
        """All memory and the register are gone; S3 remembers these parents."""
        self.parents = dict(parents)
        self.acked.clear()
        self.protected.clear()
        self.commits.clear()
        self.recorded = dict(parents)
        self.mark = Version(0, 0)
        self.copies.clear()
        self.asked_s.clear()
        self.claimed_s.clear()
        self._walk()

    # -- the branch -----------------------------------------------------------------------------

    def _walk(self) -> None:
        """Recompute the branch's bounds after a generation started."""
        self.generation = max(self.parents, default=0)
        self._bounds = {}
        generation, last = self.generation, None
        while generation and generation not in self._bounds:
            self._bounds[generation] = last
            parent = self.parents.get(generation)
            if parent is None:
                break
            generation, last = parent.generation, parent.step

    def is_on_branch(self, version: Version) -> bool:
        """Whether the newest started generation descends from it."""
        if not self.parents or version.generation not in self._bounds:
            return False
        last = self._bounds[version.generation]
        return last is None or version.step <= last

    def _is_abandoned(self, version: Version, generation: int) -> bool:
        """Whether the newest older generation with a parent on record went back before it.

        Also one that nobody has begun: its coordinator died, and its cluster, but S3 remembers.
        """
        known = {**register.read_parents(self.world.store.index.entries), **self.recorded}
        at, last = max((g for g in known if g < generation), default=0), None
        while at:
            if version.generation == at:
                return last is not None and version.step > last
            parent = known.get(at)
            at, last = (0, None) if parent is None else parent
        return True

    def newest_acked(self) -> list[Version]:
        """The `keep` newest acknowledged versions of the branch, newest first."""
        keep = self.world.setup.settings.memory.keep
        return sorted(filter(self.is_on_branch, self.protected), reverse=True)[:keep]

    def _is_left(self, holder: HolderId, key: ShardKey, since_s: float) -> bool:
        """Whether a copy was there, intact, at any time since."""
        gone_s = min(self.died_s.get(holder, NEVER_S), self.lost_s.get((holder, key), NEVER_S))
        return gone_s >= since_s

    def _is_reachable(self, holder: HolderId, since_s: float) -> bool:
        trouble_s = self.world.network.trouble_s.get(holder.node_id, -NEVER_S)
        return trouble_s < since_s - GRACE_S

    def holders(
        self, version: Version, rank: int, since_s: float, *, reachable: bool
    ) -> set[HolderId]:
        """Who had an intact copy at any time since (and could be reached all the time)."""
        key = ShardKey(self.world.job_name, version, rank)
        return {
            h
            for h, sealed_s in self.copies.get(version, {}).get(rank, {}).items()
            if self._is_left(h, key, NEVER_S if reachable else since_s)
            and (not reachable or (self._is_reachable(h, since_s) and sealed_s < since_s - TOLD_S))
        }

    def has_copy(self, version: Version, rank: int) -> bool:
        """Whether an intact copy is in memory now."""
        return bool(self.holders(version, rank, NEVER_S, reachable=False))

    # -- judgements -----------------------------------------------------------------------------

    def committed(self, coordinator: "Coordinator", event: m.StepCommitted) -> None:
        """A coordinator calls a step committed."""
        world, version = self.world, event.version
        world.kernel.log(
            "%s committed, %d copies%s", version, event.copies, " degraded" * event.is_degraded
        )
        self.counts["commits"] += 1
        whole_s = self.whole_s.get(version, world.kernel.now_s)
        is_stuck = event.is_degraded and world.kernel.now_s - whole_s >= STUCK_S
        self._judge_gap(STALLED_S + (STUCK_S if is_stuck else 0.0))
        claimed = world.claimed_generation()
        is_overtaken = version.generation < claimed and not coordinator.is_current
        if version.generation < self.generation:
            if not is_overtaken:
                self.violated("I5", f"{version} commits, generation {self.generation} has started")
            return
        self.commits[version.generation].add(version)
        self._raise_mark()
        if is_overtaken:
            return  # F7: a coordinator that was replaced, and does not know it
        self.acked.setdefault(version, world.kernel.now_s)
        if version >= self.mark:
            self.protected.add(version)
        need = event.copies
        asked, is_fixed = 1 + world.replicas(), world.setup.settings.memory.replicas is not None
        up = self._up()
        now_s = world.kernel.now_s
        is_cut = event.is_degraded and world.network.between_s > now_s - FOUND_S
        is_short = min(asked, up) > need and not is_cut and not is_stuck
        if is_short or (not event.is_degraded and need < asked and is_fixed):
            self.violated(
                "I6", f"{version} commits with {need} copies; {asked} asked, {up} hosts up"
            )
        for rank in self.ranks_of(version):
            nodes = {h.node_id for h in self.copies.get(version, {}).get(rank, {})}
            if len(nodes) < max(1, need):
                self.violated("I6", f"{version} commits, rank {rank} was never on {need} hosts")

    def _judge_gap(self, most_s: float) -> None:
        """Where only links between hosts are cut, saves go on: the next buddy is soon found.

        If it has no room, a step is committed without it once it has waited for `STUCK_S`.
        """
        now_s, before_s = self.world.kernel.now_s, self._committed_s
        self._committed_s = now_s
        is_judged = self.world.setup.profile == "links" and not self.world.faults.is_over
        if is_judged and now_s - before_s > most_s:
            self.violated("L2", f"no commit for {now_s - before_s:.0f} s, and only links were cut")

    def _raise_mark(self) -> None:
        """What is older than the `keep` newest may be collected.

        Of the present generation those that were committed count; of older ones those of the
        branch that were, and have a copy of each shard left, or that have all their copies now.
        """
        keep = self.world.setup.settings.memory.keep
        own = sorted(self.commits[self.generation])[-keep:]
        if (missing := keep - len(own)) > 0:
            older = [v for v in self.copies if self.mark < v and v.generation < self.generation]
            newest = sorted(older, reverse=True)
            whole = (v for v in newest if self.is_on_branch(v) and self._is_counted(v))
            own = sorted([*itertools.islice(whole, missing), *own])
        if len(own) == keep and own[0] > self.mark:
            self.mark = own[0]
            self.protected = {v for v in self.protected if v >= self.mark}

    def _is_counted(self, version: Version) -> bool:
        """Whether every rank has its copies as far as anybody knows; one, if it was committed."""
        world, since_s = self.world, self.world.kernel.now_s - FOUND_S
        need = min(1 + world.replicas(), self._up())
        if version in self.acked:
            need = 1
        for rank in self.ranks_of(version):
            left = self.holders(version, rank, since_s, reachable=False)
            if len({h.node_id for h in left}) < max(1, need):
                return False
        return True

    def _up(self) -> int:
        """How many hosts count for the policy, as everybody must know.

        Those that leave count again when no other is left, which is known as late as the other's
        death.
        """
        staying, leaving = self.world.staying(), self.world.leaving
        now_s = self.world.kernel.now_s
        if all(host.place in leaving for host in staying) and any(
            holder.node_id not in leaving and died_s > now_s - GRACE_S
            for holder, died_s in self.died_s.items()
        ):
            return 0
        return sum(self._is_steady(host.place) for host in staying)

    def _is_steady(self, place: str) -> bool:
        """Whether a holder has been up and in touch for so long that everybody must know."""
        now_s, holder = self.world.kernel.now_s, self.world.holder_on(place)
        return (
            holder is not None
            and holder.is_alive
            and holder.host.is_alive
            and now_s - holder.born_s > GRACE_S
            and self._is_reachable(holder.id, now_s)
        )

    def asked(self, generation: int) -> None:
        """A generation was claimed; from now on the answer is being found."""
        self.asked_s.setdefault(generation, self.world.kernel.now_s)

    def claimed(self, generation: int) -> None:
        """The register has a claim of this generation, whosever."""
        self.claimed_s.setdefault(generation, self.world.kernel.now_s)

    def started(self, generation: int, parent: Version | None, begun: Asked | None) -> None:
        """The register holds a generation's parent; its trainers may start as soon as one knows."""
        world = self.world
        world.kernel.log("generation %d resumes from %s %s", generation, parent, begun or "")
        self.counts["generations"] += 1
        if generation in self.recorded:
            first = self.recorded[generation]
            if first != parent:
                self.violated("I4", f"generation {generation} has parents {first} and {parent}")
            return
        self.recorded[generation] = parent
        if generation < world.claimed_generation():
            return  # overtaken on its way; nobody may be told to start as it
        step, before = begun or (None, None)
        if parent is not None:
            if step is None and self.parents and not self.is_on_branch(parent):
                self.violated("I4", f"generation {generation} resumes from abandoned {parent}")
            self._judge_whole(parent, self.asked_s.get(generation, 0.0))
        if step is None:
            self._judge_newest(generation, parent, before)

    def begun(self, generation: int) -> None:
        """A coordinator knows, and will tell, that a generation has started."""
        if generation not in self.parents and generation in self.recorded:
            self._raise_mark()  # what was collected until now may be gone, whatever comes
            self.parents[generation] = self.recorded[generation]
            self._walk()

    def _judge_whole(self, parent: Version, since_s: float) -> None:
        if parent in self.durable:
            return
        for rank in self.ranks_of(parent):
            if not self.holders(parent, rank, since_s, reachable=False):
                self.violated("I1", f"{parent} is chosen, and no copy of rank {rank} is left")

    def _judge_newest(self, generation: int, parent: Version | None, before: int | None) -> None:
        since_s = self.asked_s.get(generation, self.world.kernel.now_s)
        for version in self.newest_acked():
            is_left = all(
                self.holders(version, r, since_s, reachable=True) for r in self.ranks_of(version)
            )
            if is_left and (before is None or version.step < before):
                if parent is None or parent < version:
                    self.violated("I3", f"{parent} is chosen, acknowledged {version} is there")
                break
        good = self.durable.keys() - self.rotten
        allowed = [v for v in good if before is None or v.step < before]
        told_s = since_s - GRACE_S  # a listing may have been served before a manifest came
        on_s3 = [
            v
            for v in allowed
            if self.is_on_branch(v)
            and self.durable[v] < told_s
            and not self._is_abandoned(v, generation)
        ]
        if not on_s3 or (parent is not None and parent >= max(on_s3)):
            return
        is_in_memory = parent is not None and all(
            self.holders(parent, rank, since_s, reachable=False) for rank in self.ranks_of(parent)
        )
        # While S3 is in trouble, only a step that needs nothing of it may be taken instead.
        if self.world.store.trouble_s < since_s - GRACE_S or not is_in_memory:
            self.violated("I3", f"{parent} is chosen, {max(on_s3)} is on S3")

    def answered(self, life: Life, resolution: Resolution) -> None:
        """A rank has its answer."""
        answer = resolution.generation, resolution.version
        first = self.answers.setdefault(life, answer)
        if first != answer:
            self.violated("same", f"{life} got {first} and {answer}")
        generation, version = answer
        if version in self.durable and len(resolution.shards) != len(self.ranks_of(version)):
            self.violated("I1", f"{life} is told to read {version}, and not where")
        if generation not in self.parents or self.parents[generation] != version:
            self.violated("I4", f"{life} starts as {generation} from {version}, unrecorded")

    def restored(self, version: Version, rank: int, content: tuple[int, ...]) -> None:
        """A rank has filled its state."""
        key = ShardKey(self.world.job_name, version, rank)
        self.counts["restores"] += 1
        if self.saved.get(key) != content:
            self.violated("I2", f"{key} restored as {content}, saved as {self.saved.get(key)}")

    def told(self, version: Version, level: str | None) -> None:
        """A rank was told how safe its save is."""
        if level == "replicated" and version not in self.acked:
            self.violated("I6", f"{version} is called replicated, and never committed")
        if level == "durable" and version not in self.ever_durable:
            self.violated("I6", f"{version} is called durable, and is not on S3")

    def staged(self, holder: HolderId, key: ShardKey, fence_seen: int) -> None:
        """A holder has accepted a write."""
        if key.version.generation < fence_seen:
            self.violated("I5", f"{key} written to {holder} behind fence {fence_seen}")

    def obeyed(self, holder: HolderId, what: str, generation: int, fence_seen: int) -> None:
        """A holder has carried out an order to let go of something."""
        if generation < fence_seen:
            self.violated("I5", f"{holder}: {what} of {generation} behind fence {fence_seen}")

    def ordered(self, generation: int) -> None:
        """A coordinator tells holders to collect; by then it has asked the register."""
        known_s = self.world.kernel.now_s - ANSWER_S
        newest = max((g for g, at_s in self.claimed_s.items() if at_s < known_s), default=0)
        if newest > generation:
            self.violated("I5", f"generation {generation} collects, {newest} has been claimed")

    def _judge_surplus(self, holder: HolderId, key: ShardKey) -> None:
        """As many others as the policy asks for had a copy, when that could last be known."""
        self.counts["copies released"] += 1
        since_s = self.world.kernel.now_s - FOUND_S
        left = self.holders(key.version, key.rank, since_s, reachable=False) - {holder}
        self.lost_s[holder, key] = self.world.kernel.now_s
        if len({h.node_id for h in left}) < 1 + self.world.replicas():
            self.violated("I3", f"{holder} drops {key} as surplus, and only {sorted(left)} have it")

    def dropped(self, holder: HolderId, key: ShardKey) -> None:
        """A holder lets go of a copy."""
        version = key.version
        if key in self.releasing:
            self._judge_surplus(holder, key)
            return
        if version >= self.mark:
            self._raise_mark()  # a step inherited may have got its copies back since
        if version < self.mark:
            return
        acked = self.newest_acked()
        if self.is_disowned and acked and version < acked[0]:
            # Told so by nobody's answer in time; a later coordinator found it whole, and a newer.
            self.protected.discard(version)
            self.lost_s[holder, key] = self.world.kernel.now_s
            return
        needed = set(acked)
        keep = self.world.setup.settings.memory.keep
        newest = [v for v in self.protected if v.generation == self.generation]
        parent = self.parents.get(self.generation)
        if len(newest) < keep and parent is not None:
            needed.add(parent)
        ranks = range(self.world.setup.ranks)
        if version in needed and all(self.has_copy(version, rank) for rank in ranks):
            self.violated("I3", f"{holder} drops {key}, which is needed")
        else:
            self.lost_s[holder, key] = self.world.kernel.now_s
