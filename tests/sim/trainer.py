"""The users of the cluster: ranks that save and restore, lives of the job, and their launcher.

A rank does what `tiered.Checkpointer` does. Ranks of a life go from save to save in step; one whose
life was given up while it could not be killed (it hung, or was cut off) is a zombie: it wakes up
and goes on saving on its own, until somebody tells it that it is fenced off.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from replication.errors import FencedError, MemoryBudgetError, ShardNotHeldError, TieredError
from replication.inventory import Reservation
from replication.records import HolderId, Life, Owner, ShardKey, ShardPlan, Version
from tests.sim.holder import Holder, digest
from tests.sim.limits import (
    ADMIT_TIMEOUT_S,
    ASK_TIMEOUT_S,
    BEGIN_TIMEOUT_S,
    ROOM_TIMEOUT_S,
    STAGE_TIMEOUT_S,
    STALL_S,
)
from tests.sim.network import (
    HEAD,
    CallLostError,
    HolderDiedError,
    Host,
    Outcome,
    Process,
    Reply,
    gather,
)
from tiered import messages as m
from tiered.admission import Admission
from tiered.errors import NameInUseError
from tiered.history import Resolution, ShardSources

if TYPE_CHECKING:
    from tests.sim.world import World

ZOMBIE_SAVES = 6
STOPPED_SHARE = 0.03  # of saves: the trainer is stopped in the middle of one


class Rank(Process):
    """One trainer process."""

    def __init__(self, world: "World", life: "LifeOfJob", rank: int, host: Host) -> None:
        super().__init__(host)
        self.world = world
        self.life = life
        self.rank = rank
        self.generation = 0
        self.step = 0
        self.zombie_saves = 0
        self.pending: list[Version] = []
        self.not_staged: set[int] = set()
        self._holder: Holder | None = None
        self._born_s = world.kernel.now_s
        self._has_declared = False
        self._has_read_s3 = False
        self._to_read: list[ShardSources] = []

    def later(self, delay_s: float, run: Callable[[], None]) -> None:
        """Run something of this process, unless it is dead by then; after it woke, if it hangs."""

        def fire() -> None:
            if not self.is_alive:
                return
            if (wait_s := self.host.hung_until_s - self.world.kernel.now_s) > 0:
                self.world.kernel.after(wait_s + 0.001, fire)
            else:
                run()

        self.world.kernel.after(delay_s, fire)

    def fail(self, why: object) -> None:
        """The process ends with an error."""
        self.world.kernel.log("rank %d of %s ends: %s", self.rank, self.life.name, why)
        self.is_alive = False

    # -- begin and restore ----------------------------------------------------------------------

    def begin(self) -> None:
        """Ask from where to go on, until there is an answer."""
        life, coordinator = self.life, self.world.coordinator
        event = m.BeginAsked(
            life.name, self.rank, life.world_size, self.world.setup.settings, *life.asked,
            owner=life.owner,
        )  # fmt: skip
        self.world.network.call(
            "begin", self, coordinator, ASK_TIMEOUT_S,
            lambda reply: coordinator.begin(event, reply), self._begun,
        )  # fmt: skip

    def _begun(self, outcome: Outcome) -> None:
        if isinstance(outcome, Resolution):
            self.world.oracle.answered(self.life.name, outcome)
            self.generation = outcome.generation
            if outcome.version is None:
                self._ready()
            elif len(outcome.shards) != len(self.world.oracle.ranks_of(outcome.version)):
                self.fail("shards are missing")
            else:
                self.step = outcome.version.step + self.world.setup.settings.memory.every_steps
                saved, mine = outcome.shards, self.rank % len(outcome.shards)
                self._to_read = list(saved[mine :: self.life.world_size])
                self._restore(self._to_read.pop(0))
        elif not outcome.retryable:
            if isinstance(outcome, NameInUseError) and self.life is self.world.launcher.life:
                self.world.oracle.counts["names in use"] += 1
                self.world.launcher.end(outcome.pid)
            self.fail(outcome)
        elif self.world.kernel.now_s - self._born_s < BEGIN_TIMEOUT_S:
            self.later(1.0, self.begin)
        else:
            self.fail("no answer")

    def _restore(self, sources: ShardSources) -> None:
        near_first = sorted(sources.holders, key=lambda h: h.node_id != self.host.place)
        places: list[HolderId | None] = [*near_first, *([None] if sources.is_durable else [])]
        self._read_next(sources, places, {})

    def _read_next(
        self, sources: ShardSources, places: list[HolderId | None], have: dict[int, int]
    ) -> None:
        """Read what is still missing from the next place; None is S3."""
        digests, key = sources.record.digests, sources.record.key
        if len(have) == len(digests):
            content = tuple(have[i] for i in range(len(digests)))
            self.world.oracle.restored(key.version, key.rank, content)
            if self._to_read:  # fewer ranks than saved it: each reads several shards
                self._restore(self._to_read.pop(0))
            else:
                self._tell_restored()
                self._ready()
            return
        if not places:
            self._give_up(key, is_rotten=sources.is_durable and self._has_read_s3)
            return

        def got(outcome: Outcome) -> None:
            if place is None:
                self._has_read_s3 = not isinstance(outcome, TieredError)
            if not isinstance(outcome, TieredError):
                for index, content in outcome.items():
                    if self.world.cores.is_same(digest(content), digests[index]):
                        have.setdefault(index, content)
            self.later(0.0, lambda: self._read_next(sources, places, have))

        place = places.pop(0)
        if place is None:
            self.world.store.request(lambda: dict(enumerate(self.world.stored(key) or ())), got)
            return
        peer = self.world.holder_on(place.node_id)

        def serve(reply: Reply) -> None:
            if not peer.chunks.get(key):
                raise ShardNotHeldError(peer.id.node_id, str(key))
            reply(dict(peer.chunks[key]))

        self.world.network.call("fetch", self, peer, STAGE_TIMEOUT_S, serve, got)

    def _tell_restored(self) -> None:
        """Nobody waits for the answer."""
        coordinator = self.world.coordinator
        self.world.network.call(
            "progress", self, coordinator, STAGE_TIMEOUT_S,
            lambda reply: coordinator.report_restored(self.generation, self.rank, reply),
        )  # fmt: skip

    def _give_up(self, key: ShardKey, *, is_rotten: bool) -> None:
        """The process ends; if S3 has something else than was saved, the next one must know."""

        def told(_: Outcome) -> None:
            self.fail(f"no intact copy of {key}")

        coordinator = self.world.coordinator
        if is_rotten:
            self.world.network.call(
                "progress", self, coordinator, STAGE_TIMEOUT_S,
                lambda reply: coordinator.report_unreadable(key.version, key.rank, reply), told,
            )  # fmt: skip
        else:
            told(None)

    def _ready(self) -> None:
        self.life.arrive(self)

    # -- save -----------------------------------------------------------------------------------

    def save(self) -> None:
        """Save the current step, if the coordinator says so; or if there is room, as it seems."""
        self._ask_to_save(self.world.kernel.now_s + ROOM_TIMEOUT_S)

    def _ask_to_save(self, deadline_s: float) -> None:
        world, version = self.world, Version(self.generation, self.step)
        coordinator, memory = world.coordinator, world.setup.settings.memory
        not_staged = tuple(sorted(self.not_staged - {self.step}))
        self.not_staged.add(self.step)  # until it is

        def heard(outcome: Outcome) -> None:
            if isinstance(outcome, FencedError):
                self.fail(outcome)
            elif isinstance(outcome, Admission):
                self.not_staged = {self.step}
                for step in outcome.instead_of:
                    self._drop(Version(self.generation, step))
                if outcome.is_admitted:
                    self.later(self._stopped_s(), self._stage)
                else:
                    self.later(0.0, self._skip)
            elif outcome is None and world.kernel.now_s < deadline_s:
                self.later(1.0, lambda: self._ask_to_save(deadline_s))
            elif len(self.pending) < memory.in_flight:
                self.later(0.0, self._stage)
            else:
                self.later(0.0, self._skip)

        world.network.call(
            "admit", self, coordinator, ADMIT_TIMEOUT_S,
            lambda reply: coordinator.admit(version, not_staged, reply), heard,
        )  # fmt: skip

    def _stopped_s(self) -> float:
        """Now and then a trainer is stopped when it has been told to save; it wakes up and does.

        By then it may be a zombie, and nobody is asked again: the holder has to refuse it.
        """
        random, is_spared = self.world.kernel.random, self.world.setup.profile == "links"
        if self.world.faults.is_over or is_spared or random.random() >= STOPPED_SHARE:
            return 0.0
        self.world.oracle.counts["fault stopped"] += 1
        return random.uniform(5.0, 2 * STALL_S)

    def _drop(self, version: Version) -> None:
        holder = self._own_holder()
        self.world.network.call(
            "drop_step", self, holder, STAGE_TIMEOUT_S,
            lambda reply: reply(holder.drop_step(version)),
        )  # fmt: skip

    def _skip(self) -> None:
        """See whether what is on its way has gone with the own holder."""
        self._hear_news()

        def heard(outcome: Outcome) -> None:
            if isinstance(outcome, HolderDiedError):
                self._bury_holder()
            self._next()

        self._tell(self._own_holder(), lambda: None, heard)

    def _hear_news(self) -> None:
        """Ask how the saves on their way are doing."""
        asked, coordinator = list(self.pending), self.world.coordinator

        def heard(outcome: Outcome) -> None:
            if isinstance(outcome, dict):
                for version, (level, problem) in outcome.items():
                    self.world.oracle.told(version, level)
                    if (level is not None or problem) and version in self.pending:
                        self.pending.remove(version)

        self.world.network.call(
            "progress", self, coordinator, 5.0,
            lambda reply: coordinator.progress(asked, reply), heard,
        )  # fmt: skip

    def _stage(self) -> None:
        """Save the shard, once this host has room for what the policy asks for."""
        holder = self._own_holder()
        need = Reservation(self.generation, self.world.setup.need, "")

        def declared(outcome: Outcome) -> None:
            self._has_declared = not isinstance(outcome, TieredError)
            if self._has_declared:
                self._stage_chunks()
            else:
                self._staged({0: outcome}, is_refused=isinstance(outcome, MemoryBudgetError))

        if self._has_declared:
            self._stage_chunks()
        else:
            self._tell(
                holder,
                lambda: holder.core.reserve(self.world.job_name, self.rank, need),
                declared,
            )

    def _stage_chunks(self) -> None:
        setup = self.world.setup
        key = ShardKey(self.world.job_name, Version(self.generation, self.step), self.rank)
        world_size = self.life.world_size
        plan = ShardPlan(world_size, (1,) * setup.chunks, self.world.kernel.now_s)
        content = self.world.oracle.save(key, setup.chunks, world_size)
        holder = self._own_holder()

        def stage(index: int, done: Reply) -> None:
            self._tell(holder, lambda: holder.stage_chunk(key, plan, index, content[index]), done)

        gather({i: partial(stage, i) for i in range(setup.chunks)}, self._staged)

    def _own_holder(self) -> Holder | None:
        """The holder that was here when this process last looked."""
        if self._holder is None:
            self._holder = self.world.holder_on(self.host.place)
        return self._holder

    def _bury_holder(self) -> None:
        """It has died, and with it what it had not passed on."""
        self._holder, self._has_declared = None, False
        self.not_staged.update(version.step for version in self.pending)

    def _tell(
        self, holder: Holder | None, serve: Callable[[], None], done: Reply, deadline_s: float = 0.0
    ) -> None:
        """Have the own holder do something, and again if the call was lost: it may have run."""
        now_s = self.world.kernel.now_s
        deadline_s = deadline_s or now_s + STAGE_TIMEOUT_S

        def heard(outcome: Outcome) -> None:
            if isinstance(outcome, CallLostError):
                self.world.oracle.counts["calls repeated"] += 1
                self._tell(holder, serve, done, deadline_s)
            else:
                done(outcome)

        self.world.network.call(
            "stage", self, holder, deadline_s - now_s, lambda reply: reply(serve()), heard
        )

    def _staged(self, outcomes: dict[int, Outcome], *, is_refused: bool = False) -> None:
        """The save is staged; or it is not, and training goes on, unless it never can be."""
        failures = [o for o in outcomes.values() if isinstance(o, TieredError)]
        fatal = next((f for f in failures if is_refused or isinstance(f, FencedError)), None)
        if fatal is not None:
            self.fail(fatal)
            return
        if any(isinstance(f, MemoryBudgetError) for f in failures):
            self.world.oracle.counts["saves refused"] += 1
        if not failures:
            self.pending.append(Version(self.generation, self.step))
            self.not_staged.discard(self.step)
        elif any(isinstance(f, HolderDiedError) for f in failures):
            self._bury_holder()
        self._hear_news()
        self._next()

    def _next(self) -> None:
        self.step += self.world.setup.settings.memory.every_steps
        self.life.arrive(self)


class LifeOfJob:
    """The ranks that were started together."""

    def __init__(
        self, world: "World", name: Life, hosts: list[Host], asked: tuple[int | None, int | None]
    ) -> None:
        self.world = world
        self.name = name
        self.asked = asked
        self.is_given_up = False
        self.progress_s = world.kernel.now_s
        setup = world.setup
        most = setup.ranks
        self.world_size = world.kernel.random.randint(1, most) if setup.is_elastic else most
        self.ranks = [
            Rank(world, self, rank, hosts[rank % len(hosts)]) for rank in range(self.world_size)
        ]
        self.arrived: set[int] = set()
        self.owner: Owner | None = None
        if setup.runs_apart:
            place, number = self.ranks[0].host.place, world.launcher.lives
            self.owner = Owner(f"run-{number}", place, place, number, world.kernel.now_s, name)

    def start(self) -> None:
        """Every process starts, in its own time."""
        for rank in self.ranks:
            rank.later(self.world.kernel.uniform(0.1, 3.0), rank.begin)

    def arrive(self, rank: Rank) -> None:
        """A rank has done its part of a step; when all have, the next one begins."""
        pause_s = self.world.setup.step_s * self.world.kernel.uniform(0.5, 1.5)
        if self.is_given_up:
            rank.zombie_saves += 1
            if rank.zombie_saves <= ZOMBIE_SAVES:
                rank.later(pause_s, rank.save)
            else:
                rank.fail("a zombie at rest")
            return
        self.progress_s = self.world.kernel.now_s
        self.arrived.add(rank.rank)
        if len(self.arrived) == len(self.ranks):
            self.arrived.clear()
            self._go(pause_s)

    def _go(self, pause_s: float) -> None:
        if self.world.is_paused and not self.is_given_up:
            self.progress_s = self.world.kernel.now_s
            self.world.kernel.after(1.0, self._go, pause_s)
            return
        for rank in self.ranks:
            rank.later(pause_s, rank.save)


class Launcher(Process):
    """Ray Train, or a person: starts a life, notices its end, starts the next."""

    def __init__(self, world: "World", host: Host) -> None:
        super().__init__(host)
        self.world = world
        self.life: LifeOfJob | None = None
        self.lives = 0
        self.everyone: list[Rank] = []
        self.asked: tuple[int | None, int | None] = (None, None)
        world.kernel.after(1.0, self.start)

    def start(self) -> None:
        """Start the next life on hosts that look well."""
        world = self.world
        hosts = [h for _, h in sorted(world.hosts.items()) if self._looks_well(h)]
        hosts = [h for h in hosts if h.place not in world.leaving] or hosts
        if not hosts:
            world.kernel.after(3.0, self.start)
            return
        first = world.kernel.random.randrange(len(hosts))
        name = Life(f"life-{self.lives}")
        self.lives += 1
        self.life = LifeOfJob(world, name, hosts[first:] + hosts[:first], self.asked)
        places = [r.host.place for r in self.life.ranks]
        world.kernel.log("%s starts on %s, asking for %s", name, places, self.asked)
        self.asked = (None, None)
        self.everyone = [r for r in self.everyone if r.is_alive] + self.life.ranks
        self.life.start()
        world.kernel.after(5.0, self._watch, self.life)

    def _looks_well(self, host: Host) -> bool:
        pairs = {(HEAD, host.place), (host.place, HEAD)}
        is_hung = host.hung_until_s > self.world.kernel.now_s
        return host.is_alive and not is_hung and not pairs & self.world.network.blocked

    def _watch(self, life: LifeOfJob) -> None:
        if life is not self.life:
            return
        waited_s = self.world.kernel.now_s - life.progress_s
        stall_s = STALL_S + 2 * self.world.setup.step_s
        limit_s = stall_s if any(r.generation for r in life.ranks) else BEGIN_TIMEOUT_S
        if not all(r.is_alive for r in life.ranks) or waited_s > limit_s:
            self.replace()
        else:
            self.world.kernel.after(self.world.kernel.uniform(1.0, 5.0), self._watch, life)

    def replace(self, *, kill: bool = True) -> None:
        """Give the present life up, kill what of it can be killed, start another one."""
        life, self.life = self.life, None
        if life is None:
            return
        life.is_given_up = True
        for rank in life.ranks:
            if kill and self._looks_well(rank.host):
                rank.is_alive = False
            elif not kill and rank.is_alive and rank.rank in life.arrived:
                rank.later(1.0, rank.save)
        self.world.kernel.after(self.world.kernel.uniform(0.5, 8.0), self.start)

    def is_present(self, owner: Owner) -> bool:
        """Whether a life's rank 0 is there, for somebody on its host."""
        now_s = self.world.kernel.now_s
        return any(
            r.is_alive and r.host.hung_until_s <= now_s
            for r in self.everyone
            if r.rank == 0 and r.life.owner == owner
        )

    def end(self, number: int) -> None:
        """End the life that an error names, where its hosts can be reached, as a person would."""
        for rank in self.everyone:
            owner = rank.life.owner
            if owner is not None and owner.pid == number and self._looks_well(rank.host):
                rank.is_alive = False

    def ranks_on(self, host: Host) -> list[Rank]:
        """Every process on a host."""
        return [r for r in self.everyone if r.host is host]
