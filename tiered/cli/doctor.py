"""`tiered doctor`: is this cluster fit for checkpoints in memory? Each finding with its remedy.

Facts are gathered by a small task on every host and judged by pure functions; what cannot be
measured is said to be so, never taken for good.
"""

import os
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from replication.fleet import STORE_SHARE
from replication.release import RELEASE
from tiered import cluster, sizing
from tiered.cli.session import err, out
from tiered.cli.views import size_text
from tiered.config import S3, JobSettings, Memory
from tiered.errors import DurableStoreError
from tiered.s3 import S3Store

if TYPE_CHECKING:
    from replication.records import ActorRef

TASK_TIMEOUT_S = 60.0
SPEED_BYTES = 64 << 20
SPEED_TIMEOUT_S = 20.0
SLOW_BYTES_PER_S = 500e6
CLOCK_LIMIT_S = 1.0
SMALL_STORE_SHARE = 0.25  # of a host's memory, below which most of it cannot hold checkpoints
DETECTION_LIMIT_S = 15.0
DESCRIPTORS = 65536

Level = Literal["ok", "note", "problem"]
STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}
MARKS = {"ok": "✓", "note": "!", "problem": "✗"}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        level: "note" for what works, and could be better.
        subject: What was looked at.
        result: What was found.
        remedy: What to do; empty when nothing is.
    """

    level: Level
    subject: str
    result: str
    remedy: str = ""

    @property
    def is_problem(self) -> bool:
        """Whether a job should not start before this is put right."""
        return self.level == "problem"


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a host says of itself.

    Attributes:
        node_id: Which.
        address: As Ray knows it.
        release: Of Tiered, or why it cannot be imported.
        ray_version: Of Ray.
        python: Its version.
        memory_bytes: RAM.
        shm_bytes: Size of /dev/shm.
        store_bytes: Of Ray's object store.
        clock_s: By how much its clock is ahead of this one's.
        clock_error_s: How exactly that is known.
        descriptors: Open files that a process may have.
        port_problem: Why no port can be opened, if so.
        environment: Ray's settings there.
    """

    node_id: str
    address: str
    release: str
    ray_version: str
    python: str
    memory_bytes: int
    shm_bytes: int
    store_bytes: int
    clock_s: float
    clock_error_s: float
    descriptors: int
    port_problem: str
    environment: Mapping[str, str]


def examine(s3: S3 | None, host_bytes: int | None = None, *, with_network: bool) -> list[Check]:
    """Look at everything.

    Args:
        s3: Where durable steps are to go, if the job has them.
        host_bytes: What one host's ranks save together each time, if that is known.
        with_network: Measure the speed between hosts.

    Raises:
        ConfigError: No Ray cluster is running.
    """
    cluster.attach()
    nodes = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    training = [n for n in nodes if n["Resources"].get("CPU") or n["Resources"].get("GPU")]
    checks = judge_cluster(len(training), [n.get("Labels") or {} for n in training])
    facts: list[HostFacts] = []
    with err.status("asking each host"):
        for node in training:
            try:
                facts.append(_ask(node))
            except RayError as error:
                where = f"host {node['NodeID'][:8]} ({node['NodeManagerAddress']})"
                problem = f"runs no task: {type(error).__name__}"
                checks.append(Check("problem", where, problem, "look at its raylet's log"))
    checks += merged({host.address: judge_host(host) for host in facts})
    checks += judge_agreement(facts)
    if host_bytes is not None:
        checks += judge_room(facts, host_bytes, s3)
    if (detection_s := _detection_s()) is not None:
        checks.append(judge_detection(detection_s))
    if (asks := _asks_for_token()) is not None:
        checks.append(judge_access(asks_for_token=asks))
    if with_network and len(facts) > 1:
        with err.status("measuring the network"):
            checks += [_speed(a, b) for a, b in zip(facts, [*facts[1:], facts[0]], strict=True)]
    if s3 is not None:
        with err.status("asking S3"):
            checks += check_s3(s3)
    return checks


def report(checks: Iterable[Check]) -> None:
    """Print them, and how many problems there are."""
    found = list(checks)
    for check in found:
        out.print(f"{MARKS[check.level]} ", style=STYLES[check.level], end="")
        out.print(f"{check.subject}: {check.result}", highlight=False, markup=False)
        if check.remedy:
            out.print(f"  → {check.remedy}", style="dim", highlight=False, markup=False)
    problems = sum(check.is_problem for check in found)
    notes = sum(check.level == "note" for check in found)
    text = f"{len(found)} checks, {problems} problems, {notes} notes"
    out.print(text, style="bold red" if problems else "bold green", highlight=False)


