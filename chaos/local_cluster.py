"""A real Ray cluster of several hosts on this machine, whose hosts can be killed.

Each host is a raylet with its own object store, its own workers and its own loopback address
(127.M.N.2, .3, ...), so that whatever tells hosts apart by address (Ray Train's local ranks do)
sees several. The head, 127.M.N.1, has no CPU: like the head of a Kubernetes cluster it runs the
GCS and the driver, no trainer, and is never killed. M and N are from the process' id: another
cluster beside this one would else take over a killed host's address, and perhaps its port.

Raylets are started one after another. Four at once took 3 s instead of 7 s, but in one of three
runs two agents took each other's files, and a raylet died (ray 2.60).
"""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest import mock

import psutil
import ray
from ray._raylet import Config, GcsClient
from ray.cluster_utils import Cluster

from chaos import session_guard
from chaos.host_network import HostNetwork
from chaos.ports import free_ports

logger = logging.getLogger(__name__)

MIB = 1024 * 1024
HEAD_STORE_BYTES = 100 * MIB
# Ray checks no store against what is free where it is told both of these.
OVERCOMMITTED = {"memory": 4 << 30, "plasma_directory": "/dev/shm"}
LOOK_FOR_AGENT = "ray._private.utils.get_dashboard_dependency_error"
PREEMPTION = 2  # in Ray's autoscaler.proto: DRAIN_NODE_REASON_PREEMPTION

# A killed host's port refuses, which counts as one failure a period: dead after about 3 s. A
# timeout much shorter than this declares hosts dead that are merely busy importing torch.
QUICK_DETECTION: Mapping[str, int] = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
    # A pull that first chose the dead host would otherwise wait 10 s for it.
    "object_manager_pull_timeout_ms": 2000,
    "worker_niceness": 0,  # Ray's own is 15, with which trainers wait for whatever else runs here
}


class ProcessesLeftError(RuntimeError):
    """A cluster was ended, and some of its processes still run."""


