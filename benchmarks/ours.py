"""Ours: a real Ray cluster on this machine, real trainers, real deaths; through the public API."""

import os
import signal
import time
import uuid
from typing import Any

import ray

import tiered
from benchmarks import observer
from benchmarks.contender import Loaded, Saved, WrongBytesError
from benchmarks.observer import Memory
from benchmarks.processes import ROOT
from benchmarks.state import StateSpec
from benchmarks.trainer import start_trainers
from chaos.local_cluster import MIB, LocalCluster
from chaos.ports import free_ports
from tiered.config import HAND_OVER

CALL_TIMEOUT_S = 240.0
JOIN_TIMEOUT_S = 60.0
POLL_S = 0.1
KEEP = 2
REPLICAS = 1
SAVES_IN_MEMORY = KEEP + 2  # those kept, one on its way, one being staged
STORE_SHARE = 0.75  # of an object store that a job may declare, with room to spare
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "GLOO_SOCKET_IFNAME": "lo",  # a machine's name need not resolve
    "RAY_worker_niceness": "0",  # as the limits and the peers; Ray's own is 15
}


def store_bytes(spec: StateSpec, ranks: int) -> int:
    """The object store that a host needs for `ranks` such states and their buddy's."""
    shard = spec.size_bytes + spec.tensors * 256 + 8 * MIB  # the header and the tree
    return max(
        100 * MIB, int((SAVES_IN_MEMORY + HAND_OVER) * (1 + REPLICAS) * ranks * shard / STORE_SHARE)
    )