# -- judging -------------------------------------------------------------------------------------


def judge_cluster(hosts: int, labels: Iterable[Mapping[str, str]]) -> list[Check]:
    """Are there enough hosts, and is it known which fail together?"""
    if hosts == 0:
        remedy = "start Ray on hosts with CPUs or GPUs and join them"
        return [Check("problem", "hosts", "none can run a trainer", remedy)]
    if hosts == 1:
        remedy = "one host's loss loses everything in memory: add hosts, or rely on S3"
        return [Check("note", "hosts", "1, so no copy on another host", remedy)]
    checks = [Check("ok", "hosts", f"{hosts} can run trainers")]
    keys = ("tiered/domain", "rack", "ray.io/availability-zone")
    domains = {next((each[key] for key in keys if each.get(key)), "") for each in labels}
    if domains == {""}:
        remedy = "ray start --labels=rack=... keeps both copies from being in one rack"
        checks.append(Check("note", "failure domains", "no host has a label for one", remedy))
    else:
        checks.append(Check("ok", "failure domains", f"{len(domains)}"))
    return checks


def merged(by_host: Mapping[str, list[Check]]) -> list[Check]:
    """What was found on several hosts is said once, with their addresses."""
    hosts_of: dict[Check, list[str]] = {}
    for address, checks in by_host.items():
        for check in checks:
            hosts_of.setdefault(check, []).append(address)
    said = []
    for check, hosts in hosts_of.items():
        where = "every host" if len(hosts) == len(by_host) > 1 else ", ".join(hosts)
        said.append(replace(check, subject=f"{check.subject} on {where}"))
    return said


def judge_host(host: HostFacts) -> list[Check]:
    """Object store, shared memory, clock, ports, open files, and Ray's settings of one host."""
    return [
        _judge_store(host),
        _judge_clock(host),
        *_judge_process(host),
        *_judge_settings(host),
    ]


def _judge_store(host: HostFacts) -> Check:
    where = "memory"
    usable = size_text(STORE_SHARE * host.store_bytes)
    result = f"object store {size_text(host.store_bytes)}, of which {usable} for checkpoints"
    if host.store_bytes > host.shm_bytes:
        what = f"{result}; /dev/shm has only {size_text(host.shm_bytes)}, so it lies on disk"
        remedy = "enlarge /dev/shm (a container's --shm-size, an emptyDir of medium Memory)"
        return Check("problem", where, what, remedy)
    if host.store_bytes < SMALL_STORE_SHARE * host.memory_bytes:
        what = f"{result}; the host has {size_text(host.memory_bytes)} of memory"
        remedy = "ray start --object-store-memory=BYTES gives checkpoints more"
        return Check("note", where, what, remedy)
    return Check("ok", where, result)


def judge_room(hosts: Iterable[HostFacts], host_bytes: int, s3: S3 | None) -> list[Check]:
    """Would a job whose hosts save so much find room, with the default policy?"""
    need = sizing.size(JobSettings(Memory(), s3), host_bytes, 1.0).store_bytes
    what = f"{size_text(host_bytes)} a host and save need an object store of {size_text(need)}"
    small = [host for host in hosts if host.store_bytes < need]
    if not small:
        return [Check("ok", "room for the job", what)]
    have = ", ".join(f"{host.address} has {size_text(host.store_bytes)}" for host in small)
    remedy = f"ray start --object-store-memory={need} there, or save less (`tiered size`)"
    return [Check("problem", "room for the job", f"{what}; {have}", remedy)]


def _judge_clock(host: HostFacts) -> Check:
    where = "clock"
    if abs(host.clock_s) - host.clock_error_s > CLOCK_LIMIT_S:
        what = f"{host.clock_s:+.1f} s off"
        return Check(
            "problem", where, what, "run chrony or another NTP client: S3 refuses wrong clocks"
        )
    return Check("ok", where, f"within {CLOCK_LIMIT_S:g} s of this host's")


def _judge_process(host: HostFacts) -> list[Check]:
    checks = []
    if host.port_problem:
        what = f"none can be opened: {host.port_problem}"
        remedy = "allow processes there to listen; else set Memory(transport='ray')"
        checks.append(Check("problem", "ports", what, remedy))
    if host.descriptors < DESCRIPTORS:
        what = f"at most {host.descriptors} a process"
        checks.append(
            Check("note", "open files", what, f"ulimit -n {DESCRIPTORS} before `ray start`")
        )
    return checks


