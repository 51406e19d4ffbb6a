"""Everything that a test can do to a small cluster, and what must be true once it is left alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from replication import messages
from replication.inventory import Inventory
from replication.records import HolderId, Life, ShardKey, Version
from tests.property.protocol.coordinator import Coordinator, Register
from tests.property.protocol.holder import Bytes, Holder
from tests.property.protocol.model import Broken, Model
from tests.property.protocol.network import HEAD, Network
from tests.property.protocol.trainer import JobLife, Rank
from tiered.config import JobSettings
from tiered.job import Job

TAMPER = ("lose", "lose the answer", "double", "lose")
SETTLED = 4000  # deliveries; by then a healthy cluster has long come to rest
REPAIR_S = 130.0  # an order to copy that was not carried out is given again


def _is_same(have: bytes, expected: bytes) -> bool:
    return have == expected


@dataclass(frozen=True, slots=True)
class Cores:
    """What is under test."""

    job: Callable[[str], Job] = Job
    inventory: Callable[[HolderId, int], Inventory] = Inventory
    is_same: Callable[[bytes, bytes], bool] = _is_same


@dataclass(frozen=True, slots=True)
class Setup:
    """The size of a cluster; each chunk is a byte."""

    hosts: int
    ranks: int
    chunks: int
    settings: JobSettings
    capacity: int = 1 << 20
    is_frozen: bool = False  # what is not in the first chunk never changes

    @property
    def is_roomy(self) -> bool:
        return self.capacity >= 1 << 20


@dataclass
class Cluster:
    """One job on a few hosts."""

    setup: Setup
    cores: Cores = field(default_factory=Cores)
    name: str = "job"

    def __post_init__(self) -> None:
        self.now_s = 0.0
        self.weather = 0
        self.network = Network()
        self.register = Register()
        self.model = Model(self)
        self.holders: dict[str, Holder] = {}
        self.lives: list[JobLife] = []
        for host in "ABCD"[: self.setup.hosts]:
            self.holders[host] = Holder(self, HolderId(host, "1"))
        self.coordinator = Coordinator(self)
        self.settle()

    @property
    def hosts(self) -> list[str]:
        return sorted(self.holders)

    def is_reachable(self, host: str) -> bool:
        """Whether the coordinator and a live holder on this host hear each other."""
        return self.holders[host].is_alive and not self.network.is_cut(host, HEAD)

    # -- messages and time ----------------------------------------------------------------------

    def deliver(self, picks: Sequence[int]) -> None:
        for pick in picks:
            if self.network.pending:
                self.model.now += 1
                self.network.deliver(pick)

    def settle(self, order: int = 0) -> None:
        """Deliver everything, also what that sends: oldest first, newest first, or in turns.

        In bad weather every so many messages is lost, or answered in vain, or made again.
        """
        for count in range(1, SETTLED):
            if not self.network.pending:
                return
            pick = (0, -1, -(count % 2))[order]
            if self.weather and count % self.weather == 0:
                self.tamper(TAMPER[count // self.weather % len(TAMPER)], pick)
            else:
                self.deliver([pick])
        raise Broken(f"the messages never end: {self.network.trace[-20:]}")

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.model.now += 1
        self.coordinator.tick()
        for holder in self.holders.values():
            if holder.is_alive:
                holder.tick()

    # -- faults ---------------------------------------------------------------------------------

    def tamper(self, how: str, pick: int) -> None:
        """Lose a message, deliver it and lose the answer, or make the call twice."""
        self.model.now += 1
        match how:
            case "lose":
                self.network.lose(pick)
            case "lose the answer":
                self.network.deliver(pick, answer_lost=True)
            case _:
                self.network.double(pick)

    def crash(self, host: str) -> None:
        """A host dies, and what runs on it."""
        holder = self.holders[host]
        holder.is_alive = False
        self.model.holder_died(holder.id)
        for life in self.lives:
            for rank in life.ranks:
                rank.is_over |= rank.host == host

    def restart(self, host: str) -> None:
        """It comes back, with nothing in memory."""
        if not self.holders[host].is_alive:
            incarnation = int(self.holders[host].id.incarnation) + 1
            self.holders[host] = Holder(self, HolderId(host, str(incarnation)))

    def cut(self, one: str, other: str) -> None:
        if one != other:
            self.network.cut.add(frozenset((one, other)))
            for host in {one, other} - {HEAD} if HEAD in (one, other) else ():
                self.model.trouble(host)

    def mend(self) -> None:
        for pair in self.network.cut:
            for host in pair - {HEAD} if HEAD in pair else ():
                self.model.trouble(host)
        self.network.cut.clear()

    def flip(self, host: str, pick: int) -> None:
        """A bit of some pinned chunk flips, of the newest one by preference."""
        chunks = self.holders[host].chunks
        where = sorted(((key, i) for key, held in chunks.items() for i in held), reverse=True)
        if where:
            key, index = where[pick % len(where)]
            # Only of a shard that was sealed: before, the checksum is taken of what is there.
            if self.holders[host].id in self.model.copies[key]:
                old = chunks[key][index]
                new = Bytes(old | 1)  # true contents are even
                for sharer in [k for k, held in chunks.items() if held.get(index) is old]:
                    chunks[sharer][index] = new
                    self.model.flipped(self.holders[host].id, sharer)

    def replace_coordinator(self) -> None:
        self.coordinator.is_alive = False
        self.model.coordinator_died()
        self.coordinator = Coordinator(self)

    # -- the job --------------------------------------------------------------------------------

    def start_life(self, first: int, *, before: int | None = None, kill: bool = True) -> JobLife:
        """Give up the present life, and start another."""
        for life in self.lives:
            for rank in life.ranks:
                rank.is_over |= kill
        life = JobLife(self, Life(f"life {len(self.lives) + 1}"), before)
        alive = [host for host in self.hosts if self.holders[host].is_alive] or self.hosts
        for number in range(self.setup.ranks):
            life.ranks.append(Rank(number, alive[(first + number) % len(alive)]))
        self.lives.append(life)
        for rank in life.ranks:
            life.ask(rank)
        return life

    def drop_step(self, holder: Holder, version: Version) -> None:
        if holder.is_alive:
            holder.feed(messages.StepDropped(self.name, version))

    # -- once faults stop -----------------------------------------------------------------------

    def heal(self) -> None:
        """Everything heals; then the cluster must come to the state that was promised."""
        self.weather = 0
        self.mend()
        for host in self.hosts:
            self.restart(host)
        self._rest()
        life = self.start_life(0)
        for _ in range(10):
            self._rest(5.0)
            if life.is_ready or any(rank.is_over for rank in life.ranks):
                break
            for rank in life.ranks:
                life.ask(rank)
        if not life.is_ready:
            raise Broken(f"L1: {life.name} got no answer: {[rank.error for rank in life.ranks]}")
        if not self.setup.is_roomy:
            return
        self._check_repaired(self.register.parents[life.generation])
        self._check_saves(life)

    def _rest(self, seconds: float = REPAIR_S) -> None:
        for _ in range(4):
            self.wait(seconds)
            self.settle()

    def _check_repaired(self, parent: Version | None) -> None:
        """What was resumed from is whole again, corrupt copies replaced."""
        for _ in range(2 * self.setup.ranks):
            self._rest()
        if parent is None:
            return
        for key in self.model.keys(parent):
            hosts = {h.node_id for h in self._true_copies(key)}
            if len(hosts) < self._copies_possible:
                raise Broken(f"L3: {key} has copies on {sorted(hosts)} only")

    @property
    def _copies_possible(self) -> int:
        return min(1 + (self.setup.settings.memory.replicas or 0), self.setup.hosts)

    def _true_copies(self, key: ShardKey) -> list[HolderId]:
        true = dict(enumerate(self.model.saved[key]))
        every = self.holders.values()
        return [h.id for h in every if h.chunks.get(key) == true and key in h.core.shards]

    def _check_saves(self, life: JobLife) -> None:
        """New steps are committed, and what is older than the mark is gone everywhere."""
        job = self.coordinator.job
        everyone = list(range(self.setup.ranks))
        for _ in range(self.setup.settings.memory.keep + 1):
            step = life.step
            life.save(everyone)
            self.settle()
            self._rest(5.0)
            if job.commits.get(Version(life.generation, step)) is not False:
                raise Broken(f"L2: step {step} is not committed: {job.commits}")
        self._rest()
        if job.degraded:
            raise Broken(f"L3: {job.degraded}")
        for holder in self.holders.values():
            garbage = [k for k in holder.core.shards if k.version < self.model.mark]
            if garbage or holder.core.shards.keys() ^ holder.chunks.keys():
                raise Broken(f"L5: {holder.id} still has {garbage}")
