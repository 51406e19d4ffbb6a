"""What fails, and when: a swarm of faults, of which each seed enables some."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.sim.limits import FLIP, MINUTE_S, S3_DELAY_S, S3_SLOW_S, VERY_LATE_S
from tests.sim.network import CALM, HEAD, Host, Weather
from tiered import register

if TYPE_CHECKING:
    from tests.sim.holder import Holder
    from tests.sim.world import World

SITES = (
    "stage", "take", "read", "report", "begin", "progress", "list", "fence", "set_buddies",
    "replicate", "collect", "verify", "upload", "fetch", "register",
)  # fmt: skip
ORDERS = frozenset({"collect", "fence", "register", "replicate", "report", "set_buddies"})
# Faults that together show what a mix of all would show once in many thousand seeds:
PROFILES = {
    "any": (),
    # Who was replaced goes on, and its orders are late.
    "zombies": ("ask", "twin", "coordinator", "rank", "swizzle", "hang"),
    # Again and again S3 is all that is left, and it is slow, silent or damaged.
    "clusters": ("cluster", "s3", "s3", "coordinator", "rank", "holder", "twin", "rot"),
    # Hosts that cannot reach each other for long, while all reach the head: saves must go on.
    "links": ("link",),
    # A job that crashes again and again, on hosts with not a byte to spare.
    "crashes": ("rank",),
}


class Faults:
    """Draws faults at random times until `heal`."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.is_over = False
        random = world.kernel.random
        self._kinds: dict[str, tuple[float, Callable[[], None]]] = {
            "host": (3.0, self._crash_host),
            "hosts": (1.0, self._crash_hosts),
            "holder": (2.0, self._crash_holder),
            "hang": (3.0, self._hang),
            "cut": (3.0, self._cut),
            "rank": (4.0, self._kill_rank),
            "twin": (1.5, self._start_twin),
            "coordinator": (4.0, self._crash_coordinator),
            "flip": (4.0, self._flip),
            "s3": (3.0, self._disturb_s3),
            "swizzle": (1.0, self._swizzle),
            "rot": (1.0, self._rot),
            "join": (1.0, self._join),
            "ask": (1.5, self._ask),
            "cluster": (0.15, self._lose_cluster),
            "link": (1.0, self._cut_for_long),
            "leave": (1.0, self._leave),
        }
        share = random.choice((0.3, 0.6, 1.0))
        self._enabled = [k for k in self._kinds if random.random() < share] or ["rank", "host"]
        self._gap_s = random.choice((3.0, 6.0, 12.0))
        scale = max(1.0, world.setup.fault_s / 600.0)
        self._gap_s *= min(scale, 20.0)
        self._weather = CALM
        if random.random() < 0.6:
            self._weather = Weather(
                loss=random.choice((0.0, 0.0, 0.01, 0.08)),
                repeat=random.choice((0.0, 0.1)),
                fire=random.choice((0.05, 0.25)),
                sites=frozenset(site for site in SITES if random.random() < 0.25),
                lost=random.choice((0.0, 0.02)),
            )
        self._weights = [self._kinds[kind][0] for kind in self._enabled]
        if kinds := PROFILES[world.setup.profile]:
            self._enabled, self._weights = list(kinds), [1.0] * len(kinds)
            self._weather = CALM
        if world.setup.profile == "links":
            self._gap_s = random.choice((8.0, 16.0, 32.0))
        if world.setup.profile == "zombies":
            self._weather = Weather(repeat=0.2, fire=0.5, sites=ORDERS, late_s=VERY_LATE_S)

    def start(self) -> None:
        """From now on everything may fail."""
        self.world.network.weather = self._weather
        self.world.kernel.log(
            "faults: %s every %g s; %s, late: %s",
            self._enabled,
            self._gap_s,
            self._weather,
            sorted(self._weather.sites),
        )
        self._wait()

    def heal(self) -> None:
        """From now on nothing fails; what is broken is mended within seconds."""
        world = self.world
        world.kernel.log("all heals")
        self.is_over = True
        world.network.weather = CALM
        world.network.blocked.clear()
        for host in world.hosts.values():
            host.hung_until_s = min(host.hung_until_s, world.kernel.now_s)
        store = world.store
        store.is_up, store.delay_s, store.loss = True, S3_DELAY_S, 0.0
        leaving = [h for h in self._alive() if h.place in world.leaving]
        if leaving and world.kernel.random.random() < 0.5:  # else they are still there at the end
            for host in leaving:
                self._go_away(host)
        staying = [h for h in self._alive() if h.place not in world.leaving]
        missing = world.setup.hosts - len(staying)
        for _ in range(missing):
            world.add_host()
        if world.kernel.random.random() < 0.5:
            world.is_paused = True
            if world.kernel.random.random() < 0.7:
                world.launcher.replace()
            elif world.kernel.random.random() < 0.5:
                self._flip(newest=True)  # nobody will read it for long

    def _wait(self) -> None:
        delay_s = self.world.kernel.random.expovariate(1 / self._gap_s)
        self.world.kernel.after(delay_s, self._strike)

    def _strike(self) -> None:
        if self.is_over:
            return
        kind = self.world.kernel.random.choices(self._enabled, self._weights)[0]
        self._kinds[kind][1]()
        self.world.oracle.counts[f"fault {kind}"] += 1
        self._wait()

    def _later(self, low_s: float, high_s: float, run: Callable[[], None]) -> None:
        """Undo something after a while, log-uniformly, unless all has healed by then."""
        ratio = high_s / low_s
        delay_s = low_s * ratio ** self.world.kernel.random.random()
        self.world.kernel.after(delay_s, lambda: None if self.is_over else run())

    def _alive(self) -> list[Host]:
        return [h for _, h in sorted(self.world.hosts.items()) if h.is_alive]

    def _a_host(self) -> Host | None:
        alive = self._alive()
        return self.world.kernel.random.choice(alive) if alive else None

    # -- hosts and processes --------------------------------------------------------------------

    def _crash_host(self) -> None:
        if (host := self._a_host()) is not None:
            self.world.kernel.log("host %s crashes", host.place)
            self.world.kill_host(host)
            self._later(1.0, 2 * MINUTE_S, self._replace_host)

    def _replace_host(self) -> None:
        staying = [h for h in self._alive() if h.place not in self.world.leaving]
        if len(staying) < self.world.setup.hosts:
            self.world.kernel.log("host %s joins", self.world.add_host().place)

    def _crash_hosts(self) -> None:
        for _ in range(1 + self.world.kernel.random.randrange(1 + self.world.replicas())):
            self._crash_host()

    def _join(self) -> None:
        if len(self._alive()) <= self.world.setup.hosts:
            self.world.kernel.log("host %s joins", self.world.add_host().place)

    def _leave(self) -> None:
        """A host is said to go away, and goes a while later, as a spot instance does."""
        if (host := self._a_host()) is not None:
            self.world.kernel.log("host %s will go away", host.place)
            self.world.leave(host)
            self._later(3.0, 2 * MINUTE_S, lambda: self._go_away(host))

    def _go_away(self, host: Host) -> None:
        if host.is_alive:
            self.world.kernel.log("host %s goes away", host.place)
            self.world.kill_host(host)
            self._later(1.0, MINUTE_S, self._replace_host)

    def _crash_holder(self) -> None:
        holder = self._a_holder()
        if holder is not None:
            self.world.kernel.log("holder %s crashes", holder.id)
            self.world.kill_holder(holder)

    def _a_holder(self) -> "Holder | None":
        alive = [h for _, h in sorted(self.world.holders.items()) if h.is_alive]
        return self.world.kernel.random.choice(alive) if alive else None

    def _hang(self) -> None:
        if (host := self._a_host()) is not None:
            for_s = 1.0 * 25.0 ** self.world.kernel.random.random()
            host.hung_until_s = self.world.kernel.now_s + for_s
            self.world.network.note_trouble(host)
            self.world.kernel.log("host %s hangs for %.0f s", host.place, for_s)
            self.world.kernel.after(for_s, self.world.network.note_trouble, host)

    def _kill_rank(self) -> None:
        life = self.world.launcher.life
        if life is not None:
            rank = self.world.kernel.random.choice(life.ranks)
            rank.fail("killed")

    def _start_twin(self) -> None:
        self.world.kernel.log("a second life is started beside the first")
        self.world.launcher.replace(kill=False)

    def _crash_coordinator(self) -> None:
        world, old = self.world, self.world.coordinator
        is_zombie = world.kernel.random.random() < 0.3
        world.kernel.log("the coordinator %s", "is cut off" if is_zombie else "dies")
        if is_zombie:
            self._later(3.0, MINUTE_S, lambda: setattr(old, "is_alive", False))
            world.kernel.after(MINUTE_S, setattr, old, "is_alive", False)
        else:
            old.is_alive = False
        world.start_coordinator()

    def _ask(self) -> None:
        """The next life resumes from an older step on purpose."""
        launcher, random = self.world.launcher, self.world.kernel.random
        if not self.world.oracle.acked:
            return
        steps = sorted(self.world.oracle.acked)
        if random.random() < 0.5:  # what is being collected just now
            steps = steps[-self.world.setup.settings.memory.keep - 1 :]
        step = random.choice(steps).step
        launcher.asked = (step, None) if random.random() < 0.5 else (None, step)
        launcher.replace()

    # -- links, bytes, S3 -----------------------------------------------------------------------

    def _cut(self) -> None:
        """A link goes, or a host is cut off from all; in one direction or in both."""
        network, random = self.world.network, self.world.kernel.random
        places = [HEAD, *(h.place for h in self._alive())]
        one = random.choice(places)
        others = [p for p in places if p != one]
        if random.random() < 0.5:
            others = [random.choice(others)] if others else []
        pairs = {(one, other) for other in others}
        if random.random() < 0.7:
            pairs |= {(other, one) for other in others}
        self.world.kernel.log("cut: %s", sorted(pairs))
        network.blocked |= pairs
        self._later(2.0, 1.5 * MINUTE_S, lambda: network.blocked.difference_update(pairs))

    def _cut_for_long(self) -> None:
        """The link of two hosts goes, one way or both, for longer than a save may wait."""
        network, random = self.world.network, self.world.kernel.random
        places = [h.place for h in self._alive()]
        if len(places) < 2:
            return
        one, other = random.sample(places, 2)
        pairs = {(one, other)} | ({(other, one)} if random.random() < 0.5 else set())
        self.world.kernel.log("cut for long: %s", sorted(pairs))
        network.blocked |= pairs
        self._later(MINUTE_S, 3 * MINUTE_S, lambda: network.blocked.difference_update(pairs))

    def _swizzle(self) -> None:
        """Hosts are cut off from the head one by one, and come back one by one in another order."""
        network, random, kernel = self.world.network, self.world.kernel.random, self.world.kernel
        hosts = [h.place for h in self._alive()]
        hosts = random.sample(hosts, random.randint(1, len(hosts))) if hosts else []
        kernel.log("swizzle: %s", hosts)
        gap_s = random.choice((0.5, 2.0, 5.0))

        def change(change: Callable[[set[tuple[str, str]]], None], place: str) -> None:
            if not self.is_over:
                change({(HEAD, place), (place, HEAD)})

        for turn, place in enumerate(hosts):
            kernel.after(turn * gap_s, change, network.blocked.update, place)
        for turn, place in enumerate(random.sample(hosts, len(hosts)), start=len(hosts)):
            kernel.after(turn * gap_s, change, network.blocked.difference_update, place)

    def _flip(self, *, newest: bool = False) -> None:
        holder, random = self._a_holder(), self.world.kernel.random
        if holder is None:
            return
        keys = [k for k, shard in sorted(holder.core.shards.items()) if shard.is_sealed]
        if newest:
            keys = [k for k in keys if k.version == keys[-1].version]
        key = random.choice(keys) if keys else None
        if key is not None and holder.chunks.get(key):
            index = random.choice(sorted(holder.chunks[key]))
            for spoilt in holder.flip(key, index):
                self.world.oracle.flipped(holder.id, spoilt)
                self.world.kernel.log("a bit of %s flips on %s", spoilt, holder.id)

    def _disturb_s3(self) -> None:
        store, random = self.world.store, self.world.kernel.random
        kind = random.choice(("down", "slow", "flaky"))
        store.trouble_s = self.world.kernel.now_s
        self.world.kernel.log("S3 is %s", kind)
        store.is_up = kind != "down"
        store.delay_s = S3_SLOW_S if kind == "slow" else S3_DELAY_S
        store.loss = 0.4 if kind == "flaky" else 0.0

        def mend() -> None:
            store.is_up, store.delay_s, store.loss = True, S3_DELAY_S, 0.0
            store.trouble_s = self.world.kernel.now_s
            self.world.kernel.log("S3 is well")

        self._later(3.0, 2 * MINUTE_S, mend)

    def _rot(self) -> None:
        """A shard on S3 is not what was stored, or shorter."""
        world, random = self.world, self.world.kernel.random
        versions = sorted(world.oracle.durable)
        if not versions:
            return
        version = random.choice(versions)
        rank = random.randrange(len(world.oracle.ranks_of(version)))
        key = register.shard_key(version, rank)
        if world.store.objects.get(key):
            *others, last = world.store.objects[key]
            world.store.objects[key] = (*others, *([last + FLIP] if random.random() < 0.5 else []))
            world.oracle.rotten.add(version)
            world.kernel.log("rank %d of %s rots on S3", rank, version)

    def _lose_cluster(self) -> None:
        """Everything but S3 is gone; a new cluster takes the job up."""
        world = self.world
        world.kernel.log("the cluster is lost")
        for host in self._alive():
            world.kill_host(host)
        world.hosts.clear()
        world.holders.clear()
        world.leaving.clear()
        for coordinator in world.coordinators:
            coordinator.is_alive = False
        world.clusters += 1
        world.register.delete(tuple(world.register.entries))
        world.network.blocked.clear()
        world.oracle.cluster_lost(register.read_parents(world.store.index.entries))
        for _ in range(world.setup.hosts):
            world.add_host()
        world.start_coordinator()