def _judge_settings(host: HostFacts) -> list[Check]:
    if host.environment.get("RAY_preallocate_plasma_memory") == "1":
        return []
    what = "the object store's is not preallocated: first touch is 5-10 times slower"
    remedy = "RAY_preallocate_plasma_memory=1 in the environment of `ray start`"
    return [Check("note", "memory", what, remedy)]


def judge_detection(seconds: float) -> Check:
    """How soon does Ray see that a host is lost?"""
    what = f"{seconds:.0f} s without an answer until Ray takes a host for lost"
    if seconds < DETECTION_LIMIT_S:
        return Check("ok", "loss of a host", what)
    remedy = (
        "on the head: RAY_health_check_period_ms=1000, RAY_health_check_failure_threshold=3 "
        "(training resumes sooner; copies are safe either way)"
    )
    return Check("note", "loss of a host", what, remedy)


def judge_access(*, asks_for_token: bool) -> Check:
    """Can only those connect to Ray who may?"""
    if asks_for_token:
        return Check("ok", "access", "Ray asks for its token")
    what = "whoever reaches Ray's ports may run code on every host, and read every checkpoint"
    remedy = "RAY_AUTH_MODE=token everywhere (`ray get-auth-token --generate`; SECURITY.md)"
    return Check("note", "access", what, remedy)


def judge_agreement(hosts: Iterable[HostFacts]) -> list[Check]:
    """Every host has the same releases."""
    checks = []
    found = list(hosts)
    for name, field in (("Tiered", "release"), ("Ray", "ray_version"), ("Python", "python")):
        by_value: dict[str, list[str]] = {}
        for host in found:
            by_value.setdefault(getattr(host, field), []).append(host.address)
        if len(by_value) > 1:
            what = "; ".join(f"{value} on {', '.join(where)}" for value, where in by_value.items())
            checks.append(Check("problem", name, what, "install one release on every host"))
        elif name == "Tiered" and by_value and RELEASE not in by_value:
            what = f"{next(iter(by_value))} on the hosts, {RELEASE} here"
            checks.append(Check("problem", name, what, "install one release everywhere"))
        elif by_value:
            checks.append(Check("ok", name, f"{next(iter(by_value))} on every host"))
    return checks


def judge_speed(name: str, bytes_per_s: float) -> Check:
    """Is the network fast enough for copies to keep up?"""
    result = f"{size_text(bytes_per_s)}/s over one TCP stream"
    if bytes_per_s < SLOW_BYTES_PER_S:
        remedy = "each save is copied over it: save less often, or use a faster interface"
        return Check("note", name, result, remedy)
    return Check("ok", name, result)


def check_s3(settings: S3) -> list[Check]:
    """Try each right that a job needs, on an object of our own that is deleted again.

    From this machine; holders use the credentials of theirs.
    """
    root, key = f"tiered-doctor-{uuid.uuid4().hex[:12]}", "probe"
    delete = (
        "allow s3:DeleteObject, or set S3(keep=None) and have another role collect (docs/S3.md); "
        f"the probe stays at {settings.uri}/{root}"
    )
    checks = []
    with closing(S3Store(settings, root)) as store:
        steps: tuple[tuple[str, str, Any], ...] = (
            ("reach", "check endpoint, region and credentials", store.probe),
            ("create if absent", "allow s3:PutObject", lambda: store.create(key, b"tiered")),
            ("refuse to create twice", "use a store with conditional PUT (If-None-Match)",
             lambda: _refuses_twice(store, key)),
            ("read", "allow s3:GetObject", lambda: store.get(key)),
            ("list", "allow s3:ListBucket", lambda: store.keys("")),
            ("list unfinished uploads", "allow s3:ListBucketMultipartUploads",
             lambda: store.uploads("")),
            ("delete", delete, lambda: store.delete([key])),
        )  # fmt: skip
        for what, remedy, act in steps:
            try:
                answer = act()
            except DurableStoreError as error:
                level: Level = "note" if what == "delete" else "problem"
                checks.append(Check(level, f"{settings.uri}: {what}", error.problem, remedy))
                if what == "reach":
                    break
            else:
                is_bad = answer is False
                result = "it does not" if is_bad else "works"
                level = "problem" if is_bad else "ok"
                checks.append(
                    Check(level, f"{settings.uri}: {what}", result, remedy if is_bad else "")
                )
    return checks