class LocalCluster:
    """A head and `hosts` raylets; on exit nothing of it is left, whatever happened inside.

    Entering it starts the cluster and connects this process as its driver; one at a time in a
    process. The raylets, and so every actor and trainer, inherit `os.environ` as it is then.
    Should this process be SIGKILLed, a guard process ends the cluster.

    Args:
        hosts: How many to start with.
        cpus_per_host: Ray's logical CPUs of each.
        object_store_bytes: Size of each host's object store.
        labels: Ray node labels of the first hosts, in order, for example their failure domains.
        system_config: Ray settings over `QUICK_DETECTION`, by their names in `ray_config_def.h`.
        namespace: Ray namespace of the driver.
        disk_bytes: Give each host a disk (a tmpfs) of this size, for its object store and what that
            spills; needs root. 0: all share this machine's /dev/shm and temporary folder.
        network: Gives each host a network namespace of its own; started, and closed by its owner
            after this. Without one all hosts share this machine's loopback network.
        with_agents: Have Ray's dashboard agent, which exports metrics, run on each host, as with
            `pip install 'ray[default]'`. Each takes seconds of a processor to start.
        overcommit: Let the hosts' object stores be larger in sum than the memory that is free:
            what is used of them has to fit.
    """

    def __init__(
        self,
        hosts: int = 4,
        *,
        cpus_per_host: int = 1,
        object_store_bytes: int = 700 * MIB,
        labels: Sequence[Mapping[str, str]] = (),
        system_config: Mapping[str, Any] | None = None,
        namespace: str | None = None,
        disk_bytes: int = 0,
        network: HostNetwork | None = None,
        with_agents: bool = False,
        overcommit: bool = False,
    ) -> None:
        self._network = network
        self._subnet = f"127.{16 + os.getpid() // 250 % 200}.{os.getpid() % 250}"
        self._with_agents = with_agents
        self._more = dict(OVERCOMMITTED) if overcommit else {}
        self._initial_hosts = hosts
        self._cpus_per_host = cpus_per_host
        self._object_store_bytes = object_store_bytes
        self._labels = list(labels)
        slow_to_start = {"agent_register_timeout_ms": 120_000} if with_agents else {}
        self._system_config = {**QUICK_DETECTION, **slow_to_start, **(system_config or {})}
        self._namespace = namespace
        self._disk_bytes = disk_bytes
        self._folder = ""
        self._cluster: Any = None  # ray.cluster_utils has no types
        self._nodes: dict[str, Any] = {}
        self._labels_of: dict[str, Mapping[str, str]] = {}
        self._disks: dict[str, Path] = {}
        self._started = 0
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Address for `ray.init` in another process."""
        return str(self._cluster.address)

    @property
    def hosts(self) -> list[str]:
        """Node ids of the hosts that were not killed, oldest first; the head is not one."""
        return list(self._nodes)

    def start(self) -> Self:
        """Start everything and connect; on failure nothing is left running."""
        assert self._cluster is None, "a LocalCluster starts once"
        # Without these Ray asks for no token, or writes one into the home folder.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        Config.initialize("")  # or this process goes on by what it was told when Ray was imported
        # The sockets inside have long names, and a Unix socket's path ends at 107 bytes.
        self._folder = tempfile.mkdtemp(prefix="lc-", dir="/tmp")
        try:
            self._start_guard()
            network = self._network
            with self._session_environment():
                self._cluster = Cluster(
                    initialize_head=True,
                    # Ray's exit hooks replace the SIGTERM handler; shutdown and guard do better.
                    shutdown_at_exit=False,
                    head_node_args={
                        "num_cpus": 0,
                        "object_store_memory": HEAD_STORE_BYTES,
                        "include_dashboard": False,
                        # Its server runs all the same, and two clusters must not want one port.
                        "dashboard_port": free_ports(1)[0],
                        "temp_dir": os.path.join(self._folder, "ray"),
                        "_system_config": self._system_config,
                        "node_ip_address": f"{self._subnet}.1"
                        if network is None
                        else network.head_address,
                        **self._sockets(),
                    },
                )
            for _ in range(self._initial_hosts):
                self.add_host(self._labels.pop(0) if self._labels else None)
            ray.init(
                address=self.address,
                namespace=self._namespace,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except BaseException:
            self.shutdown()
            raise
        return self

    def add_host(self, labels: Mapping[str, str] | None = None) -> str:
        """Start one more host; returns its node id once it is part of the cluster."""
        sockets, network = self._sockets(), self._network
        address, disk = f"{self._subnet}.{self._started}", self._make_disk()
        if network is not None:
            address = network.add(self._started)
        where = contextlib.nullcontext() if network is None else network.inside(address)
        with self._session_environment(), where:
            node = self._cluster.add_node(
                num_cpus=self._cpus_per_host,
                object_store_memory=self._object_store_bytes,
                labels=dict(labels or {}),
                node_ip_address=address,
                **sockets,
                **self._more,
                **({"plasma_directory": disk, "object_spilling_directory": disk} if disk else {}),
            )
        node_id = str(node.node_id)
        self._nodes[node_id], self._labels_of[node_id] = node, dict(labels or {})
        if disk:
            self._disks[node_id] = Path(disk)
        return node_id

    def logs(self) -> dict[str, list[str]]:
        """The lines that each process of the cluster has logged so far, by its log's name."""
        files = Path(self._folder).glob("ray/session_*/logs/worker-*.err")
        return {file.name: file.read_text(errors="replace").splitlines() for file in files}

    def labels_of(self, node_id: str) -> Mapping[str, str]:
        """A host's Ray node labels, as they were given."""
        return self._labels_of[node_id]

    def disk_of(self, node_id: str) -> Path:
        """A host's disk.

        Raises:
            KeyError: Hosts have none of their own.
        """
        return self._disks[node_id]

    def address_of(self, node_id: str) -> str:
        """A host's IP address."""
        return str(self._nodes[node_id].node_ip_address)

    def head_processes(self) -> list[psutil.Process]:
        """Every process under the head's raylet: its workers, and so the coordinator."""
        raylet = psutil.Process(_raylet(self._cluster.head_node).pid)
        return raylet.children(recursive=True)

    def restart_gcs(self) -> None:
        """Start the head's GCS again after `kill_gcs`; it reads its tables from disk."""
        self._cluster.head_node.start_gcs_server()

    def kill_gcs(self) -> None:
        """SIGKILL the head's GCS; returns when it is gone.

        Unless its tables are in RocksDB or Redis, the cluster ends with it.
        """
        self._cluster.head_node.kill_gcs_server()

    def host_processes(self, node_id: str) -> list[psutil.Process]:
        """Every process of a host: its raylet first, then workers, actors and agents."""
        raylet = psutil.Process(_raylet(self._nodes[node_id]).pid)
        return [raylet, *raylet.children(recursive=True)]

    def kill_host(self, *node_ids: str) -> None:
        """SIGKILL the raylet and every process under it, as a power cut would; returns when gone.

        Ray is not told: the cluster has to find out by itself. Several hosts go at once.
        """
        raylets = [_raylet(self._nodes[node_id]) for node_id in node_ids]
        for raylet in raylets:
            os.kill(raylet.pid, signal.SIGSTOP)  # or it could start a worker that is not listed
        processes = [process for node_id in node_ids for process in self.host_processes(node_id)]
        session_guard.kill_processes(processes, timeout_s=5.0)
        for raylet in raylets:
            raylet.wait(timeout=5.0)  # an unreaped raylet keeps its orphaned actors alive for 40 s
        for node_id in node_ids:
            self._forget_host(node_id)

    def end_host(self, node_id: str) -> None:
        """SIGTERM the raylet, as a pod or an instance that is ended does; returns when it is gone.

        Ray is told, and nothing waits.
        """
        raylet = _raylet(self._nodes[node_id])
        raylet.terminate()
        raylet.wait(timeout=30.0)
        self._forget_host(node_id)

    def warn_host(self, node_id: str, notice_s: float) -> None:
        """Tell Ray that a host will be taken away, as a cloud does of a preemptible one.

        Ray places nothing there any more; nobody takes the host away but the caller.
        """
        deadline_ms = int((time.time() + notice_s) * 1000)
        client = GcsClient(address=self.address)
        is_accepted, reason = client.drain_node(node_id, PREEMPTION, "preempted", deadline_ms)
        assert is_accepted, reason

    def orphan_host(self, node_id: str) -> list[psutil.Process]:
        """SIGKILL a host's raylet alone, and do not reap it: its processes go on for a while.

        They do not notice before they look whether their parent is there, which a process that
        nobody has waited for still is. Returns them; `end_orphans` ends them.
        """
        raylet, *others = self.host_processes(node_id)
        raylet.kill()
        return others

    def end_orphans(self, node_id: str, others: list[psutil.Process]) -> None:
        """Reap the raylet that `orphan_host` killed, and SIGKILL what is left of its host."""
        session_guard.kill_processes(others, timeout_s=5.0)
        _raylet(self._nodes[node_id]).wait(timeout=5.0)
        self._forget_host(node_id)

    def _make_disk(self) -> str:
        """Mount the next host's disk, if hosts have their own; `end_session` unmounts it."""
        if not self._disk_bytes:
            return ""
        disk = os.path.join(self._folder, f"disk{self._started}")
        os.mkdir(disk)
        size = f"size={self._disk_bytes}"
        command = ["mount", "-t", "tmpfs", "-o", size, "chaos", disk]
        subprocess.run(command, check=True, capture_output=True, timeout=10.0)
        return disk

    def _forget_host(self, node_id: str) -> None:
        node = self._nodes.pop(node_id)
        if (disk := self._disks.pop(node_id, None)) is not None:
            session_guard.unmount(str(disk))
        self._cluster.worker_nodes.remove(node)
        if self._network is not None:
            self._network.remove(str(node.node_ip_address))

    def kill_process(self, pid: int) -> None:
        """SIGKILL one worker or actor of this cluster; returns when it is gone.

        Raises:
            ValueError: No live host runs a process of this pid.
        """
        for node_id in self.hosts:
            for process in self.host_processes(node_id)[1:]:
                if process.pid == pid:
                    session_guard.kill_processes([process], timeout_s=5.0)
                    return
        raise ValueError(f"process {pid} belongs to no host of this cluster")

    def shutdown(self) -> None:
        """Disconnect and end every process of the cluster; idempotent.

        Raises:
            ProcessesLeftError: Some process outlived SIGKILL.
        """
        if not self._folder:
            return
        folder = self._folder
        try:
            ray.shutdown()
        finally:
            left = session_guard.end_session(folder)
            self._reap()
            shutil.rmtree(folder, ignore_errors=True)
            self._folder = ""
            self._nodes.clear()
        if left:
            raise ProcessesLeftError(f"processes of {folder} are left: {[p.pid for p in left]}")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    def _sockets(self) -> dict[str, str]:
        """The next host's short socket names."""
        self._started += 1
        n = self._started
        return {
            "raylet_socket_name": os.path.join(self._folder, f"raylet{n}"),
            "plasma_store_socket_name": os.path.join(self._folder, f"plasma{n}"),
        }

    @contextlib.contextmanager
    def _session_environment(self) -> Iterator[None]:
        """What is started inside belongs to this session, and can be found by it.

        Only what is started inside: a server that a test starts beside the cluster does not.
        """
        before = os.environ.get("RAY_TMPDIR")
        os.environ["RAY_TMPDIR"] = self._folder
        left_out: Any = contextlib.nullcontext()
        if not self._with_agents:  # there is no setting for it but not to have the packages
            missing = ImportError("agents are left out")
            left_out = mock.patch(LOOK_FOR_AGENT, return_value=missing)
        try:
            with left_out:
                yield
        finally:
            if before is None:
                del os.environ["RAY_TMPDIR"]
            else:
                os.environ["RAY_TMPDIR"] = before

    def _start_guard(self) -> None:
        self._guard = subprocess.Popen(
            [sys.executable, session_guard.__file__, self._folder],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal must not end it
        )

    def _reap(self) -> None:
        """Wait for our own children, so that none stays behind as a zombie."""
        nodes = self._cluster.list_all_nodes() if self._cluster is not None else []
        children = [info.process for node in nodes for info in _process_infos(node)]
        if self._guard is not None:
            self._guard.kill()
            if self._guard.stdin is not None:
                self._guard.stdin.close()
            children.append(self._guard)
        deadline_s = time.monotonic() + 5.0
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=max(0.0, deadline_s - time.monotonic()))


def _process_infos(node: Any) -> list[Any]:
    return [info for infos in node.all_processes.values() for info in infos]


def _raylet(node: Any) -> "subprocess.Popen[bytes]":
    process: subprocess.Popen[bytes] = node.all_processes["raylet"][0].process
    return process
