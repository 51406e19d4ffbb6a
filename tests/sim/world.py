"""One simulated cluster with one job, from a seed; and its two phases.

For `Setup.fault_s` seconds everything may fail and only safety is judged. Then everything heals,
and by `Setup.idle_s` and `Setup.calm_s` later the cluster must have restored every redundancy,
answered its trainers, committed new steps, drained the flush and collected its garbage.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from replication.inventory import Inventory
from replication.membership import Membership, Node
from replication.records import HolderId, ShardKey
from tests.sim.convergence import Convergence
from tests.sim.coordinator import Coordinator
from tests.sim.faults import Faults
from tests.sim.holder import Holder, digest
from tests.sim.kernel import Kernel
from tests.sim.limits import NODE_LOST_S, shrunk_cores
from tests.sim.network import HEAD, Host, Network
from tests.sim.oracle import Oracle
from tests.sim.storage import Index, Store
from tests.sim.trainer import Launcher
from tiered import register
from tiered.config import S3, JobSettings, Memory
from tiered.job import Job
from tiered.retention import KeepEvery, KeepInterval

# The first phase of a small run. Both lengths find about as much for the time that they take; most
# runs are short, so that there are many. What only links do takes longer than a short one to show.
SHORT_S, LONG_S, LONG_SHARE = 40.0, 100.0, 0.1
PATIENT_SHARE = 0.02  # of seeds: healing takes such a run several times as long


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
    read: Callable[[int], bytes] = digest


@dataclass(frozen=True, slots=True)
class Setup:
    """The size of a run, and the job's settings.

    Attributes:
        capacity: Budget of a holder, in chunks (each counts as one byte).
        need: What each rank declares that it will need on its host, in chunks.
        step_s: Time between saves.
        fault_s: Length of the first phase.
        idle_s: Then, with everything healed, training pauses for so long.
        calm_s: Then it goes on for so long.
        unchanged: The probability that a chunk, but the first, is what it was in the save before.
        profile: Which faults there are: one of `faults.PROFILES`.
        is_elastic: Each life has another number of ranks, at most `ranks`.
        runs_apart: Each life is of a run of its own: it does not succeed one that is still there.
        is_patient: Both end when their time is over, not when all is well.
    """

    hosts: int
    ranks: int
    chunks: int
    settings: JobSettings
    capacity: int = 1 << 30
    need: int = 1
    step_s: float = 4.0
    heartbeat_s: float = 3.0
    fault_s: float = SHORT_S
    idle_s: float = 60.0
    calm_s: float = 80.0
    unchanged: float = 0.0
    profile: str = "any"
    is_patient: bool = False
    is_elastic: bool = False
    runs_apart: bool = False


def draw_setup(
    seed: int,
    hosts: int | None = None,
    hours: float | None = None,
    *,
    is_elastic: bool = False,
    is_exact: bool = False,
) -> Setup:
    """A small random cluster; or a given one, for so long.

    `is_exact`: holders have just what the job declares, and nothing more.
    """
    rng = random.Random(seed)
    count = hosts or rng.choice((2, 3, 3, 4, 4, 5))
    replicas = rng.choice([None, *range(min(count, 3))])
    memory = Memory(every_steps=1, keep=rng.choice((2, 2, 3)), replicas=replicas)
    s3 = S3("s3://bucket", every_steps=rng.choice((2, 3, 5)), keep=rng.choice((1, 2, 3)))
    settings = JobSettings(memory, s3 if rng.random() < 0.6 else None)
    ranks = hosts or rng.choice((2, 3, 4, 4) if is_elastic else (1, 2, 2, 3))
    memory = replace(
        memory,
        backpressure=rng.choice(("skip", "skip", "wait", "replace")),
        in_flight=rng.choice((1, 2, 2, 3)),
        also_keep=rng.choice(((), (), (KeepEvery(4, at_most=2),), (KeepInterval(60.0, 2),))),
    )
    settings = replace(settings, memory=memory)
    chunks = rng.choice((1, 1, 1, 2))
    steps = memory.steps_budgeted + (2 if settings.s3 is not None else 0)  # as is declared
    copies = 2 if replicas is None else 1 + replicas
    need = steps * copies * chunks
    profile = rng.choices(("any", "zombies", "clusters", "crashes", "links"), (76, 8, 8, 4, 4))[0]
    if hours is not None or (profile == "clusters" and settings.s3 is None):
        profile = "any"
    is_exact = is_exact or profile == "crashes"
    spare = 0 if is_exact else 2 * memory.keep * copies * chunks
    a_host = -(-ranks // count)  # ranks, when every host is well
    setup = Setup(
        count,
        ranks,
        chunks,
        settings,
        capacity=(need + spare) * a_host * (rng.choice((1, 1, 3)) if spare else 1),
        need=need,
        profile=profile,
        is_patient=rng.random() < PATIENT_SHARE,
        is_elastic=is_elastic,
        unchanged=rng.choice((0.0, 0.8)) if chunks > 1 else 0.0,
        runs_apart=seed % 8 == 7,
        fault_s=LONG_S if profile == "links" or rng.random() < LONG_SHARE else SHORT_S,
    )
    if hours is None:
        return setup
    fault_s = max(0.0, 3600.0 * hours - setup.idle_s - setup.calm_s)
    return replace(setup, step_s=60.0, fault_s=fault_s, calm_s=600.0)


class World:
    """Everything there is."""

    job_name = "job"

    def __init__(
        self,
        seed: int,
        setup: Setup,
        cores: Cores | None = None,
        *,
        is_traced: bool = False,
        is_brief: bool = False,
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
        self.leaving: set[str] = set()  # hosts that were said to go away; the register knows
        self.is_paused = False
        self.is_brief = is_brief  # it ends with the first broken promise
        self.clusters = 1  # so many there have been
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

    def staying(self) -> list[Host]:
        """Hosts that nobody said would go away; all, if all will."""
        alive = [host for host in self.hosts.values() if host.is_alive]
        return [host for host in alive if host.place not in self.leaving] or alive

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

    def leave(self, host: Host) -> None:
        """A host is said to go away."""
        self.leaving.add(host.place)
        self.coordinator.leave(host.place)

    def kill_holder(self, holder: Holder) -> None:
        """A holder's process ends, and its bytes are gone."""
        if holder.is_alive:
            holder.is_alive = False
            self.oracle.died(holder.id)
            for other in self.holders.values():
                other.peer_died(holder.id)

    def kill_host(self, host: Host) -> None:
        """A machine ends, with all that runs on it."""
        host.is_alive, host.noticed_s = False, self.kernel.now_s + NODE_LOST_S
        self._nodes_until_s = 0.0
        if (holder := self.holders.get(host.place)) is not None:
            self.kill_holder(holder)
        for rank in self.launcher.ranks_on(host):
            rank.is_alive = False

    # -- a run ----------------------------------------------------------------------------------

    def run(self) -> list[str]:
        """Both phases; returns every broken promise."""
        with shrunk_cores():
            self._run()
        return self.oracle.violations

    def _run(self) -> None:
        setup = self.setup
        self.faults.start()
        self.kernel.run(setup.fault_s)
        self.faults.heal()
        Convergence(self).run()