class Ours:
    """Trainers on the first host or hosts of a cluster; the buddies are on other hosts."""

    name = "tiered"
    complete_means = "in a buddy host's RAM, checksum verified there, committed"
    restore_means = "from the host's RAM, verified, in a new process after SIGKILL of the trainers"
    is_protected = True
    warm_up_saves = SAVES_IN_MEMORY
    dies_each_time = True
    restores = True
    restores_from_peer = False

    def __init__(
        self,
        spec: StateSpec,
        ranks: int,
        *,
        hosts: int = 2,
        training_hosts: int = 1,
        chunk_bytes: int = 64 * MIB,
    ) -> None:
        """Nothing is started yet.

        Args:
            spec: One rank's state.
            ranks: On each host that trains.
            hosts: Of the cluster, at least 2.
            training_hosts: How many of them have ranks.
            chunk_bytes: `Memory.chunk_bytes`.
        """
        self.spec = spec
        self.ranks = ranks * training_hosts
        self._ranks_a_host = ranks
        self._hosts_wanted, self._training_hosts = hosts, training_hosts
        self._memory = {
            "every_steps": 1, "keep": KEEP, "replicas": REPLICAS, "chunk_bytes": chunk_bytes,
        }  # fmt: skip
        self._job = f"bench-{uuid.uuid4().hex[:8]}"
        self._cluster: LocalCluster | None = None
        self._places: list[str] = []
        self._trainers: list[Any] = []
        self._next: list[Any] = []
        self._next_places: list[str] = []
        self._saved = (-1, 1.0, -1)  # step, share that was stamped with it, step of the rest
        self._stamped = self._saved

    @property
    def cluster(self) -> LocalCluster:
        """The running cluster."""
        assert self._cluster is not None, "not started"
        return self._cluster

    @property
    def trainer_pids(self) -> list[int]:
        """Of the ranks: of the new ones when the old ones are dead."""
        return self._each("pid", actors=self._trainers or self._next)

    @property
    def holder_pids(self) -> dict[str, int]:
        """By node id."""
        return {
            host: process.pid
            for host in self.cluster.hosts
            for process in self.cluster.host_processes(host)
            if observer.command(process).startswith("ray::Holder")
        }

    @property
    def places(self) -> list[str]:
        """The ranks' hosts, by node id."""
        return list(self._places)

    @property
    def last_step(self) -> int:
        """See Contender."""
        return self._saved[0]

    def start(self) -> None:
        """Start the cluster and the trainers, and begin the job."""
        paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
        os.environ.update(ENVIRONMENT)
        handler = signal.getsignal(signal.SIGTERM)
        self._cluster = LocalCluster(
            self._hosts_wanted,
            cpus_per_host=1,
            object_store_bytes=store_bytes(self.spec, self._ranks_a_host),
            overcommit=True,
        ).start()
        signal.signal(signal.SIGTERM, handler)  # ray.init has put its own in place
        hosts = self.cluster.hosts[: self._training_hosts]
        self._places = [host for host in hosts for _ in range(self._ranks_a_host)]
        self._trainers = self._prepared(self._places, mine=True)
        self._each("restore", self._job, self._memory)

    def stamp(self, step: int, share: float = 1.0) -> None:
        """See Contender."""
        whole = step if share == 1.0 else self._stamped[2]
        self._each("stamp", step, share)
        self._stamped = (step, share, whole)

    def save(self, step: int) -> Saved:
        """See Contender."""
        saves = self._each("save", step)
        self._saved = self._stamped
        began_s = min(s["began_s"] for s in saves)
        ended_s = max(s["began_s"] + s["replicated_s"] for s in saves)
        return Saved(max(s["stall_s"] for s in saves), ended_s - began_s)

    def die(self) -> None:
        """SIGKILL every trainer; the new ones are on the same hosts."""
        self._next_places = self._places
        self._next = self._prepared(self._places, mine=False)
        for pid in self._each("pid"):
            self.cluster.kill_process(pid)
        self._trainers = []

    def lose_host(self) -> None:
        """SIGKILL the first training host and all in it; its ranks move to one without a copy."""
        lost = self._places[0]
        spare = self.cluster.add_host()
        home = self._host_without_copy(lost, spare)
        self._next_places = [home if place == lost else place for place in self._places]
        self._next = self._prepared(self._next_places, mine=False)
        # A step that was saved with the new host about, so that nothing is left to be arranged.
        step = self._saved[0] + 1
        self.stamp(step)
        self.save(step)
        if home in (home_of := self._copies()):
            raise RuntimeError(f"host {home[:8]} has copies already: {home_of}")
        pids = self._each("pid")
        self.cluster.kill_host(lost)
        for pid, place in zip(pids, self._places, strict=True):
            if place != lost:
                self.cluster.kill_process(pid)
        self._trainers = []

    def restore(self) -> Loaded:
        """See Contender."""
        trainers = self._next
        done = self._each("restore", self._job, self._memory, actors=trainers)
        self._trainers, self._next, self._places = trainers, [], self._next_places
        if (steps := {d["step"] for d in done}) != {self._saved[0]}:
            raise WrongBytesError(f"restored step {steps}, step {self._saved[0]} was committed")
        slowest = max(done, key=lambda d: float(d["seconds"]))
        return Loaded(slowest["seconds"], max(d["whole_s"] for d in done), slowest["source"])

    def check(self) -> None:
        """See Contender."""
        for rank, difference in enumerate(self._each("difference", *self._saved)):
            if difference is not None:
                raise WrongBytesError(f"rank {rank}: {difference}")

    def pids(self) -> list[int]:
        """The raylets of the hosts; everything on a host is below its raylet."""
        return [self.cluster.host_processes(host)[0].pid for host in self.cluster.hosts]

    def memory(self) -> Memory:
        """Of every process of the hosts, and what their object stores ever took."""
        processes = observer.tree(self.pids())
        return Memory(observer.anonymous_bytes(processes), observer.shared_bytes(processes))

    def idle_memory(self) -> tuple[Memory, int]:
        """An object store never gives memory back: counted is what it has to hold.

        That is the steps that are kept, and the memory that `Memory.prepare` has ready. A save
        fills the latter, and adds its replicas; what a step that it replaces leaves is ready next.
        """
        processes = observer.tree(self.pids())
        state = self.ranks * sum(part.size_bytes for part in self.spec.parts)
        idle = KEEP * state * (1 + REPLICAS) + state
        return Memory(observer.anonymous_bytes(processes), idle), REPLICAS * state

    def stop(self) -> None:
        """See Contender."""
        cluster, self._cluster = self._cluster, None
        self._trainers = self._next = []
        if cluster is not None:
            cluster.shutdown()

    def _prepared(self, places: list[str], *, mine: bool) -> list[Any]:
        actors = start_trainers(places)
        (port,) = free_ports(1)
        ray.get(
            [
                a.prepare.remote(self.spec.as_dict(), rank, len(actors), port, mine=mine)
                for rank, a in enumerate(actors)
            ],
            timeout=CALL_TIMEOUT_S,
        )
        return actors

    def _each(self, method: str, *args: Any, actors: list[Any] | None = None) -> list[Any]:
        calls = [getattr(a, method).remote(*args) for a in actors or self._trainers]
        return ray.get(calls, timeout=CALL_TIMEOUT_S)

    def _copies(self) -> set[str]:
        """Hosts with a copy of the newest step."""
        found = tiered.recover(self._job)
        names = {name.removeprefix("host ") for tiers in found.sources.values() for name in tiers}
        return {host for host in self.cluster.hosts if host[:8] in names}

    def _host_without_copy(self, lost: str, spare: str) -> str:
        """Wait until the spare host has been placed; the host that `lost` is not copied to."""
        deadline_s = time.monotonic() + JOIN_TIMEOUT_S
        while time.monotonic() < deadline_s:
            buddies = tiered.status(self._job).buddies
            if spare in buddies and lost in buddies:
                others = [h for h in self.cluster.hosts if h not in (lost, *buddies[lost])]
                return next(h for h in others if h not in self._places)
            time.sleep(POLL_S)
        raise TimeoutError(f"host {spare[:8]} was not placed within {JOIN_TIMEOUT_S:.0f} s")