def _refuses_twice(store: S3Store, key: str) -> bool:
    return not store.create(key, b"other bytes")


# -- asking --------------------------------------------------------------------------------------


def _detection_s() -> float | None:
    """How long Ray waits for a host, as this cluster is set; there is no public call for it."""
    config = getattr(ray._raylet, "Config", None)
    if config is None:
        return None
    return float(config.health_check_period_ms() * config.health_check_failure_threshold() / 1000)


def _asks_for_token() -> bool | None:
    """Whether this cluster asks for a token; there is no public call for it."""
    mode = getattr(ray._raylet, "get_authentication_mode", None)
    return None if mode is None else bool(mode() == ray._raylet.AuthenticationMode.TOKEN)


def _on(node_id: str) -> dict[str, Any]:
    affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return {"num_cpus": 0, "scheduling_strategy": affinity, "max_retries": 0}


def _ask(node: Mapping[str, Any]) -> HostFacts:
    task = ray.remote(_facts).options(**_on(node["NodeID"]))
    ray.get(task.remote(), timeout=TASK_TIMEOUT_S)  # the worker process is there now
    before_s = time.time()
    facts = ray.get(task.remote(), timeout=TASK_TIMEOUT_S)
    after_s = time.time()
    clock_s = facts.pop("time_s") - (before_s + after_s) / 2
    store_bytes = int(node["Resources"].get("object_store_memory", 0))
    return HostFacts(
        node_id=node["NodeID"], address=node["NodeManagerAddress"], store_bytes=store_bytes,
        clock_s=clock_s, clock_error_s=(after_s - before_s) / 2, **facts,
    )  # fmt: skip


def _facts() -> dict[str, Any]:
    """Runs on a host."""
    import resource

    try:
        from replication.release import RELEASE as release
    except ImportError as error:
        release = f"none ({error})"
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    try:
        with socket.create_server((address, 0), family=_family(address)):
            port_problem = ""
    except OSError as error:
        port_problem = str(error)
    return {
        "release": release,
        "ray_version": ray.__version__,
        "python": platform.python_version(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shm_bytes": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        "descriptors": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "port_problem": port_problem,
        "environment": {k: v for k, v in os.environ.items() if k.startswith("RAY_pre")},
        "time_s": time.time(),
    }


def _speed(source: HostFacts, target: HostFacts) -> Check:
    """How fast one host can send to another."""
    name = f"network {source.address} to {target.address}"
    receiver: ActorRef = ray.remote(_Receiver).options(
        num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(target.node_id, soft=False)
    )
    actor: ActorRef = receiver.remote(target.address)
    try:
        port = ray.get(actor.port.remote(), timeout=TASK_TIMEOUT_S)
        received = actor.receive.remote()
        send = ray.remote(_send).options(**_on(source.node_id))
        ray.get(send.remote(target.address, port), timeout=TASK_TIMEOUT_S)
        seconds: float = ray.get(received, timeout=TASK_TIMEOUT_S)
        return judge_speed(name, SPEED_BYTES / seconds)
    except (RayError, OSError) as error:
        cause = getattr(error, "cause", None) or error
        what = f"no connection: {(str(cause) or type(cause).__name__).splitlines()[0]}"
        remedy = "open the ports that the system chooses between hosts, or Memory(transport='ray')"
        return Check("problem", name, what, remedy)
    finally:
        ray.kill(actor)


class _Receiver:
    """Listens on a host, and times what arrives."""

    def __init__(self, address: str) -> None:
        self._server = socket.create_server((address, 0), family=_family(address))
        self._server.settimeout(SPEED_TIMEOUT_S)

    def port(self) -> int:
        return int(self._server.getsockname()[1])

    def receive(self) -> float:
        connection, _ = self._server.accept()
        with connection:
            connection.settimeout(SPEED_TIMEOUT_S)
            buffer, left, began_s = bytearray(1 << 20), SPEED_BYTES, time.monotonic()
            while left > 0 and (count := connection.recv_into(buffer)):
                left -= count
            return time.monotonic() - began_s


def _send(address: str, port: int) -> None:
    """Runs on a host."""
    block = bytes(1 << 20)
    with socket.create_connection((address, port), timeout=SPEED_TIMEOUT_S) as connection:
        for _ in range(SPEED_BYTES // len(block)):
            connection.sendall(block)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
