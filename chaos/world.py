"""What faults strike: a cluster of hosts on this machine, its job, and S3 behind a proxy."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil

from chaos import session_guard
from chaos.host_network import HostNetwork
from chaos.launcher import Launcher
from chaos.local_cluster import LocalCluster
from chaos.observer import Observer
from chaos.recorder import HistoryWriter
from chaos.s3_proxy import FaultProxy
from chaos.s3_server import S3Server

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Aim:
    """A fault that is ready to strike, and what it does to what the checker counts.

    Attributes:
        target: For a person.
        strike: Does it; may raise, and then has done nothing.
        mend: Undoes what lasts, if anything does.
        lost: Hosts whose copies are gone or damaged.
        away: Hosts that do not answer, or not everybody, until it is mended.
        avoided: Hosts that the launcher starts nothing on meanwhile, nor ends anything.
        is_s3: S3 is disturbed until it is mended.
        step: The only one whose copies are damaged; None if all may be.
        domain: The failure domain that `lost` is all of.
    """

    target: str
    strike: Callable[[], object]
    mend: Callable[[], object] | None = None
    lost: frozenset[str] = frozenset()
    away: frozenset[str] = frozenset()
    avoided: frozenset[str] = frozenset()
    is_s3: bool = False
    step: int | None = None
    domain: str = ""


@dataclass(slots=True)
class World:
    """The parts of a run.

    Attributes:
        cluster: The hosts; None on somebody's running cluster, of which only Ray's API is used.
        busy: Hosts that a fault has now: no other one strikes them.
        avoided: Hosts that the launcher leaves alone.
        is_s3_busy: S3 is disturbed.
        is_gcs_down: The head has no GCS.
        racks: Failure domains that hosts are spread over; 0 for none.
    """

    job: str
    history: HistoryWriter
    launcher: Launcher = field(init=False)  # its start needs the cluster
    observer: Observer = field(init=False)
    new_cluster: Callable[[], LocalCluster] = LocalCluster
    cluster: LocalCluster | None = None
    network: HostNetwork | None = None
    server: S3Server | None = None
    proxy: FaultProxy | None = None
    busy: set[str] = field(default_factory=set)
    avoided: set[str] = field(default_factory=set)
    is_s3_busy: bool = False
    is_gcs_down: bool = False
    least_hosts: int = 2
    racks: int = 0

    @property
    def local(self) -> LocalCluster:
        """The cluster, when it is this machine's."""
        assert self.cluster is not None, "a fault for hosts of this machine only"
        return self.cluster

    def start_cluster(self) -> None:
        """Start this machine's cluster; the one before, if any, has been shut down."""
        self.cluster = self.new_cluster()
        self.cluster.start()

    def end_cluster(self) -> None:
        """Shut this machine's cluster down, if one was started."""
        if self.cluster is not None:
            self.cluster.shutdown()

    def racks_of_hosts(self) -> dict[str, list[str]]:
        """The hosts in each failure domain."""
        racks: dict[str, list[str]] = {f"rack-{number}": [] for number in range(self.racks)}
        for host in self.local.hosts if self.racks else ():
            racks[self.local.labels_of(host)["rack"]].append(host)
        return racks

    def add_host(self) -> str:
        """Start one more host, in the rack that has the fewest."""
        racks = self.racks_of_hosts()
        rack = min(racks, key=lambda name: len(racks[name]), default=None)
        return self.local.add_host(None if rack is None else {"rack": rack})

    def free_hosts(self) -> list[str]:
        """Hosts that no fault has now, oldest first."""
        return [h for h in self.local.hosts if h not in self.busy]

    def spare_hosts(self, count: int) -> list[str]:
        """Hosts that may be taken down: so many that enough are left; empty if there are none."""
        free = self.free_hosts()
        return free if len(free) - count >= self.least_hosts else []

    def processes_of(self, node_id: str, title: str) -> list[psutil.Process]:
        """A host's actors of a class, by what Ray calls their processes; asks nobody."""
        return _titled(self.local.host_processes(node_id), title)

    def coordinator_processes(self) -> list[psutil.Process]:
        """The coordinator's process, if it runs."""
        return _titled(self.local.head_processes(), "Coordinator")

    def replace_dead_hosts(self) -> None:
        """A host that Ray gave up while it was away ends by itself; another takes its place."""
        for node_id in self.free_hosts():
            raylet = self.local.host_processes(node_id)[:1]
            if not raylet or not session_guard.is_running(raylet[0]):
                lost = [node_id]
                self.history.invoke("fault", mechanism="given up by Ray", lost=lost, away=[])
                self.local.kill_host(node_id)
                self.add_host()


def _titled(processes: Sequence[psutil.Process], title: str) -> list[psutil.Process]:
    found = []
    for process in processes:
        try:
            command = process.cmdline()
        except psutil.Error:  # it is gone
            continue
        if command and command[0].startswith(f"ray::{title}"):
            found.append(process)
    return found


def pick(candidates: Sequence[str], where: float) -> str:
    """The one of the candidates at `where`, from 0 to 1."""
    return candidates[int(where * len(candidates))]
