"""One simulated cluster with one job, from a seed; and its two phases.

For `Setup.fault_s` seconds everything may fail and only safety is judged. Then everything heals,
and by `Setup.idle_s` and `Setup.calm_s` later the cluster must have restored every redundancy,
answered its trainers, committed new steps, drained the flush and collected its garbage.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from replication.inventory import Inventory
from replication.membership import Membership, Node
from replication.records import HolderId, ShardKey, Version
from tests.sim.coordinator import Coordinator
from tests.sim.faults import Faults
from tests.sim.holder import Holder
from tests.sim.kernel import Kernel
from tests.sim.network import HEAD, Host, Network
from tests.sim.oracle import Oracle
from tests.sim.storage import Index, Store
from tests.sim.trainer import Launcher
from tiered import register
from tiered.config import S3, JobSettings, Memory
from tiered.job import Job

RAY_NOTICES_S = 12.0  # a host that died stays in the cluster's list for so long


def same(have: bytes, expected: bytes) -> bool:
    """Compare checksums."""
    return have == expected


@dataclass(frozen=True, slots=True)
class Cores:
    """What is under test; a mutant replaces some of it."""

    inventory: Callable[[HolderId, int], Inventory] = Inventory
    membership: Callable[[], Membership] = Membership
    job: Callable[[str], Job] = Job
    holder: type[Holder] = Holder
    coordinator: type[Coordinator] = Coordinator
    is_same: Callable[[bytes, bytes], bool] = same


@dataclass(frozen=True, slots=True)
class Setup:
    """The size of a run, and the job's settings.

    Attributes:
        capacity: Budget of a holder, in chunks (each counts as one byte).
        step_s: Time between saves.
        fault_s: Length of the first phase.
        idle_s: Then, with everything healed, training pauses for so long.
        calm_s: Then it goes on for so long.
    """

    hosts: int
    ranks: int
    chunks: int
    settings: JobSettings
    capacity: int = 1 << 30
    step_s: float = 5.0
    heartbeat_s: float = 2.0
    fault_s: float = 300.0
    idle_s: float = 130.0
    calm_s: float = 120.0


def draw_setup(seed: int, hosts: int | None = None, hours: float | None = None) -> Setup:
    """A small random cluster; or a given one, for so long."""
    rng = random.Random(seed)
    count = hosts or rng.choice((2, 3, 3, 4, 4, 5))
    replicas = rng.choice([None, *range(min(count, 3))])
    memory = Memory(every_steps=1, keep=rng.choice((2, 2, 3)), replicas=replicas)
    s3 = S3("s3://bucket", every_steps=rng.choice((2, 3, 5)), keep=rng.choice((1, 2, 3)))
    settings = JobSettings(memory, s3 if rng.random() < 0.6 else None)
    ranks = hosts or rng.choice((1, 2, 2, 3, 4))
    setup = Setup(count, ranks, rng.choice((1, 1, 2, 3)), settings)
    if hours is None:
        return setup
    fault_s = max(0.0, 3600.0 * hours - setup.idle_s - setup.calm_s)
    return Setup(count, ranks, 2, settings, step_s=60.0, fault_s=fault_s, calm_s=600.0)


class World:
    """Everything there is."""

    job_name = "job"

    def __init__(
        self, seed: int, setup: Setup, cores: Cores | None = None, *, is_traced: bool = False
    ) -> None:
        self.setup = setup
        self.cores = cores or Cores()
        self.kernel = Kernel(seed, is_traced=is_traced)
        self.network = Network(self.kernel)
        self.register = Index()
        self.store = Store(self.kernel)
        self.oracle = Oracle(self)
        self.head = Host(HEAD)
        self.hosts: dict[str, Host] = {}
        self.holders: dict[str, Holder] = {}
        self.is_paused = False
        self.coordinator: Coordinator
        self._names = 0
        self._nodes: tuple[Node, ...] = ()
        self._nodes_until_s = 0.0
        for _ in range(setup.hosts):
            self.add_host()
        self.coordinators: list[Coordinator] = []
        self.start_coordinator()
        self.launcher = Launcher(self, self.head)
        self.faults = Faults(self)

    # -- questions ------------------------------------------------------------------------------

    def nodes(self) -> tuple[Node, ...]:
        """Ray's list of hosts; it notices a death late."""
        now_s = self.kernel.now_s
        if now_s >= self._nodes_until_s:
            listed = [h for h in self.hosts.values() if h.is_alive or now_s < h.noticed_s]
            self._nodes_until_s = min((h.noticed_s for h in listed if not h.is_alive), default=inf)
            self._nodes = tuple(
                Node(h.place, h.domain, self.setup.capacity)
                for h in sorted(listed, key=lambda h: h.place)
            )
        return self._nodes

    def holder_on(self, place: str) -> Holder | None:
        """The holder that answers to a host's name, dead ones included."""
        return self.holders.get(place)

    def replicas(self) -> int:
        """Copies on other hosts that the policy asks for."""
        replicas = self.setup.settings.memory.replicas
        return 1 if replicas is None else replicas

    def claimed_generation(self) -> int:
        """The newest generation that the register knows."""
        return self.register.listing().newest_generation

    def stored(self, key: ShardKey) -> tuple[int, ...] | None:
        """A shard's chunks on S3."""
        return self.store.objects.get(register.shard_key(key.version, key.rank))

    # -- changes --------------------------------------------------------------------------------

    def add_host(self) -> Host:
        """A machine joins, under a name never used before."""
        place = f"h{self._names}"
        domain = f"rack{self._names % 3}" if self.setup.ranks % 2 else ""
        self._names += 1
        self.hosts[place] = Host(place, domain)
        self._nodes_until_s = 0.0
        return self.hosts[place]

    def start_holder(self, place: str) -> bool:
        """Start the holder of a host, or find the one that is there."""
        host, holder = self.hosts.get(place), self.holders.get(place)
        if host is None or not host.is_alive:
            return False
        if holder is None or not holder.is_alive:
            incarnation = f"i{self.kernel.random.randrange(1 << 20):05x}"
            self.holders[place] = self.cores.holder(self, host, incarnation)
        return True

    def start_coordinator(self) -> None:
        """A coordinator starts; from now on the name leads to it."""
        self.coordinator = self.cores.coordinator(self, self.head)
        self.coordinators.append(self.coordinator)

    def kill_holder(self, holder: Holder) -> None:
        """A holder's process ends, and its bytes are gone."""
        if holder.is_alive:
            holder.is_alive = False
            self.oracle.died(holder.id)
            for other in self.holders.values():
                other.peer_died(holder.id)

    def kill_host(self, host: Host) -> None:
        """A machine ends, with all that runs on it."""
        host.is_alive, host.noticed_s = False, self.kernel.now_s + RAY_NOTICES_S
        self._nodes_until_s = 0.0
        if (holder := self.holders.get(host.place)) is not None:
            self.kill_holder(holder)
        for rank in self.launcher.ranks_on(host):
            rank.is_alive = False

    # -- a run ----------------------------------------------------------------------------------

    def run(self) -> list[str]:
        """Both phases; returns every broken promise."""
        setup, oracle = self.setup, self.oracle
        self.faults.start()
        self.kernel.run(setup.fault_s)
        self._judge_budget()
        self.faults.heal()
        if self.is_paused:
            self.kernel.run(self.kernel.now_s + setup.idle_s)
            self._judge_redundancy()
            self.is_paused = False
        resumed_s = self.kernel.now_s
        settle_s = 0.0 if self.kernel.now_s > setup.fault_s else setup.idle_s / 2
        self.kernel.run(resumed_s + settle_s + setup.calm_s)
        self._judge_progress(resumed_s + settle_s)
        self._judge_redundancy()
        self._judge_garbage()
        return oracle.violations

    def _judge_budget(self) -> None:
        for holder in self.holders.values():
            if sum(map(len, holder.chunks.values())) > self.setup.capacity:
                self.oracle.violated("I7", f"{holder.id} holds more than its budget")

    def _judge_redundancy(self) -> None:
        """L3: whatever can be repaired is repaired."""
        oracle, now_s = self.oracle, self.kernel.now_s
        parent = oracle.parents.get(oracle.generation)
        needed = [v for v in oracle.newest_acked() if now_s - oracle.acked[v] > 60.0]
        need = 1 + min(self.replicas(), len([h for h in self.hosts.values() if h.is_alive]) - 1)
        if self.setup.settings.memory.replicas is None:
            need = min(need, 2)
        newest = max([*needed[:1], *([parent] if parent is not None else [])], default=None)
        if newest is None or newest < oracle.mark:  # holders may not take back what they collected
            return
        for rank in range(self.setup.ranks):
            have = self._held_copies(newest, rank)
            if oracle.has_copy(newest, rank) and len(have) < need:
                oracle.violated("L3", f"rank {rank} of {newest} has only {have}, not {need}")

    def _held_copies(self, version: Version, rank: int) -> list[str]:
        """Hosts with a copy, those included that do not know yet that theirs is corrupt."""
        key = ShardKey(self.job_name, version, rank)
        content = dict(enumerate(self.oracle.saved.get(key, ())))
        return sorted(
            holder.id.node_id
            for holder in self.holders.values()
            if holder.is_alive
            and (holder.chunks.get(key) == content or self._is_flipped(holder, key))
        )

    def _is_flipped(self, holder: Holder, key: ShardKey) -> bool:
        shard = holder.core.shards.get(key)
        return (holder.id, key) in self.oracle.lost_s and shard is not None and shard.is_sealed

    def _judge_progress(self, since_s: float) -> None:
        """L1, L2, L4: the job trains, commits and flushes."""
        oracle, settings = self.oracle, self.setup.settings
        fresh = sorted(v for v, at_s in oracle.acked.items() if at_s > since_s)
        if len(fresh) < settings.memory.keep + 2:
            oracle.violated("L1", f"only {len(fresh)} commits since all is well")
        due = [v for v in fresh if settings.is_due_for_s3(v.step)]
        late = [v for v in due if self.kernel.now_s - oracle.acked[v] > 60.0]
        if late and max(oracle.durable, default=Version(0, 0)) < max(late):
            oracle.violated("L4", f"{max(late)} is still not on S3")

    def _judge_garbage(self) -> None:
        """L5, I7: what is not needed any more is gone."""
        oracle, memory = self.oracle, self.setup.settings.memory
        acked = sorted(v for v in oracle.acked if v.generation == oracle.generation)
        if len(acked) < memory.keep + 2:
            return  # L1 says so
        in_flight, flushed = 3, 2 * (self.setup.settings.s3 is not None)
        for holder in self.holders.values():
            if not holder.is_alive:
                continue
            held = sorted({key.version for key in holder.chunks})
            if len(held) > memory.keep + in_flight + flushed:
                oracle.violated("I7", f"{holder.id} still holds {[str(v) for v in held]}")
            if held and held[0].generation < oracle.generation:
                oracle.violated("L5", f"{holder.id} still holds {held[0]}")
